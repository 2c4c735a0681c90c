"""Run what a benchmark wants and does not have, each in processes of its own, and record it as it ends.

Knows plans, cores and lines; not what a run is, nor what it measures.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.environment import describe_machine
from benchmarks.job import Outcome, Wanted, run_pinned, split_cores
from benchmarks.rows import Row, append_row, is_done, read_rows


def run_missing(
    arguments: argparse.Namespace,
    plan: Callable[[argparse.Namespace, Path], Sequence[Wanted]],
    identify: Callable[[Wanted, argparse.Namespace], dict[str, Any]],
    run: Callable[[Wanted, Path, set[int]], Outcome[Wanted]],
    format_row: Callable[[Row], str],
    was_run: Callable[[Row, Sequence[Row]], bool] = is_done,
) -> int:
    """Run what is not recorded yet and record it; return how many runs failed.

    Args:
        arguments: `jobs` at a time, `cores` of each, `out`, and what a plan is made of.
        plan: to all wanted runs, whose files go into a folder.
        identify: what a run's line starts with.
        run: as `run_pinned` takes it.
        format_row: a line for people.
        was_run: whether one of the lines is of this run.
    """
    core_sets = split_cores(sorted(os.sched_getaffinity(0)), arguments.jobs, arguments.cores)
    machine, rows, n_failed = describe_machine(), read_rows(arguments.out), 0
    with TemporaryDirectory() as name:
        identities = {job: identify(job, arguments) for job in plan(arguments, Path(name))}
        missing = [job for job, identity in identities.items() if not was_run(identity, rows)]
        print(f"{len(missing)} of {len(identities)} runs to do, {len(core_sets)} at a time", file=sys.stderr)
        for outcome in run_pinned(missing, core_sets, Path(name), run):
            failure = {"failure": outcome.failure} if outcome.failure else {}
            row = {**identities[outcome.job], **outcome.measures, **failure, **machine}
            append_row(arguments.out, row)
            print(format_row(row), flush=True)
            n_failed += bool(failure)
    return n_failed
