"""What must still follow a search, as reserves of its time box that follow the machine's pace.

Knows seconds and the order of what is given up first; not what is measured, scored or merged. Measured before
the search and once more shortly before its end; in between, and after, what the same work takes now over what
it took then scales all of it.
"""

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from search.loop import CAUTION
from search.timebox import TimeBox

OPTIONAL = ("refine", "finalists", "later stages")
"""Reserves that are given up before the answers are: without them the run is worse, not late."""
REFINE_SHARE = 0.5
"""Of the time that is left for search and refinement, the most that is kept for the latter."""
FINALISTS_SHARE = 0.25
"""Of the time left after all else, the most that is kept for finalists beyond the few."""
AGAIN_SHARE, AGAIN_GENERATIONS = 0.15, 3
"""What is left of the search, as a share of it and in generations, when all is measured again."""
MEASURING_SHARE = 0.1
"""Of the time box, the most that is spent on measuring."""
STEADY = 1.1
"""A pace up to this is taken for 1: seconds of the same work differ, and the time box has some to spare."""
N_RECENT = 3
"""Generations, or gradients, whose middle one is the present pace: one alone may be slow for nothing."""
PROMPT_AGREEMENTS = 3
"""Merges whose agreement is counted at the end, usually at most: uniform, winner, one that collapsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndingCosts:
    """Seconds of what follows a search."""

    candidate_s: float
    """One finalist, or its agreement, on the unseen prompts."""
    n_finalists: int
    """All of them."""
    n_few: int
    """Those that are compared when time is short."""
    gradient_s: float
    n_gradients: int
    """Of the refinement; 0 for none."""
    merge_s: float
    later_s: float
    """What the caller needs after the run."""

    def finalists_s(self, n: int) -> float:
        """Seconds that comparing so many takes."""
        return (n + PROMPT_AGREEMENTS) * self.candidate_s


class Reserves:
    """Keeps what follows the search in the box, at the pace that the machine has now."""

    def __init__(self, box: TimeBox, measure: Callable[[], EndingCosts], known_after_s: float = 0.0) -> None:
        """Measure, and reserve.

        Args:
            known_after_s: what of measuring was done before, and will have to be done again with the rest.
        """
        self._box, self._measure = box, measure
        self._recent: deque[float] = deque(maxlen=N_RECENT)
        self._again = self._over = False
        self._began_s: float | None = None
        self._fastest, self._measuring_s, self._all_measuring_s = math.inf, 0.0, 0.0
        self._measured_at_s = 0.0
        """By the token of a generation, when all was last measured; 0 if none was yet."""
        self.pace = 1.0
        """Seconds that work takes now over those when it was measured; 1 or more."""
        self.costs = self._measure_now()
        self._measuring_s += known_after_s
        box.reserve("merge", self.costs.merge_s)
        box.reserve("later", self.costs.later_s)
        left_s = max(0.0, box.left_s())
        self._most_finalists_s, self._may_end = FINALISTS_SHARE * left_s, self.few_s() <= left_s / 2
        self._most_refine_s = REFINE_SHARE * max(0.0, left_s - self._most_s())
        self._reserve()
        self._search_s = max(0.0, box.left_s())

    def see_generation(self, seconds: float, n_tokens: int, longest_s: float) -> None:
        """Follow the pace of the search, and measure all again when it is nearly over."""
        self._recent.append(seconds / max(1, n_tokens))
        self._fastest = min(self._fastest, self._recent[-1])
        self._follow(self._recent_s() / self._fastest)
        near_s = max(AGAIN_SHARE * self._search_s, AGAIN_GENERATIONS * longest_s + self._measuring_s)
        if self._box.left_s() < near_s and self._may_measure():
            self.costs = self._measure_now()
            self._reserve()
            self._again = self._box.left_s() < near_s

    def _may_measure(self) -> bool:
        """Say whether to measure once more: near the end once, and before a slow spell alone ends the search.

        Reserves that are scaled by the pace, or were measured at a slower one, may be larger than is needed;
        to know is then worth the time of some gradients.
        """
        box, over = self._box, STEADY * self._recent_s() < self._measured_at_s
        pace = self._recent_s() / self._measured_at_s if over else self.pace
        needed_s = pace * self._measuring_s
        if pace == 1:
            return not self._again and needed_s < box.left_s()
        spent_s = self._all_measuring_s + needed_s
        return needed_s < box.left_s(OPTIONAL) and spent_s < MEASURING_SHARE * box.limit_s

    def begin_ending(self) -> None:
        """Give back what was kept for refinement and finalists: they begin.

        Where time is short and the machine is not as it was when all was measured, that is done again first.
        """
        self._over = True
        for name in ("refine", "finalists"):
            self._box.release(name)
        all_s = self._most_s() + self.pace * self.costs.n_gradients * self.costs.gradient_s
        left_s = self._box.left_s()
        is_stale = self.pace > 1 or not self._again
        if is_stale and self.pace * self._measuring_s + self.few_s() < left_s < 2 * all_s:
            self.costs = self._measure_now()
            self._reserve()
        self._recent.clear()
        self._recent.append(self.pace * self.costs.gradient_s)

    def may_compare(self) -> bool:
        """Whether there is time for a few finalists."""
        return self._box.fits(self.few_s())

    def n_affordable(self) -> int:
        """How many finalists there is time for."""
        each_s = self.pace * self.costs.candidate_s
        if each_s <= 0:
            return self.costs.n_finalists
        return max(0, int(max(0.0, self._box.left_s()) / each_s) - PROMPT_AGREEMENTS)

    def may_refine(self) -> bool:
        """Whether one more gradient fits before the finalists; timed from call to call."""
        now_s = self._box.elapsed_s()
        if self._began_s is not None and self.costs.gradient_s > 0:
            self._recent.append(now_s - self._began_s)
            self._follow(self._recent_s() / self.costs.gradient_s)
        self._began_s = now_s
        return self._box.fits(self._most_s() + CAUTION * self.pace * self.costs.gradient_s)

    def few_s(self) -> float:
        """Seconds that comparing a few finalists takes now."""
        return self.pace * self.costs.finalists_s(self.costs.n_few)

    def _most_s(self) -> float:
        """Seconds of all finalists, or of as many as were kept time for."""
        return min(
            self.pace * self.costs.finalists_s(self.costs.n_finalists),
            max(self.few_s(), self._most_finalists_s),
        )

    def _measure_now(self) -> EndingCosts:
        started_s = self._box.elapsed_s()
        costs = self._measure()
        self._measuring_s = self._box.elapsed_s() - started_s
        self._all_measuring_s += self._measuring_s
        self._measured_at_s = self._recent_s() if self._recent else 0.0
        self._recent.clear()
        self._fastest, self.pace = math.inf, 1.0
        logging.getLogger(__name__).info(
            "measured: %.2f s a finalist, %.2f s a gradient, %.1f s merge, %.1f s answers (in %.1f s)",
            costs.candidate_s,
            costs.gradient_s,
            costs.merge_s,
            costs.later_s,
            self._measuring_s,
        )
        return costs

    def _recent_s(self) -> float:
        """Return the middle one of the recent seconds; of two the shorter."""
        return sorted(self._recent)[(len(self._recent) - 1) // 2]

    def _follow(self, pace: float) -> None:
        self.pace = pace if pace > STEADY else 1.0
        self._reserve()

    def _reserve(self) -> None:
        costs, box = self.costs, self._box
        box.reserve("merge", self.pace * costs.merge_s)
        box.reserve("later", self.pace * costs.later_s)
        if not self._over:
            refine_s = self.pace * costs.n_gradients * costs.gradient_s
            box.reserve("finalists", self._most_s() if self._may_end else 0.0)  # none, where not even few fit
            box.reserve("refine", min(refine_s, self._most_refine_s) if self._may_end else 0.0)
