"""Record in a run's trace which queries were answered, into which files, and what the whole job took.

Knows files, their hashes and the trace; not queries, answers or models.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_merging.merging import Merges
from search.files import sha256_file
from search.memory import highest_peak, host_peak
from search.recorded import TRACE_FILE
from search.trace import TraceWriter


@dataclass(frozen=True, slots=True)
class Account:
    """What was answered."""

    files: Sequence[tuple[Path, Path, int]]
    """Query file, file of answers, rows."""
    cut: int
    """Generations that got fewer tokens, since time was short."""
    placeholders: int
    """Queries that no time was left for."""
    seconds: float
    """That answering took."""


def record_answers(method: Merges, account: Account, job_s: float) -> None:
    """Append the event `answered` to the trace of a method that writes one.

    Args:
        job_s: seconds since the process began.

    Raises:
        InputError: if it cannot be written.
    """
    path = method.output / TRACE_FILE
    if not path.is_file():
        return
    files = [
        {
            "queries": str(queries),
            "queries_sha256": sha256_file(queries),
            "answers": os.path.relpath(answers, method.output),
            "sha256": sha256_file(answers),
            "rows": rows,
        }
        for queries, answers, rows in account.files
    ]
    with TraceWriter(path, n_kept_bytes=path.stat().st_size) as trace:
        trace.event(
            "answered",
            files=files,
            choice_scoring="kit" if method.skip_first_choice_token else "full",
            cut=account.cut,
            placeholders=account.placeholders,
            seconds=account.seconds,
            job_s=job_s,
            peak_bytes=highest_peak(next(method.base_model.parameters()).device),
            host_peak_bytes=host_peak(),
        )
