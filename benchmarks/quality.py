"""Does the search beat every other merge? Each method on each variant of the zoo, over seeds, with intervals.

`python -m benchmarks.quality --jobs 4` runs the whole main job for every method, variant and seed (methods
without chance once), and the search and the uniform merge on odd sets of experts, and appends a line of
JSON a run to benchmarks/results/quality.jsonl. What is there already, of the same code, settings and cores,
is not run again: after an interruption the same command goes on. Then, or with --report from those lines
alone, it writes tables into docs/METHOD.md and a figure; of another --out it prints the tables and draws
beside it. Seconds are wall-clock: nothing else should run meanwhile. Knows which runs are wanted, not how
one is done.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import run_and_report
from benchmarks.environment import ROOT, code_hash
from benchmarks.job import Job, run_job
from benchmarks.missing import run_missing
from benchmarks.plots import draw_quality, write_svg
from benchmarks.quality_limits import quality_limits
from benchmarks.quality_tables import SEARCH, UNIFORM, quality_text
from benchmarks.rows import Row, latest_rows, measured, read_rows
from benchmarks.sections import replace_section
from benchmarks.zoo.sets import SETS, VARIANTS, held_in_tasks, scores_file, worthless_adapters, write_config
from llm_merging.merging import METHODS
from search.config import config_hash, load_config
from search.errors import InputError

OUT = ROOT / "benchmarks/results/quality.jsonl"
DOCUMENT, SECTION = ROOT / "docs/METHOD.md", "quality"
FIGURE = Path("figures/quality.svg")
"""Seen from the document's folder."""
SEEDED = frozenset({"adamerging", "best_single", "dare", "dare_ties", "lorahub", "my_merge", "regmean"})
"""Methods that draw: masks, prompts or candidates. The others give one merge, whatever the seed."""
ODD_SETS = tuple(name for name in SETS if name not in VARIANTS)


def plan_jobs(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """Return all wanted runs, with a configuration for each expert set written into `folder`."""
    jobs = []
    for experts in (*arguments.variants, *arguments.sets):
        compared = arguments.methods if experts in VARIANTS else [UNIFORM, SEARCH]
        config = folder / f"{experts}.yaml"
        write_config(config, experts, generated=folder / "adapters", template=arguments.config)
        held_in, scores = tuple(held_in_tasks(experts)), ROOT / scores_file(experts)
        for method in (method for method in compared if method in arguments.methods):
            seeds = arguments.seeds if method in SEEDED else arguments.seeds[:1]
            jobs += [Job(method, experts, seed, config, scores, held_in) for seed in seeds]
    return jobs


def identify(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a run's line starts with: what was run, with which settings and code."""
    return {
        "benchmark": "quality",
        "method": job.method,
        "experts": job.experts,
        "seed": job.seed,
        "config": arguments.config.name,
        "config_sha256": config_hash(load_config(arguments.config)),
        "code_sha256": code_hash(),
        "cores": arguments.cores,
        "held_in_tasks": job.held_in,
        "worthless": worthless_adapters(job.experts),
    }


def format_row(row: Row) -> str:
    """One line for people, shares in percent."""
    start = f"{row['experts']:16}{row['method']:18}{row['seed']:>3}"
    if "failure" in row:
        return f"{start}  FAILED after {row['seconds']:.0f} s: {row['failure'].splitlines()[-1]}"
    shares = (f"{100 * row[name]:6.1f}" for name in ("held_in_N", "worst_task", "held_out"))
    return (
        f"{start} N, worst, held-out {' '.join(shares)} {row['seconds']:6.0f} s {row['peak_mb']:5} MB "
        f"{row.get('evaluations', '-')} evaluations, ended by {row.get('ended_by', '-')}"
    )


def write_report(out: Path) -> None:
    """Make tables and figure of the recorded lines alone."""
    rows = latest_rows(read_rows(out))
    if not measured(rows):
        raise InputError(f"{out}: no run that worked, nothing to report. Run without --report first.")
    picture = draw_quality(measured(rows), VARIANTS)
    for limit in quality_limits(measured(rows), VARIANTS, ODD_SETS):
        print(limit.line)
    if out.resolve() == OUT:
        write_svg(picture, DOCUMENT.parent / FIGURE)
        replace_section(DOCUMENT, SECTION, quality_text(rows, VARIANTS, ODD_SETS, FIGURE.as_posix()))
        print(f"report: {DOCUMENT}, {DOCUMENT.parent / FIGURE}")
    else:
        figure = out.with_suffix(".svg")
        write_svg(picture, figure)
        print(quality_text(rows, VARIANTS, ODD_SETS, figure.name), f"figure: {figure}", sep="\n\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    methods = sorted(METHODS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--sets", nargs="*", choices=ODD_SETS, default=list(ODD_SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml", help="the settings")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default %(default)s)")
    parser.add_argument("--cores", type=int, default=2, help="that each is pinned to (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; return 0, 1 if a run failed, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    return run_and_report(
        lambda: run_missing(arguments, plan_jobs, identify, run_job, format_row),
        lambda: write_report(arguments.out),
        only_report=arguments.report,
    )


if __name__ == "__main__":
    sys.exit(main())
