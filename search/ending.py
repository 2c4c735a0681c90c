"""The last comparison of a run: on prompts that the search has not seen, or on what is known already.

Knows evaluators, finalists and the trace; not the time box, the optimiser or what becomes of the winner.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from search.finalists import (
    SINGLE,
    Judgement,
    choose_finalists,
    judge_finalists,
    make_candidates,
    stack_coefficients,
)
from search.gradient import Descent, adam_descend
from search.reserves import EndingCosts
from search.settings import SearchSettings
from search.space import FloatArray, Space
from search.stages import Found
from search.steering import Steering
from search.trace import TraceWriter

MERGE_TIMES = 2
"""The merge is written once by the run and once by its caller, who folds it into the base too."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a descent goes."""

    steps: int
    learning_rate: float
    go_on: Callable[[], bool]
    """Asked before each gradient: whether there is time for one more."""


def count_finalists(steering: Steering, n_archived: int) -> tuple[int, int]:
    """Return how many `judge_on_unseen` compares with an archive of this size; how many if time is short."""
    n_singles = sum(reference.name.startswith(SINGLE) for reference in steering.references)
    n_all = len(steering.references) + n_archived + 2  # and the distribution's mean, and a refined one
    return n_all, len(steering.references) - n_singles + 3


def measure_ending(
    steering: Steering, settings: SearchSettings, clock: Callable[[], float], merge_s: float, later_s: float
) -> EndingCosts:
    """Time a gradient, if any is asked for, and one finalist, by a clock.

    Args:
        merge_s: seconds that merging and writing take once.
        later_s: seconds that the caller needs after the run.
    """
    uniform, gradient = steering.references[1].coefficients, settings.gradient
    n_all, n_few = count_finalists(steering, settings.n_finalists)

    def seconds_of(step: Callable[[], object]) -> float:
        started_s = clock()
        step()
        return clock() - started_s

    n_timed = 2 if gradient.refine_steps or gradient.inject_every else 0  # the first may compile and allocate
    steps = [seconds_of(lambda: steering.searched.gradient(uniform)) for _ in range(n_timed)]
    return EndingCosts(
        candidate_s=seconds_of(lambda: steering.unseen.score(uniform[None])),
        n_finalists=n_all,
        n_few=n_few,
        gradient_s=min(steps, default=0.0),
        n_gradients=gradient.refine_steps + 1 if gradient.refine_steps else 0,
        merge_s=MERGE_TIMES * merge_s,
        later_s=later_s,
    )


def estimate_finalists_s(steering: Steering, n_archived: int) -> float:
    """Seconds that `judge_on_unseen` takes at most with an archive of this size."""
    n_candidates = n_archived + 2
    n_losses = n_candidates + len(steering.references)
    n_agreements = n_candidates + 2  # and the uniform merge, and a reference that wins
    return (n_losses + n_agreements) * steering.unseen_candidate_s


def descend(
    steering: Steering,
    start: FloatArray,
    steps: int,
    learning_rate: float,
    go_on: Callable[[], bool] = lambda: True,
) -> tuple[Descent, int]:
    """Take steps down the gradient from coefficients (n_groups, n_adapters) on the searched prompts.

    The start is visited too: `steps` + 1 gradients, fewer where `go_on` says so before one.

    Returns:
        The descent, and the tokens that it took.
    """
    n_tokens = 0

    def gradient_of(coefficients: FloatArray) -> tuple[float, FloatArray]:
        nonlocal n_tokens
        scores = steering.searched.gradient(coefficients)
        n_tokens += scores.n_tokens
        return scores.loss, scores.gradient

    bounds = steering.bounds
    descent = adam_descend(
        gradient_of,
        start,
        steps=steps + 1,
        learning_rate=learning_rate,
        low=bounds.low,
        high=bounds.high,
        go_on=go_on,
    )
    return descent, n_tokens


def refine_best(
    steering: Steering, found: Found, space: Space, pace: Pace, trace: TraceWriter
) -> FloatArray | None:
    """Descend from the archive's best, back into the space, and record it.

    Args:
        space: of the last stage: its signs, top k and structure hold for the result.

    Returns:
        (n_groups, n_adapters); None without an archive, or where the pace allows no gradient at all.
    """
    if not len(found.archive) or not pace.go_on():
        return None
    started_s = time.monotonic()
    descent, n_tokens = descend(steering, found.archive[0], pace.steps, pace.learning_rate, pace.go_on)
    seconds = time.monotonic() - started_s
    trace.event("refined", steps=pace.steps, losses=descent.losses, n_tokens=n_tokens, seconds=seconds)
    genome, _ = space.encode(descent.best, np.ones(space.shape))
    refined: FloatArray = space.to_coefficients(genome[None])[0]
    return refined


def judge_on_unseen(
    steering: Steering,
    found: Found,
    refined: FloatArray | None,
    trace: TraceWriter,
    n_most: int | None = None,
) -> Judgement:
    """Compare archive, distribution mean, refined best and all references on the unseen prompts.

    Args:
        n_most: how many there is time for, if not for all.
    """
    started_s = time.monotonic()
    finalists = [*steering.references, *make_candidates(found.archive, found.mean, refined)]
    finalists = choose_finalists(finalists, len(finalists) if n_most is None else n_most)
    scores = steering.unseen.score(stack_coefficients(finalists))
    judgement = judge_finalists(
        finalists, scores.losses, scores.per_expert, steering.bounds, steering.unseen.agreement
    )
    _record_judgement(judgement, "unseen", started_s, trace)
    return judgement


def judge_on_searched(steering: Steering, found: Found, trace: TraceWriter) -> Judgement:
    """Compare the archive's best, if there is one, with base, uniform, balanced and prior on searched ones.

    All of it is known already; nobody is asked for agreement.
    """
    started_s = time.monotonic()
    known = steering.reference_scores
    finalists = list(steering.references[: len(known.losses)])
    losses, per_expert = known.losses, known.per_expert
    if len(found.archive):
        finalists += make_candidates(found.archive[:1], found.mean, None)[:1]
        losses = np.concatenate([losses, found.archive_losses[:1]])
        per_expert = np.concatenate([per_expert, found.archive_per_expert[:1]])
    judgement = judge_finalists(finalists, losses, per_expert, steering.bounds)
    _record_judgement(judgement, "searched", started_s, trace)
    return judgement


def _record_judgement(judgement: Judgement, prompts: str, started_s: float, trace: TraceWriter) -> None:
    trace.event(
        "finalists",
        prompts=prompts,
        names=[finalist.name for finalist in judgement.finalists],
        losses=judgement.losses,
        per_expert=judgement.per_expert,
        agreement=[judgement.agreements.get(index) for index in range(len(judgement.finalists))],
        verdicts=judgement.verdicts,
        winner=judgement.winner.name,
        winner_coefficients=judgement.winner.coefficients,
        seconds=time.monotonic() - started_s,
    )
