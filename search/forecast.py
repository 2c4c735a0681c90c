"""How long a search will take, from a few timings: seconds of a generation, and how many fit the time box.

Pure arithmetic: knows seconds, tokens and counts; not what was timed, nor whether the answer is good news.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from search.loop import CAUTION, EndedBy
from search.racing import Rung
from search.timebox import PROCESS_END_S, SPARE_SHARE


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement."""

    n_candidates: int
    """Scored together."""
    n_tokens: int
    """Of the prompts, hence of each candidate."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What scoring takes: fixed_s + n_candidates * (candidate_s + n_tokens * token_s)."""

    fixed_s: float
    candidate_s: float
    token_s: float

    def seconds(self, n_candidates: int, n_tokens: float) -> float:
        """Seconds to score so many candidates on prompts of so many tokens."""
        return self.fixed_s + n_candidates * (self.candidate_s + n_tokens * self.token_s)


def fit_cost(one: Timing, many: Timing, more: Timing) -> Cost:
    """Solve for what a token, a candidate and a call take; noise cannot make any of them negative.

    Args:
        one: a single candidate.
        many: several candidates, on the same prompts.
        more: as many candidates as in `many`, on more prompts; or `many` itself, where there are no more:
            then all of it is laid to the tokens, which is the most that more prompts can take.
    """
    most = more.seconds / (more.n_candidates * more.n_tokens)
    n_further = more.n_candidates * (more.n_tokens - many.n_tokens)
    token_s = min(most, max(0.0, more.seconds - many.seconds) / n_further) if n_further else most
    each_s = max(0.0, many.seconds - one.seconds) / max(1, many.n_candidates - one.n_candidates)
    candidate_s = max(0.0, each_s - many.n_tokens * token_s)
    spent_s = many.n_candidates * (candidate_s + many.n_tokens * token_s)
    return Cost(max(0.0, many.seconds - spent_s), candidate_s, token_s)


def race_seconds(cost: Cost, rungs: Sequence[Rung], tokens_per_block: float) -> float:
    """Seconds of a generation that is raced over these rungs."""
    seen = [0, *(rung.n_blocks for rung in rungs)]
    return sum(
        cost.seconds(rung.n_candidates, (rung.n_blocks - before) * tokens_per_block)
        for rung, before in zip(rungs, seen, strict=False)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """Seconds of each phase of a run."""

    time_box_s: float
    caller_s: float
    """Of the time box, for what is before and after the run."""
    load_s: float
    prompts_s: float
    signals_s: float
    """With the references' scores."""
    rehearsal_s: float
    generation_s: float
    """With the gradient steps that are taken between generations."""
    finalists_s: float
    """With refining the best."""
    merge_s: float

    @property
    def fixed_s(self) -> float:
        """What all but the search takes, what is left unplanned included."""
        return self._phases_s + SPARE_SHARE * self.time_box_s + PROCESS_END_S

    @property
    def _phases_s(self) -> float:
        before_s = self.caller_s + self.load_s + self.prompts_s + self.signals_s + self.rehearsal_s
        return before_s + self.finalists_s + self.merge_s

    @property
    def search_s(self) -> float:
        """What is left for the search; below 0 where the rest does not fit."""
        return self.time_box_s - self.fixed_s

    def box_for(self, n_generations: int) -> int:
        """Return the smallest time box, in whole seconds, with room for so many generations."""
        search_s = (n_generations - 1 + CAUTION) * self.generation_s
        return math.ceil((self._phases_s + PROCESS_END_S + search_s) / (1 - SPARE_SHARE))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """Where a search is to end, beside the clock."""

    n_candidates: int
    max_evaluations: int
    shares: tuple[float, ...]
    """(n_stages,) of evaluations and seconds, relative to each other."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a search will come to."""

    generations: int
    """Of all stages; the very first always runs, whether it fits or not."""
    evaluations: int
    seconds: float
    ended_by: EndedBy


def forecast_search(times: Timetable, plan: SearchPlan) -> Forecast:
    """Go through the stages as the search does: none goes on past its share of evaluations or time."""
    total, spent = sum(plan.shares), 0.0
    generations, by_clock = 0, False
    for share in plan.shares:
        spent += share
        n_left = round(plan.max_evaluations * spent / total) - generations * plan.n_candidates
        left_s = times.search_s * spent / total - generations * times.generation_s
        least = 0 if generations else 1
        n_planned = max(least, n_left // plan.n_candidates)
        n_in_time = max(least, math.floor(left_s / times.generation_s - CAUTION) + 1)
        by_clock |= n_in_time < n_planned
        generations += min(n_planned, n_in_time)
    return Forecast(
        generations,
        generations * plan.n_candidates,
        generations * times.generation_s,
        "clock" if by_clock else "evaluations",
    )
