"""One line on stderr that tells a waiting person how far the run is.

Knows tqdm and the numbers to show; not what a phase does.
"""

from contextlib import ExitStack
from typing import Any, Self, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from search.loop import Progress

LINE = "{desc}: {n_fmt}/{total_fmt} evaluations{postfix} [{elapsed}]"


class ProgressLine:
    """Phase, evaluations, best loss and seconds left; log messages go above the line.

    Example:
        with ProgressLine(max_evaluations=2000) as line:
            line.phase("search")
            line.show(progress)
    """

    def __init__(self, max_evaluations: int, file: TextIO | None = None) -> None:
        """Prepare a line; `file` is stderr when not given."""
        self._max_evaluations, self._file = max_evaluations, file
        self._undo = ExitStack()
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._undo.enter_context(logging_redirect_tqdm())
        self._bar = self._undo.enter_context(
            tqdm(total=self._max_evaluations, desc="start", bar_format=LINE, file=self._file)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def phase(self, name: str) -> None:
        """Show that a phase has begun."""
        self._bar.set_description_str(name)

    def show(self, progress: Progress) -> None:
        """Show where the search stands."""
        self._bar.n = progress.evaluations
        left_s = max(0.0, progress.left_s)
        self._bar.set_postfix_str(f"best loss {progress.best_loss:.4f}, {left_s:.0f} s left")
