"""Does searching the few weights of an operator beat the operator and the search? And what do controls get?

`python -m benchmarks.operator_search --jobs 4 --controls` runs benchmarks/pieces.py for each operator,
variant of the zoo and seed, and for the control, the search's coefficients permuted among adapters, each in a
process of its own, pinned to its own cores. It appends a line of JSON a run to
benchmarks/results/quality.jsonl; `python -m benchmarks.quality --report` shows them beside the methods that
`-m` offers. Searches get the same seconds; an operator's own come on top, as `prepare_s`. What is there
already, of the same code, settings and cores, is not run again. Knows which runs are wanted, not how one is
done.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code
from benchmarks.environment import ROOT, code_hash
from benchmarks.job import Outcome, job_environment, run_process
from benchmarks.missing import run_missing
from benchmarks.pieces import OPERATORS
from benchmarks.quality import OUT
from benchmarks.rows import PERMUTED, WEIGHED, Row, measured
from benchmarks.zoo.sets import VARIANTS, held_in_tasks, write_config
from search.config import config_hash, load_config


@dataclass(frozen=True, slots=True)
class PiecesJob:
    """One run of benchmarks/pieces.py."""

    operator: str | None
    """None for the control."""
    experts: str
    seed: int
    config: Path
    options: tuple[str, ...]
    """What else its command is given."""

    @property
    def method(self) -> str:
        """What the table calls it."""
        return PERMUTED if self.operator is None else f"{self.operator}{WEIGHED}"


def plan_jobs(arguments: argparse.Namespace, folder: Path) -> list[PiecesJob]:
    """Return all wanted runs, with a configuration for each variant written into `folder`."""
    jobs = []
    limits = ["--seconds", f"{arguments.seconds:g}", "--permutations", f"{arguments.permutations}"]
    limits += [] if arguments.queries is None else ["--queries", f"{arguments.queries}"]
    for experts in arguments.variants:
        config = folder / f"{experts}.yaml"
        write_config(config, experts, generated=folder / "adapters", template=arguments.config)
        for operator in (*arguments.operators, *([None] if arguments.controls else [])):
            own = [*limits, *(["--operator", operator] if operator else [])]
            for seed in arguments.seeds:
                options = *own, "--set", *arguments.overrides, f"search.seed={seed}"
                jobs.append(PiecesJob(operator, experts, seed, config, options))
    return jobs


def run_pieces(job: PiecesJob, output: Path, running: set[int]) -> Outcome[PiecesJob]:
    """Run one job on the cores of this thread; return its measures, or how it failed."""
    output.mkdir()
    result = output / "measures.json"
    command = [sys.executable, "-m", "benchmarks.pieces", str(job.config), "--experts", job.experts]
    try:
        _, cost, failure = run_process(
            [*command, "--out", str(result), *job.options],
            output / "log",
            running,
            job_environment(job.options),
        )
        costs = {"process_s": cost["seconds"], "peak_mb": cost["peak_mb"]}
        return Outcome(job, costs if failure else {**json.loads(result.read_text()), **costs}, failure)
    finally:
        shutil.rmtree(output)


def identify(job: PiecesJob, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a run's line starts with: what was run, with which settings and code."""
    drawn = {"permutations": arguments.permutations} if job.operator is None else {}
    return {
        "benchmark": "operator_search",
        "no_option": True,
        "method": job.method,
        "experts": job.experts,
        "seed": job.seed,
        "config": arguments.config.name,
        "overrides": arguments.overrides,
        "config_sha256": config_hash(load_config(arguments.config, arguments.overrides)),
        "code_sha256": code_hash(),
        "cores": arguments.cores,
        "limit_s": arguments.seconds,
        "queries": arguments.queries,
        "held_in_tasks": held_in_tasks(job.experts),
        **drawn,
    }


def was_run(identity: Row, rows: Sequence[Row]) -> bool:
    """Say whether the same run worked before."""
    return any(all(row.get(key) == value for key, value in identity.items()) for row in measured(rows))


def format_row(row: Row) -> str:
    """Return a line for people: the run's shares, and those of what it is held against."""
    start = f"{row['experts']:10}{row['method']:32}{row['seed']:>3}"
    if "failure" in row:
        return f"{start}  FAILED: {row['failure'].strip().splitlines()[-1]}"
    name = "alone" if "alone" in row else "searched"
    facts = row.get("search", row)
    return (
        f"{start} N, worst, held-out {_format_shares(row)}, {name} {_format_shares(row[name])}; "
        f"{facts['evaluations']} evaluations in {facts['search_s']:.0f} s, ended by {facts['ended_by']}"
    )


def _format_shares(measures: Row) -> str:
    return " ".join(f"{100 * measures[name]:5.1f}" for name in ("held_in_N", "worst_task", "held_out"))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator_search", description=__doc__)
    parser.add_argument("--operators", nargs="*", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--controls", action="store_true", help="permuted coefficients of the search, too")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--seconds", type=float, default=60.0, help="of search (default %(default)s)")
    parser.add_argument("--permutations", type=int, default=20, help="a run (default %(default)s)")
    parser.add_argument("--queries", type=int, help="at most so many a task (all shipped ones)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml", help="the settings")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default %(default)s)")
    parser.add_argument("--cores", type=int, default=2, help="that each is pinned to (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return 0, 1 if a run failed, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    make = plan_jobs, identify, run_pieces, format_row, was_run
    return exit_code(lambda: 1 if run_missing(arguments, *make) else 0)


if __name__ == "__main__":
    sys.exit(main())
