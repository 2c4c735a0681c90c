"""Tell a waiting person on stderr how far the run is.

Knows tqdm, what kinds of streams there are and the numbers to show; not what a phase does. On a terminal and
in a notebook one line is written over and over, as text (no widgets are needed for it); in a file, lines.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Self, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from search.loop import Progress

LINE = "{desc}: {n_fmt}/{total_fmt} evaluations{postfix} [{elapsed}]"
QUIET_S, QUIET_SHARE = 10.0, 0.1
"""In a file, no further line before so many seconds and this share of the evaluations have passed."""


class ProgressLine:
    """Phase, evaluations, best loss and seconds left; log messages go above the line.

    Example:
        with ProgressLine(max_evaluations=2000) as line:
            line.phase("search")
            line.show(progress)
    """

    def __init__(
        self,
        max_evaluations: int,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a line; `file` is stderr when not given."""
        self._max_evaluations, self._file, self._clock = max_evaluations, file, clock
        self._undo = ExitStack()
        self._bar: Any = None
        self._phase = "start"
        self._waiting: Progress | None = None
        self._started_s = self._shown_s = clock()
        self._n_shown = 0

    def __enter__(self) -> Self:
        self._started_s = self._shown_s = self._clock()
        self._file = self._file or sys.stderr
        if can_rewrite(self._file):
            self._undo.enter_context(logging_redirect_tqdm())
            self._bar = self._undo.enter_context(
                tqdm(total=self._max_evaluations, desc=self._phase, bar_format=LINE, file=self._file)
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._write_waiting()
        self._undo.close()

    def phase(self, name: str) -> None:
        """Show that a phase has begun."""
        if self._bar is None:
            self._write_waiting()
            self._write(f"{name}, {self._elapsed_s():.0f} s elapsed")
        else:
            self._bar.set_description_str(name)
        self._phase = name

    def show(self, progress: Progress) -> None:
        """Show where the search stands; it may have jumped."""
        if self._bar is None:
            self._waiting = progress
            n_new = abs(progress.evaluations - self._n_shown)
            is_time = self._clock() - self._shown_s >= QUIET_S
            if is_time and n_new >= QUIET_SHARE * self._max_evaluations:
                self._write_waiting()
        else:
            self._bar.n = progress.evaluations
            self._bar.set_postfix_str(_standing(progress))

    def _write_waiting(self) -> None:
        """Write the last progress, unless that was done."""
        if self._waiting is not None:
            progress, self._waiting = self._waiting, None
            self._n_shown = progress.evaluations
            count = f"{progress.evaluations}/{self._max_evaluations} evaluations"
            elapsed = f"{self._elapsed_s():.0f} s elapsed"
            self._write(f"{self._phase}: {count}, {_standing(progress)}, {elapsed}")

    def _write(self, line: str) -> None:
        self._shown_s = self._clock()
        with suppress(OSError):  # nobody reads it any more: the run matters more
            if self._file is not None:
                self._file.write(f"{line}\n")
                self._file.flush()

    def _elapsed_s(self) -> float:
        return self._clock() - self._started_s


def can_rewrite(stream: TextIO) -> bool:
    """Whether a carriage return lets what is written next replace the line: on terminals and in notebooks."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel.")


def _standing(progress: Progress) -> str:
    return f"best loss {progress.best_loss:.4f}, {max(0.0, progress.left_s):.0f} s left"
