"""The deadline of a run: how much time is left, once what must still happen has its share.

Knows seconds and names of reserves, not what they are spent on. Pure standard library.
"""

import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

SPARE_SHARE = 0.05
"""Of a time box, what no phase plans with: estimates err."""
LONGEST_START_S = 600.0
"""A process that says it is older than this is not believed: some containers tell the machine's age."""
PROCESS_END_S = 1.5
"""What a process takes to end, about, which is not planned with either."""


class OutOfTime(Exception):  # noqa: N818 (a limit, not an error)
    """Raised by `TimeBox.check` where work can be dropped safely, once the rest of the box is promised."""


def seconds_of_process() -> float:
    """Return how long this process has lived; where the system does not tell, the CPU seconds it has used."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, ValueError, AttributeError, IndexError):
        return time.process_time()


class TimeBox:
    """A wall-clock limit with named reserves for what must still follow.

    Example:
        box = TimeBox(1200)
        box.reserve("finalists", 40)
        while box.fits(1.2 * longest_step_s): ...
        box.release("finalists")
    """

    def __init__(
        self,
        limit_s: float,
        *,
        started_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock, or take the reading of `clock` at which it was started."""
        if math.isnan(limit_s) or limit_s <= 0:
            raise ValueError(f"a time box of {limit_s} s, expected more than 0")
        self._limit_s = limit_s
        self._clock = clock
        self._started_s = clock() if started_s is None else started_s
        self._reserves: dict[str, float] = {}

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started_s

    @property
    def limit_s(self) -> float:
        """Seconds of the whole box."""
        return self._limit_s

    @property
    def reserves(self) -> dict[str, float]:
        """Seconds that are kept, by name."""
        return dict(self._reserves)

    def left_s(self, optional: Collection[str] = ()) -> float:
        """Seconds that are neither spent nor reserved; below 0 once the promise is broken.

        Args:
            optional: names of reserves that do not count.
        """
        kept_s = sum(seconds for name, seconds in self._reserves.items() if name not in optional)
        return self._limit_s - self.elapsed_s() - kept_s

    def reserve(self, name: str, seconds: float) -> None:
        """Keep seconds for a later phase; the same name again replaces its reserve."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"reserve {name!r} of {seconds} s, expected a finite number, 0 or more")
        self._reserves[name] = seconds

    def release(self, name: str) -> None:
        """Give a reserve back, when its phase begins."""
        if name not in self._reserves:
            raise ValueError(f"no reserve {name!r} to release; reserved: {sorted(self._reserves)}")
        del self._reserves[name]

    def fits(self, step_s: float) -> bool:
        """Whether a step of this length ends in time."""
        return step_s <= self.left_s()

    def check(self, optional: Collection[str] = ()) -> None:
        """Raise `OutOfTime` if nothing is left but what is reserved, `optional` reserves aside."""
        if self.left_s(optional) < 0:
            raise OutOfTime
