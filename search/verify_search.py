"""Whether a recorded search is the one that its seed and its losses make, and its winner among what it found.

Knows stages, optimisers and the trace; not models, prompts or files. A recorded generation is not scored
again: its losses are told to a new optimiser, which must then ask for the next recorded genomes.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.checks import Check, compare, tell_differences
from search.ending import Pace, refine_best
from search.errors import InputError
from search.finalists import make_candidates
from search.loop import Past, SearchTools
from search.planning import choose_optimizer, set_limits
from search.setup import Setup
from search.space import FloatArray
from search.stages import Found, StagedSearch, run_stages
from search.steering import Steering
from search.timebox import TimeBox
from search.trace import Trace, TraceWriter
from search.verify_record import RunRecord


@dataclass(frozen=True, slots=True)
class Terms:
    """How closely numbers are to come out again."""

    tolerance: float
    """Largest absolute difference; 0 for bit for bit."""
    why: str

    @property
    def is_exact(self) -> bool:
        """Whether every bit is to come out again."""
        return self.tolerance == 0


def is_near(recorded: Any, found: Any, terms: Terms) -> bool:
    """Whether values are equal, or numbers within the terms; null is NaN, and nothing is near no record."""
    if recorded is None or (isinstance(recorded, list) and isinstance(next(iter(recorded), ""), str)):
        return bool(recorded == found)
    one, other = np.array(recorded, dtype=np.float64), np.array(found, dtype=np.float64)
    return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=terms.tolerance, equal_nan=True)


def check_search(
    setup: Setup, steering: Steering, record: RunRecord, terms: Terms, trace: TraceWriter, *, refine: bool
) -> list[Check]:
    """Replay the search, and make the winner's coefficients again.

    Args:
        trace: for what replaying writes.
        refine: take the recorded gradient steps again, where they gave the winner.
    """
    started = record.trace.last("search") or {}
    start = steering.confine(setup.first.start)
    differences = []
    if not is_near(started["start"], start, terms):
        differences += compare("start", started["start"], start.tolist())
    try:
        found = _replay(setup, steering, record, trace)
    except InputError as error:
        reason = str(error).split(". ")[0]
        return [Check("search", "differs" if terms.is_exact else "note", f"{reason} ({terms.why})")]
    differences += _compare_ends(record, found, terms)
    fine = f"{found.evaluations} candidates in {found.generations} generations asked for again"
    tables = {finalist.name: finalist.coefficients for finalist in steering.references}
    tables |= {f.name: f.coefficients for f in make_candidates(found.archive, found.mean, None)}
    is_refined = (record.finalists or {}).get("winner") == "refined"
    if refine and is_refined and (refined := _refine(setup, steering, record, found, trace)) is not None:
        tables["refined"] = refined
    return [tell_differences("search", differences, fine), _check_winner_again(tables, record, terms)]


def _replay(setup: Setup, steering: Steering, record: RunRecord, trace: TraceWriter) -> Found:
    """Tell a new optimiser the recorded losses, and return what it then has found."""
    started, settings = record.trace.last("search") or {}, setup.config.search
    search = StagedSearch(
        stages=setup.plan(steering),
        choice=choose_optimizer(settings),
        limits=set_limits(settings),
        evaluator=steering.searched,
        search_s=0.0,
        past_of=lambda stage: _recorded_stage(record.trace, stage),
        inject_every=0,
        improve=lambda mean: mean,
    )
    tools = SearchTools(trace=trace, timebox=TimeBox(math.inf))
    return run_stages(search, np.array(started["start"]), np.array(started["spread"]), tools)


def _recorded_stage(trace: Trace, stage: int) -> Past:
    """Return a stage as it ended, be it by an interrupt."""
    ends = [event for event in trace.events if (event["event"], event.get("index")) == ("stage_ended", stage)]
    own = [generation for generation in trace.generations if generation.stage == stage]
    return Past(own, ends[-1]["ended_by"] if ends else "interrupt")


def _compare_ends(record: RunRecord, found: Found, terms: Terms) -> list[str]:
    ended = record.trace.last("search_ended") or {}
    best = float(found.archive_losses.min(initial=math.inf))
    differences = compare("best_loss", ended["best_loss"], best if math.isfinite(best) else None)
    for key in ("generations", "evaluations", "ended_by"):
        differences += compare(key, ended[key], getattr(found, key))
    for key, value in (("mean", found.mean), ("spread", found.spread)):
        if not is_near(ended[key], value, terms):
            differences += compare(key, ended[key], value.tolist())
    return differences


def _refine(
    setup: Setup, steering: Steering, record: RunRecord, found: Found, trace: TraceWriter
) -> FloatArray | None:
    """Take as many gradient steps as were recorded."""
    if (refined := record.trace.ending("refined")) is None:
        return None
    rate, steps = setup.config.search.gradient.learning_rate, len(refined["losses"]) - 1
    space = setup.plan(steering)[-1].space
    return refine_best(steering, found, space, Pace(steps, rate, lambda: True), trace)


def _check_winner_again(tables: dict[str, FloatArray], record: RunRecord, terms: Terms) -> Check:
    winner = record.finalists["winner"] if record.finalists else ""
    if winner == "refined" and winner not in tables:
        return Check("winner again", "note", "its gradient steps are not taken again without --refine")
    table = tables.get(winner)
    differs = table is None or not is_near(record.winner, table, terms)
    return tell_differences(
        "winner again", ["other coefficients"] if differs else [], f"{winner}, {terms.why}"
    )
