"""Is the evidence true of your own adapters? A configuration, labelled queries, every merge; GPU or CPU.

`python -m benchmarks.own_adapters CONFIG --queries Q.csv --targets T.csv` first measures the base on all
queries and every expert alone on those of its own tasks, then runs the whole main job for each method and
seed, one process at a time. Beside the labels it prints what the search knows without any: losses and
agreement on unseen prompts, and whether these losses rank merges as accuracy does. Q.csv is laid out as
data/test.csv, T.csv as data/test_targets.csv. Appends a line of JSON a run to --out; what is there already,
of the same code, settings, adapters, queries and targets, is not run again: after an interruption the same
command goes on. Knows which runs are wanted and what they leave behind, not how a method works.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
import yaml

from benchmarks.command import exit_code
from benchmarks.environment import ROOT, code_hash, describe_machine
from benchmarks.job import Outcome, measure_tasks, run_pinned, run_process, search_facts
from benchmarks.own_question import Question, match_experts, read_question
from benchmarks.own_tables import format_row, own_report
from benchmarks.quality import SEEDED
from benchmarks.rows import Row, append_row, measured, read_rows
from benchmarks.score import read_table, score_tasks
from llm_merging.data import read_queries
from llm_merging.evaluation import answer_queries, write_predictions
from llm_merging.main import check_context
from llm_merging.merging import METHODS, Merges
from search.config import SearchConfig, config_hash, load_config
from search.errors import InputError
from search.files import write_json
from search.finalists import BASE, SINGLE
from search.recorded import TRACE_FILE
from search.trace import Trace

OUT = Path("output/own_adapters.jsonl")
DEFAULT_METHODS = ("my_merge", "balanced", "tsv_m", "task_arithmetic", "uniform_average")
ANSWER_BASE = "import sys; from benchmarks.own_adapters import answer_base; answer_base(*sys.argv[1:])"
NO_EXPERT_RIGHT = (
    "no expert alone gets a query of its own tasks right: there is no N. A target must be what the expert is "
    "to answer, to the letter and of at most 64 tokens, or the index of a choice. Check targets and --expert."
)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One merge, or the base or an expert alone."""

    method: str
    """Of `-m`, or "base", or "expert NAME"."""
    seed: int
    config: SearchConfig
    """Of an expert alone it has that adapter and no other."""
    tasks: tuple[str, ...]
    """Whose queries it answers."""

    @property
    def device(self) -> str:
        """What computes, without a try: this process leaves the whole GPU to the runs."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return auto if self.config.device == "auto" else self.config.device


def plan_alone(config: SearchConfig, question: Question, experts: Mapping[str, str]) -> list[Run]:
    """Return the base, asked everything, and each expert that has a task, asked its own.

    Args:
        experts: held-in task -> its adapter's name.
    """
    plain = SearchConfig(base=config.base, adapters=config.adapters, device=config.device)
    runs = [Run(BASE, 0, plain, tuple(question.held_out))]
    for adapter in config.adapters:
        if tasks := tuple(task for task, name in experts.items() if name == adapter.name):
            single = plain.model_copy(update={"adapters": (adapter,)})
            runs.append(Run(SINGLE + adapter.name, 0, single, tasks))
    return runs


def plan_merges(arguments: argparse.Namespace, config: SearchConfig, question: Question) -> list[Run]:
    """Return the merges: of methods that draw one a seed, of the others one."""
    return [
        Run(method, seed, config, tuple(question.held_out))
        for method in dict.fromkeys(arguments.methods)
        for seed in dict.fromkeys(arguments.seeds if method in SEEDED else (0,))
    ]


def identify(run: Run, question: Question, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return what a run's line starts with: all that its answers and their score depend on.

    Args:
        hashes: adapter's name -> SHA-256 of its weights.
    """
    return {
        "benchmark": "own_adapters",
        "method": run.method,
        "seed": run.seed,
        "config_sha256": config_hash(run.config),
        "adapters_sha256": [] if run.method == BASE else [hashes[a.name] for a in run.config.adapters],
        "question_sha256": question.of_tasks(run.tasks).sha256,
        "code_sha256": code_hash(),
        "device": run.device,
    }


def answer_run(question: Question, run: Run, folder: Path, running: set[int]) -> Outcome[Run]:
    """Answer in a process of its own; return accuracies by task, facts and cost, or how it failed."""
    folder.mkdir(parents=True)
    config, asked, output = folder / "config.yaml", folder / "queries.csv", folder / "output"
    config.write_text(yaml.safe_dump(run.config.model_dump(mode="json")), encoding="utf-8")
    question = question.of_tasks(run.tasks)
    question.write_queries(asked)
    method = "uniform_average" if run.method.startswith(SINGLE) else run.method
    if method == BASE:
        command = ["-c", ANSWER_BASE, str(config), str(asked), str(output / asked.name)]
    else:
        command = [str(ROOT / "llm_merging/main.py"), "-m", method, "--seed", str(run.seed)]
        command += [
            "--config",
            str(config),
            "--dataset_filepaths",
            str(asked),
            "--output_folder",
            str(output),
        ]
    log = folder.with_suffix(".log")
    text, cost, failure = run_process([sys.executable, *command], log, running, dict(os.environ))
    try:
        if failure:
            return Outcome(run, cost, failure)
        found = score_tasks(read_table(output / asked.name, ["prediction"]), question.targets)["accuracy"]
        accuracies = {str(task): round(float(value), 4) for task, value in found.items()}
        facts = search_facts(output / method, text) | label_free_facts(output / method / TRACE_FILE)
        return Outcome(run, {"tasks": accuracies, **facts, **cost})
    finally:
        shutil.rmtree(folder)  # gigabytes a run of a large base


def answer_base(config: str, queries: str, answers: str) -> None:
    """Answer with the base as it is: what a merge must do better than."""
    method, asked = Merges(BASE, load_config(Path(config))), read_queries(Path(queries))
    method._load_base_model()
    method._load_tokenizer()
    write_predictions(Path(answers), asked, answer_queries(method, asked))


def label_free_facts(path: Path) -> dict[str, Any]:
    """Return what a search says of its merge on unseen prompts, nothing where it did not come to them.

    `finalist_losses` are those of all that it compared; none where it left an adapter out before, since
    they are not the merges of all adapters then.
    """
    trace = Trace.load(path) if path.exists() else None
    event = trace.last("finalists") if trace else None
    if trace is None or event is None or event["prompts"] != "unseen":
        return {}
    place = event["names"].index(event["winner"])
    names = [adapter["name"] for adapter in trace.header["adapters"]]
    losses = dict(zip(event["names"], event["losses"], strict=True))
    return {
        "loss": event["losses"][place],
        "agreement": dict(zip(names, event["agreement"][place], strict=True)),
        "finalist_losses": {} if trace.header.get("left_out") else losses,
        "device_name": trace.header.get("device_name"),
    }


def run_missing(
    runs: Sequence[Run],
    question: Question,
    identity_of: Callable[[Run], dict[str, Any]],
    derive: Callable[[Mapping[str, float]], dict[str, Any]],
    out: Path,
) -> list[Row]:
    """Run what is not recorded yet and record it; return the lines of all runs that worked, in their order.

    Args:
        derive: task -> accuracy to what else a line has.
    """
    rows, machine = read_rows(out), describe_machine()
    identities = [identity_of(run) for run in runs]
    found = [find_row(identity, rows) for identity in identities]
    missing = [run for run, row in zip(runs, found, strict=True) if row is None]
    with TemporaryDirectory() as name:
        print(f"{len(missing)} of {len(runs)} runs to do; logs are in {name}", file=sys.stderr, flush=True)
        answer, cores = partial(answer_run, question), [os.sched_getaffinity(0)]
        for outcome in run_pinned(missing, cores, Path(name), answer):
            row = {**identity_of(outcome.job), **outcome.measures, **machine}
            row |= {"failure": outcome.failure} if outcome.failure else derive(row["tasks"])
            append_row(out, row)
            print(format_row(row), flush=True)
            rows.append(row)
    found = [find_row(identity, rows) for identity in identities]
    return [{**row, **derive(row["tasks"])} for row in found if row is not None]


def find_row(identity: Mapping[str, Any], rows: Sequence[Row]) -> Row | None:
    """Return the last line of the same run that worked, None where there is none."""
    same = (row for row in measured(rows) if all(row.get(key) == value for key, value in identity.items()))
    return next(reversed(list(same)), None)


def compare_merges(arguments: argparse.Namespace) -> int:
    """Check everything, measure base and experts, then the merges; print the tables; return the exit code."""
    config = load_config(arguments.config)
    question = read_question(arguments.queries, arguments.targets)
    if arguments.limit_queries is not None:
        question = question.first(arguments.limit_queries)
    experts = match_experts(arguments.expert, [a.name for a in config.adapters], question.held_in)
    hashes = check_weights(arguments.queries, question, config)
    identity_of = partial(identify, question=question, hashes=hashes)

    planned = plan_alone(config, question, experts)
    alone = run_missing(planned, question, identity_of, lambda _: {}, arguments.out)
    if len(alone) < len(planned):
        print("error: there is no N without base and experts. The same command goes on.", file=sys.stderr)
        return 1
    own = {task: accuracy for row in alone[1:] for task, accuracy in row["tasks"].items()}
    if not any(own.values()):
        raise InputError(NO_EXPERT_RIGHT)
    with TemporaryDirectory() as name:
        scores = Path(name) / "scores.json"
        write_json(scores, {"base": alone[0]["tasks"], "experts": own})

        def derive(accuracies: Mapping[str, float]) -> dict[str, Any]:
            tasks = pd.DataFrame({"accuracy": accuracies, "held_out": question.held_out})
            return measure_tasks(tasks, scores, tuple(experts))

        planned = plan_merges(arguments, config, question)
        merges = run_missing(planned, question, identity_of, derive, arguments.out)
        base = {**alone[0], **derive(alone[0]["tasks"]), "no_option": True}
    if merges:
        print(own_report(merges, base, own, experts))
    return 0 if len(merges) == len(planned) else 1


def check_weights(queries: Path, question: Question, config: SearchConfig) -> dict[str, str]:
    """Refuse adapters that do not fit and queries that are too long (InputError) before anything runs.

    Returns:
        Adapter's name -> SHA-256 of its weights.
    """
    method = Merges(BASE, config.model_copy(update={"device": "cpu"}))
    check_context(method, {queries: list(question.queries)})
    method.check_adapters()
    return {adapter.name: adapter.sha256 for adapter in method._load_adapters()}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_adapters", description=__doc__)
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="base, adapters and search, as main.py reads"
    )
    parser.add_argument("--queries", type=Path, required=True, help="id, input, eval_type, answer_choices")
    parser.add_argument("--targets", type=Path, required=True, help="id, task, target, held_out (0 or 1)")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(DEFAULT_METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument(
        "--expert",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=TASK",
        help="whose task it is, where no adapter has the task's name",
    )
    parser.add_argument("--limit-queries", type=int, metavar="N", help="the first N of each task alone")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; return 0, 1 if a run failed, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    return exit_code(lambda: compare_merges(arguments))


if __name__ == "__main__":
    sys.exit(main())
