"""Can prompts be chosen without knowing what an adapter is for?

`python -m benchmarks.selection --jobs 8` lets the base write a pool of questions from one template, the same
for all adapters, for every variant of the zoo and seed. Each expert answers all of them and keeps some, by
each criterion (benchmarks/selection_criteria.py), which looks at models only. The shipped search then runs on
what was kept, coefficients free or confined to the neighbourhood of the balanced merge, and its result is
held against the labels: a line of JSON a run in benchmarks/results/selection.jsonl. What is there already, of
the same code and settings, is not run again. Then, or with --report from those lines alone, a table is
written into docs/METHOD.md; of another --out it is printed. Knows which runs are wanted, not how one is done.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.command import run_and_report
from benchmarks.device_pool import DevicePool
from benchmarks.environment import ROOT, code_hash, describe_machine
from benchmarks.rows import append_row, is_done, measured, read_rows
from benchmarks.sections import replace_section
from benchmarks.selection_criteria import CRITERIA
from benchmarks.selection_pool import TEMPLATE
from benchmarks.selection_run import (
    FREE_TEXT,
    MERGES,
    REGIONS,
    SKELETONS,
    Arm,
    PoolJob,
    SelectionJob,
    keep_prompts,
    run_arm,
)
from benchmarks.selection_tables import selection_text
from benchmarks.studies import format_row
from benchmarks.zoo.sets import VARIANTS, write_config
from search.config import config_hash, load_config
from search.errors import InputError

OUT = ROOT / "benchmarks/results/selection.jsonl"
CONFIG = ROOT / "configs/demo.yaml"
DOCUMENT, SECTION = ROOT / "docs/METHOD.md", "selection"
NO_LIMIT = "search.time_box_s=1000000"
"""Evaluations end every search."""
ARMS = (
    *map(Arm, MERGES),
    Arm(SKELETONS),
    *(Arm(prompts, region) for prompts, region in product((FREE_TEXT, *CRITERIA), REGIONS)),
)


def plan_jobs(arguments: argparse.Namespace, folder: Path) -> Iterator[SelectionJob]:
    """Yield all wanted runs, prompts still missing, with the configurations written into `folder`."""
    overrides = (NO_LIMIT, *arguments.overrides)
    wanted = [arm for arm in ARMS if arguments.arms is None or arm.name in arguments.arms]
    for experts in arguments.variants:
        with_skeletons, without = (folder / f"{experts}-{kind}.yaml" for kind in ("own", "none"))
        for path in (with_skeletons, without):
            has = path == with_skeletons
            write_config(path, experts, generated=folder / "adapters", template=CONFIG, skeletons=has)
        for arm in wanted:
            path = without if arm.prompts == FREE_TEXT else with_skeletons
            for seed in arguments.seeds[:1] if arm.prompts in MERGES else arguments.seeds:
                yield SelectionJob(arm, experts, seed, path, overrides, arguments.queries)


def identify(job: SelectionJob, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a run's line starts with: what was run, with which settings and code."""
    pool = {"template": arguments.template, "questions": arguments.questions} if job.arm.is_pooled else {}
    settings = [config_hash(load_config(job.config, job.overrides)), job.n_queries, pool]
    return {
        "benchmark": "selection",
        "method": job.arm.name,
        "prompts_by": job.arm.prompts,
        "region": job.arm.region,
        "experts": job.experts,
        "seed": job.seed,
        "config": CONFIG.name,
        "overrides": list(job.overrides),
        "queries": job.n_queries,
        **pool,
        "config_sha256": sha256(json.dumps(settings).encode()).hexdigest(),
        "code_sha256": code_hash(),
        "cores": 1,
    }


def run_missing(arguments: argparse.Namespace) -> int:
    """Run what is not recorded yet and record it; return how many runs failed."""
    machine, rows = describe_machine(), read_rows(arguments.out)
    with TemporaryDirectory() as name:
        jobs = list(plan_jobs(arguments, Path(name)))
        missing = [job for job in jobs if not is_done(identify(job, arguments), rows)]
        print(f"{len(missing)} of {len(jobs)} runs to do, {arguments.jobs} at a time", file=sys.stderr)
        if not missing:
            return 0
        device = _find_device(missing[0])
        where = {"device_name": torch.cuda.get_device_name()} if device == "cuda" else {}
        with DevicePool(arguments.jobs, device) as pool:
            pooled = _fill_pools([job for job in missing if job.arm.is_pooled], arguments, pool)
            ready = [*(job for job in missing if not job.arm.is_pooled), *pooled]
            for job, measures in pool.run(run_arm, ready):
                row = {**identify(job, arguments), **measures, **where, **machine}
                append_row(arguments.out, row)
                print(format_row(row), flush=True)
            n_lost = len(missing) - len(ready)
            return pool.n_failed + n_lost


def _find_device(job: SelectionJob) -> str:
    device = load_config(job.config, job.overrides).device
    is_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "cuda" if is_cuda else "cpu"


def _fill_pools(
    jobs: Sequence[SelectionJob], arguments: argparse.Namespace, pool: DevicePool
) -> list[SelectionJob]:
    """Return the jobs with their prompts, but those whose pool failed; a pool serves all arms of a seed."""
    wanted = {
        PoolJob(
            job.experts, job.seed, job.config, job.overrides, arguments.template, arguments.questions
        ): None
        for job in jobs
    }
    kept = {}
    for done, prompts in pool.run(keep_prompts, list(wanted)):
        kept[done.experts, done.seed] = prompts
        print(f"{len(kept)} of {len(wanted)} pools are there", file=sys.stderr, flush=True)
    return [
        replace(job, prompts=kept[job.experts, job.seed][job.arm.prompts])
        for job in jobs
        if (job.experts, job.seed) in kept
    ]


def write_report(out: Path) -> None:
    """Make the table of the recorded lines alone."""
    rows = read_rows(out)
    if not measured(rows):
        raise InputError(f"{out}: no run that worked, nothing to report. Run without --report first.")
    text = selection_text(rows, [arm.name for arm in ARMS], VARIANTS)
    if out.resolve() == OUT:
        replace_section(DOCUMENT, SECTION, text)
        print("report:", DOCUMENT)
    else:
        print(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--arms", nargs="+", choices=names, metavar="NAME", help=f"of: {'; '.join(names)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--template", default=TEMPLATE, help="of all questions, with slots for the base")
    parser.add_argument("--questions", type=int, default=900, help="to write (default %(default)s)")
    parser.add_argument("--queries", type=int, help="of each task at most, to try things out (default all)")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="in every run, such as device=cuda",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each, over all GPUs")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; return 0, 1 if a run failed, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    return run_and_report(
        lambda: run_missing(arguments), lambda: write_report(arguments.out), only_report=arguments.report
    )


if __name__ == "__main__":
    sys.exit(main())
