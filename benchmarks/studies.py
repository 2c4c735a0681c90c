"""Which search, and which prompts? Arms that differ in one thing, at equal time, evaluations and tokens.

`python -m benchmarks.studies --study search --jobs 8` runs every arm (benchmarks/study_arms.py) on every
variant of the zoo and seed in a process of its own, pinned to its own cores, and appends a line of JSON a run
to benchmarks/results/studies.jsonl. In the study "search" seconds of search end a run, in the others the
configuration's evaluations. What is there already, of the same code, settings and cores, is not run again:
after an interruption the same command goes on. Arms whose settings come to the same are run once and shown
under each name. Then, or with --report from those lines alone, it writes tables into docs/METHOD.md and
figures; of another --out it prints the tables and draws beside it. Knows which runs are wanted, not how one
is done.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from benchmarks.arm import Checkpoints
from benchmarks.command import run_and_report
from benchmarks.environment import ROOT, code_hash
from benchmarks.job import Outcome, job_environment, run_process
from benchmarks.missing import run_missing
from benchmarks.plots import write_svg
from benchmarks.rows import Row, measured, read_rows
from benchmarks.sections import replace_section
from benchmarks.study_arms import STUDIES, Arm
from benchmarks.study_plots import draw_families
from benchmarks.study_tables import studies_text, study_rows
from benchmarks.zoo.sets import VARIANTS, write_config
from search.config import SearchConfig, config_hash, load_config
from search.errors import InputError
from search.yaml_input import read_mapping

OUT = ROOT / "benchmarks/results/studies.jsonl"
DOCUMENT, SECTION = ROOT / "docs/METHOD.md", "studies"
FIGURES = Path("figures")
"""Seen from the document's folder."""
SECONDS = (15.0, 60.0, 300.0)
TOKENS = (200_000, 400_000, 1_500_000)
"""The demo's 320 evaluations and 40 gradient steps take 430,000."""
NO_LIMITS = "search.time_box_s=1000000", "search.max_evaluations=1000000"
"""The first in all runs; the second where seconds end the search."""


@dataclass(frozen=True, slots=True)
class ArmJob:
    """One run of one arm."""

    arm: Arm
    names: tuple[str, ...]
    """Of all arms that come to the same, this one first."""
    studies: tuple[str, ...]
    """That have one of them."""
    experts: str
    seed: int
    config: Path
    overrides: tuple[str, ...]
    checkpoints: Checkpoints
    digest: str
    """Hash of all settings but the seed, and of the checkpoints."""
    n_queries: int | None

    @property
    def label(self) -> str:
        """The arm's name, with the seconds where these end it."""
        limit_s = self.checkpoints.limit_s
        return self.arm.name if limit_s is None else f"{self.arm.name}, {limit_s:g} s"


def plan_jobs(arguments: argparse.Namespace, folder: Path) -> list[ArmJob]:
    """Return all wanted runs, with a configuration for each expert set and change of skeletons in `folder`.

    Studies that are not wanted are planned too: arms that come to the same have the same names each time.
    """
    jobs: dict[tuple[str, str, int], ArmJob] = {}
    wanted: set[tuple[str, str, int]] = set()
    every = {experts for name in arguments.study for experts in arguments.variants or STUDIES[name].variants}
    for name, study in STUDIES.items():
        own = arguments.variants or study.variants
        for experts in (variant for variant in VARIANTS if variant in every):
            for job in _plan_study(name, experts, arguments, folder):
                key = job.digest, experts, job.seed
                jobs[key] = _join(jobs[key], job) if key in jobs else job
                is_asked = arguments.arms is None or not {*arguments.arms}.isdisjoint(job.names)
                if name in arguments.study and experts in own and is_asked:
                    wanted.add(key)
    return [job for key, job in jobs.items() if key in wanted]


def _join(first: ArmJob, other: ArmJob) -> ArmJob:
    names, studies = (*first.names, *other.names), (*first.studies, *other.studies)
    return replace(first, names=tuple(dict.fromkeys(names)), studies=tuple(dict.fromkeys(studies)))


def _plan_study(name: str, experts: str, arguments: argparse.Namespace, folder: Path) -> Iterator[ArmJob]:
    study = STUDIES[name]
    seconds = arguments.seconds if arguments.seconds is not None else SECONDS if study.is_timed else ()
    for arm in study.arms:
        path = folder / f"{experts}-{arm.change.__name__ if arm.change else 'own'}.yaml"
        if not path.exists():
            _write_config(path, arm, experts, arguments.config, folder)
        limits = NO_LIMITS if seconds and not arm.reference else NO_LIMITS[:1]
        overrides = (*limits, *study.overrides, *arm.overrides, *arguments.overrides)
        points = Checkpoints(
            seconds=tuple(sorted(seconds)),
            tokens=tuple(arguments.tokens),
            evaluations=tuple(arguments.evaluations),
        )
        points = Checkpoints() if arm.reference else points
        digest = _digest(load_config(path, overrides), arm, points, arguments.queries)
        shown_as, n_queries = ((arm.name,), (name,)), arguments.queries
        for seed in arguments.seeds[:1] if arm.reference else arguments.seeds:
            yield ArmJob(arm, *shown_as, experts, seed, path, overrides, points, digest, n_queries)


def _write_config(path: Path, arm: Arm, experts: str, template: Path, folder: Path) -> None:
    """Write the template with the adapters of an expert set, and their skeletons as the arm has them."""
    write_config(path, experts, generated=folder / "adapters", template=template)
    if arm.change is None:
        return
    document = read_mapping(path, ())
    own = {entry["name"]: tuple(entry.get("skeletons", ())) for entry in document["adapters"]}
    changed = arm.change(own)
    document["adapters"] = [
        entry | {"skeletons": list(changed[entry["name"]])} for entry in document["adapters"]
    ]
    path.write_text(yaml.safe_dump(document, sort_keys=False, width=200), encoding="utf-8")


def _digest(config: SearchConfig, arm: Arm, points: Checkpoints, n_queries: int | None) -> str:
    looked_at = [points.seconds, points.tokens, points.evaluations]
    content = json.dumps([config_hash(config), arm.reference, looked_at, n_queries])
    return sha256(content.encode()).hexdigest()


def run_arm(job: ArmJob, output: Path, running: set[int]) -> Outcome[ArmJob]:
    """Run one arm on the cores of this thread; return its measures, or how it failed."""
    output.mkdir()
    points, result = job.checkpoints, output / "measures.json"
    command = [sys.executable, "-m", "benchmarks.arm", str(job.config), "--experts", job.experts]
    command += ["--out", str(result), "--set", *job.overrides, f"search.seed={job.seed}"]
    for name in ("seconds", "tokens", "evaluations"):
        command += [f"--{name}", *map(str, getattr(points, name))]
    command += ["--queries", str(job.n_queries)] if job.n_queries is not None else []
    command += ["--reference", job.arm.reference] if job.arm.reference else []
    try:
        environment = job_environment(job.overrides)
        _, cost, failure = run_process(command, output / "log", running, environment)
        return Outcome(job, {} if failure else {**json.loads(result.read_text()), **cost}, failure)
    finally:
        shutil.rmtree(output)


def identify(job: ArmJob, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a run's line starts with: what was run, with which settings and code."""
    return {
        "benchmark": "studies",
        "method": job.label,
        "arms": list(job.names),
        "studies": list(job.studies),
        "limit_s": job.checkpoints.limit_s,
        "experts": job.experts,
        "seed": job.seed,
        "config": arguments.config.name,
        "overrides": list(job.overrides),
        "queries": job.n_queries,
        "config_sha256": job.digest,
        "code_sha256": code_hash(),
        "cores": arguments.cores,
    }


def format_row(row: Row) -> str:
    """Return a line for people."""
    start = f"{row['experts']:10}{row['method']:44}{row['seed']:>3}"
    if "failure" in row:
        return f"{start}  FAILED: {row['failure'].strip().splitlines()[-1]}"
    shares = " ".join(f"{100 * row[name]:6.1f}" for name in ("held_in_N", "worst_task", "held_out"))
    spent = f"{row.get('search_s', 0):.0f} s, {row['evaluations']} evaluations"
    return f"{start}  N, worst, held-out {shares}  {spent}"


def write_report(out: Path) -> None:
    """Make tables and figures of the recorded lines alone."""
    rows = read_rows(out)
    if not measured(rows):
        raise InputError(f"{out}: no run that worked, nothing to report. Run without --report first.")
    is_document = out.resolve() == OUT
    folder, stem = (DOCUMENT.parent, FIGURES / "studies") if is_document else (out.parent, Path(out.stem))
    figures = {}
    for name in STUDIES:
        for experts in VARIANTS:
            runs = study_rows(rows, name, experts)
            if STUDIES[name].is_timed and runs:
                suffix = "" if experts == VARIANTS[0] else f"_{experts}"
                figures[name, experts] = f"{stem.as_posix()}_{name}{suffix}.svg"
                write_svg(draw_families(runs, experts), folder / figures[name, experts])
    text = studies_text(rows, figures)
    if is_document:
        replace_section(DOCUMENT, SECTION, text)
        print("report:", DOCUMENT, *figures.values())
    else:
        print(text, *(f"figure: {folder / figure}" for figure in figures.values()), sep="\n\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="some of the studies' arms, by name")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="in place of each study's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml", help="the default arm")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="in every arm, over its own",
    )
    parser.add_argument(
        "--seconds",
        nargs="+",
        type=float,
        help="of search: looked at after each, the last end it (default: 15 60 300 in the study search)",
    )
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS), help="looked at after each")
    parser.add_argument("--evaluations", nargs="*", type=int, default=[], help="looked at after each")
    parser.add_argument("--queries", type=int, help="of each task at most, to try things out (default all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default %(default)s)")
    parser.add_argument("--cores", type=int, default=2, help="that each is pinned to (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; return 0, 1 if a run failed, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    return run_and_report(
        lambda: run_missing(arguments, plan_jobs, identify, run_arm, format_row),
        lambda: write_report(arguments.out),
        only_report=arguments.report,
    )


if __name__ == "__main__":
    sys.exit(main())
