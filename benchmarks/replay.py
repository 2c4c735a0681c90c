"""What a finished search would have returned had it been given less, rebuilt from its trace.

The optimiser is made anew, asked again and told the recorded losses, as a resumed run does it: no candidate
is scored again. Then its best is refined and the finalists are compared. Knows setups and traces; not which
limits are wanted, nor labels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from search.ending import Pace, judge_on_unseen, refine_best
from search.loop import CAUTION, Past, SearchTools
from search.planning import choose_optimizer, set_limits
from search.reserves import REFINE_SHARE
from search.resume import Record
from search.setup import Setup
from search.space import FloatArray
from search.stages import Found, StagedSearch, run_stages
from search.timebox import TimeBox
from search.trace import Trace, TraceWriter

NO_LIMIT_S = 1e6
CHOSEN, MEAN, BEST = "chosen", "mean", "best"
"""What the finalists' comparison picks, the centre of the distribution, and the archive's best."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a search ends, and with how many gradients its best is refined then."""

    n_generations: int
    """1 or more."""
    n_gradients: int

    def clocks(self, trace: Trace) -> dict[str, float]:
        """Return the seconds, tokens and evaluations of both."""
        one = _gradient_cost(trace)
        spent = {
            clock: reading + self.n_gradients * one[clock]
            for clock, reading in _search_clocks(trace, self.n_generations).items()
        }
        return {
            clock: round(value, 2) if clock == "seconds" else round(value) for clock, value in spent.items()
        }


def count_gradients(trace: Trace) -> int:
    """Return how many gradients the run refined its best with."""
    return len((trace.last("refined") or {"losses": []})["losses"])


def stop_by(trace: Trace, clock: str, at: float) -> Stop | None:
    """Return where the run would have stopped had a clock been allowed to read at most `at`.

    As a run does with its seconds: for as many gradients as the finished run took, as much is kept back as
    they take, or REFINE_SHARE of all if that is less; the search has the rest.

    Args:
        trace: of the finished run.
        clock: "seconds", "n_tokens" or "evaluations".
        at: its reading, since the search began.

    Returns:
        None where that is too little for a generation, or more than the finished search took.
    """
    n_most, one = count_gradients(trace), _gradient_cost(trace)[clock]
    search_at = at - min(CAUTION * n_most * one, REFINE_SHARE * at)
    readings = [_search_clocks(trace, n)[clock] for n in range(1, len(trace.generations) + 1)]
    n_generations = int(np.searchsorted(readings, search_at, side="right"))
    if not n_generations or search_at > readings[-1]:
        return None
    n_in_time = int((at - readings[n_generations - 1]) / one) if one else n_most
    return Stop(n_generations, min(n_most, n_in_time))


def _search_clocks(trace: Trace, n_generations: int) -> dict[str, float]:
    past = trace.generations[:n_generations]
    return {
        "seconds": past[-1].elapsed_s - (trace.last("search") or {})["elapsed_s"],
        "n_tokens": sum(generation.n_tokens for generation in past),
        "evaluations": past[-1].evaluations,
    }


def _gradient_cost(trace: Trace) -> dict[str, float]:
    """Return what one gradient of the refinement takes of each clock."""
    refined = trace.last("refined") or {"seconds": 0.0, "n_tokens": 0}
    n_gradients = max(1, count_gradients(trace))
    each = {clock: refined[clock] / n_gradients for clock in ("seconds", "n_tokens")}
    return {**each, "evaluations": 0}


class Replay:
    """A finished search, to be looked at at any of its generations."""

    def __init__(self, setup: Setup, trace: Trace, folder: Path) -> None:
        """Take the recorded prompts, and ask the experts again what they say on them.

        Args:
            setup: of the configuration that the trace was written under.
            folder: gets what is written on the way.
        """
        self._setup, self._trace, self._folder = setup, trace, folder
        with TraceWriter(folder / "steering.jsonl") as writer:
            writer.header({})
            prompts = setup.write_prompts(writer, Record(trace))
            self._steering = setup.steer(prompts, writer, Record(trace))

    def tables_at(self, stop: Stop) -> dict[str, FloatArray]:
        """Return CHOSEN, MEAN and, where a loss was finite, BEST, (n_groups, n_adapters) each.

        MEAN and BEST are the search's, before the refinement.
        """
        steering, rate = self._steering, self._setup.config.search.gradient.learning_rate
        pace = Pace(stop.n_gradients - 1, rate, lambda: stop.n_gradients > 0)
        with TraceWriter(self._folder / "replay.jsonl") as writer:
            writer.header({})
            found = self._found_after(stop.n_generations, writer)
            refined = refine_best(steering, found, self._setup.plan(steering)[-1].space, pace, writer)
            chosen = judge_on_unseen(steering, found, refined, writer).winner.coefficients
        tables = {CHOSEN: chosen, MEAN: found.mean}
        return {**tables, BEST: found.archive[0]} if len(found.archive) else tables

    def _found_after(self, n_generations: int, writer: TraceWriter) -> Found:
        began = self._trace.last("search") or {}
        past = self._trace.generations[:n_generations]

        def past_of(stage: int) -> Past:
            own = [generation for generation in past if generation.stage == stage]
            return Past(own, "evaluations" if stage < past[-1].stage else "interrupt")

        settings = self._setup.config.search
        search = StagedSearch(
            stages=self._setup.plan(self._steering),
            choice=choose_optimizer(settings),
            limits=set_limits(settings),
            evaluator=self._steering.searched,
            search_s=NO_LIMIT_S,
            past_of=past_of,
            inject_every=0,  # what was put in is in the trace
            improve=lambda mean: mean,
        )
        tools = SearchTools(trace=writer, timebox=TimeBox(NO_LIMIT_S))
        return run_stages(search, np.array(began["start"]), np.array(began["spread"]), tools)
