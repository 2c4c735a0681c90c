"""Verify a run from its folder: `python -m search verify RUN`.

Knows the order of the checks and what one needs of those before it; not how any of them is made.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from search.checks import Check
from search.plugin import load_objective
from search.setup import load_setup
from search.verify_answers import check_answers
from search.verify_inputs import check_inputs, check_merge, check_setup, restore_config
from search.verify_record import RunRecord, check_record, read_run
from search.verify_scores import check_scores


def verify_run(folder: Path, *, refine: bool = False) -> Iterator[Check]:
    """Yield what is found, a line at a time, cheap things first.

    Inputs are hashed, the search is replayed from its recorded losses, the winner is scored and merged again.
    Where configuration or weights are not those of the run, nothing is scored.

    Args:
        folder: that `python -m search run` or llm_merging/main.py left behind: trace.jsonl, coefficients.json
            and, if they are there, the adapter and what was answered.
        refine: take the recorded gradient steps again, too, where they gave the winner.

    Raises:
        InputError: for a folder that holds no finished run.
    """
    record = read_run(folder)
    checks = check_record(record)
    yield from checks
    yield from check_answers(record)
    if any(check.name == "config" and check.mark == "differs" for check in checks):
        yield Check("loss", "note", "nothing is scored: the configuration is not the one that ran")
        return
    config = restore_config(record)
    inputs = check_inputs(config, record.header)
    yield from inputs
    if any(check.mark == "differs" for check in inputs):
        yield Check("loss", "note", "nothing is scored: the inputs are not those of the run")
        return
    with _threads_of(record):
        setup = load_setup(config, objective=load_objective(record.header["objective"]))
        made = check_setup(setup, record)
        yield from made
        if any(check.mark == "differs" for check in made):
            yield Check("loss", "note", "nothing is scored: the inputs make another search than the run's")
            return
        yield from check_merge(setup, record)
        yield from check_scores(setup, record, refine=refine)


@contextmanager
def _threads_of(record: RunRecord) -> Iterator[None]:
    """Compute with as many threads as the run did: a CPU's sums depend on it."""
    before = torch.get_num_threads()
    cpu: Mapping[str, Any] = record.header.get("cpu") or {}
    torch.set_num_threads(cpu.get("threads", before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conclude(folder: Path, checks: list[Check]) -> dict[str, Any]:
    """Return what a program wants to know of a verification."""
    named = {mark: [c.name for c in checks if c.mark == mark] for mark in ("differs", "note")}
    return {"run": str(folder), "ok": not named["differs"], "checks": len(checks), **named}
