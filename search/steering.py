"""What a search steers by: prompts, what the experts say on them, and two evaluators, one for the end.

Knows the order of these steps, which adapters' prompts are too weak, and what the trace should say of it; not
optimisers, the clock or the configuration.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.evaluate import PopulationEvaluator, Scoring
from search.experts import expert_signals
from search.finalists import Finalist, make_references, stack_coefficients
from search.groups import Groups
from search.loop import Scores
from search.parts import Parts
from search.prompts import PromptRequest, PromptSet, write_prompts
from search.space import FloatArray, Space, make_space
from search.trace import TraceWriter

WEAK_RANGE = 0.5, 1.5
"""Bounds of a weak adapter's coefficients, times the uniform merge's 1 / n_adapters."""


@dataclass(frozen=True, slots=True, eq=False)
class WrittenPrompts:
    """All prompts of a run, in two disjoint sets."""

    searched: PromptSet
    """What the search scores candidates on."""
    unseen: PromptSet
    """Kept for the finalists."""


@dataclass(frozen=True, slots=True, eq=False)
class Steering:
    """What candidates are measured by."""

    space: Space
    searched: PopulationEvaluator
    unseen: PopulationEvaluator
    weak: tuple[str, ...]
    """Names of adapters whose prompts are too weak to steer by."""
    references: tuple[Finalist, ...]
    """Base, uniform merge and every single expert."""
    reference_scores: Scores
    """Of base and uniform merge, on the searched prompts."""
    searched_candidate_s: float
    """Seconds that one candidate takes on the searched prompts."""
    unseen_candidate_s: float
    """Seconds that one candidate takes on the unseen prompts."""

    @property
    def back_offs(self) -> list[dict[str, int]]:
        """Each time memory ran out while scoring."""
        return [*self.searched.oom_events, *self.unseen.oom_events]

    def start(self, value: float) -> FloatArray:
        """Return first coefficients (n_groups, n_adapters): `value`, but 1 / n_adapters for weak adapters."""
        weak = np.isfinite(self.space.low)
        return np.broadcast_to(np.where(weak, 1 / len(weak), value), self.space.shape).copy()


def prepare_prompts(
    parts: Parts,
    skeletons: Sequence[Sequence[str]],
    request: PromptRequest,
    n_searched: int,
    trace: TraceWriter,
) -> WrittenPrompts:
    """Write prompts, record them and split off those that the search does not see.

    Args:
        skeletons: (n_adapters,) each adapter's own skeletons.
        n_searched: prompts an adapter to search on; the rest of the request is unseen.
    """
    started_s = time.monotonic()
    prompts = write_prompts(
        parts.model, parts.base.tokenizer, parts.stacked, parts.groups, skeletons, request
    )
    written = WrittenPrompts(*prompts.split(n_searched))
    trace.event(
        "prompts",
        sha256=prompts.sha256,
        searched=_describe_prompts(written.searched, parts.names),
        unseen=_describe_prompts(written.unseen, parts.names),
        seconds=time.monotonic() - started_s,
    )
    return written


def _describe_prompts(prompts: PromptSet, names: Sequence[str]) -> list[dict[str, object]]:
    rows = zip(
        prompts.expert.tolist(),
        prompts.texts,
        prompts.ids,
        prompts.scored,
        prompts.from_skeleton,
        strict=True,
    )
    return [
        {"expert": names[expert], "text": text, "ids": ids, "scored": scored, "from_skeleton": from_skeleton}
        for expert, text, ids, scored, from_skeleton in rows
    ]


def prepare_steering(
    parts: Parts, prompts: WrittenPrompts, scoring: Scoring, weak_signal_nats: float, trace: TraceWriter
) -> Steering:
    """Take the experts' signals, confine weak adapters, and score base and uniform merge.

    Args:
        weak_signal_nats: an adapter that differs less from the base is confined to WEAK_RANGE / n_adapters.
    """
    started_s = time.monotonic()
    both = prompts.searched, prompts.unseen
    budget = scoring.tokens_per_forward
    signals = [
        expert_signals(parts.model, parts.stacked, parts.groups, part, tokens_per_forward=budget)
        for part in both
    ]
    peak_kl = signals[0].peak_kl
    is_weak = ~(peak_kl >= weak_signal_nats)  # NaN is weak too
    space = confine_weak(parts.groups, is_weak)
    weak = tuple(name for name, flag in zip(parts.names, is_weak, strict=True) if flag)
    trace.event(
        "signals",
        peak_kl_nats=peak_kl,
        peak_kl_nats_unseen=signals[1].peak_kl,
        weak_signal_nats=weak_signal_nats,
        weak=weak,
        low=space.low,
        high=space.high,
        seconds=time.monotonic() - started_s,
    )
    _warn_of_weak_prompts(parts.names, peak_kl, is_weak, weak_signal_nats)
    searched, unseen = (
        PopulationEvaluator(parts.model, parts.stacked, space, part, its_signals, scoring)
        for part, its_signals in zip(both, signals, strict=True)
    )
    references = make_references(parts.shape[0], parts.names)
    scores, searched_candidate_s = _score_references(searched, references[:2], trace)
    unseen_candidate_s = searched_candidate_s * prompts.unseen.n_tokens / prompts.searched.n_tokens
    return Steering(
        space, searched, unseen, weak, references, scores, searched_candidate_s, unseen_candidate_s
    )


def confine_weak(groups: Groups, is_weak: NDArray[np.bool_]) -> Space:
    """Return the search space: weak adapters (n_adapters,) stay near the uniform merge, others are free."""
    n_adapters = len(is_weak)
    low, high = (
        np.where(is_weak, factor / n_adapters, free)
        for factor, free in zip(WEAK_RANGE, (-np.inf, np.inf), strict=True)
    )
    return make_space(groups, n_adapters, low=low, high=high)


def _warn_of_weak_prompts(
    names: Sequence[str], peak_kl: FloatArray, is_weak: NDArray[np.bool_], weak_signal_nats: float
) -> None:
    weak = [f"{names[index]} ({peak_kl[index]:.3f})" for index in np.flatnonzero(is_weak).tolist()]
    if weak:
        logging.getLogger(__name__).warning(
            "WEAK SIGNAL: nowhere in their own prompts do %d of %d adapters differ from the base by %g nats: "
            "%s. Their coefficients stay near the uniform merge. Give them `skeletons:` in the config.",
            len(weak),
            len(names),
            weak_signal_nats,
            ", ".join(weak),
        )


def _score_references(
    evaluator: PopulationEvaluator, references: Sequence[Finalist], trace: TraceWriter
) -> tuple[Scores, float]:
    """Score and record references; return also the seconds that each took."""
    started_s = time.monotonic()
    scores = evaluator.score(stack_coefficients(references))
    seconds = time.monotonic() - started_s
    trace.event(
        "references",
        names=[reference.name for reference in references],
        losses=scores.losses,
        per_expert=scores.per_expert,
        base_per_expert=evaluator.base_per_expert,
        seconds=seconds,
    )
    return scores, seconds / len(references)
