"""End a run on SIGINT or SIGTERM with what it has found, and never in the middle of a change to the model.

Knows signals and seconds; not what is interrupted.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, Self

GRACE_S = 2.0
"""What is under way may still finish when it does so in this many seconds."""
_SIGNALS = signal.SIGINT, signal.SIGTERM
_NOTICE = b"\ninterrupted: the best so far is merged now; again to stop at once\n"


class Interrupted(Exception):  # noqa: N818 (a request, not an error)
    """Raised by `Interruption.check` where work can be dropped safely."""


class Interruption:
    """Handles SIGINT and SIGTERM while it is entered, in the main thread; elsewhere it does nothing.

    At first either raises KeyboardInterrupt at once. From `defer` on the first only asks to end, and the
    second raises.

    Example:
        with Interruption() as interruption:
            prepare()
            interruption.defer()
            while not interruption.requested:
                step(checkpoint=interruption.check)
    """

    def __init__(self) -> None:
        self._defers = False
        self._requested_s: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """Have the next signal ask instead of raise."""
        self._defers = True

    @property
    def requested(self) -> bool:
        """Whether somebody has asked to end."""
        return self._requested_s is not None

    def check(self) -> None:
        """Raise `Interrupted` when the grace after a request is over; call it where dropping work is safe."""
        if self._requested_s is not None and time.monotonic() - self._requested_s > GRACE_S:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._defers or self._requested_s is not None:
            raise KeyboardInterrupt
        self._requested_s = time.monotonic()
        with suppress(OSError):  # whoever read it may be gone, too
            os.write(2, _NOTICE)  # not logging, whose lock the interrupted code may hold
