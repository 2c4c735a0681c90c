"""What a search steers by: prompts, what the experts say on them, and two evaluators, one for the end.

Knows the order of these steps, which adapters' prompts are too weak, and what the trace says of it; not
optimisers, the clock or the configuration.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.errors import InputError
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import ExpertSignals, TokenBudget, default_token_budget, expert_signals, plan_budget
from search.finalists import SINGLE, Bounds, Finalist, make_references, stack_coefficients
from search.loop import Scores
from search.parts import Parts
from search.prompts import PromptRequest, PromptSet, describe_prompts, read_prompts, write_prompts
from search.space import FloatArray
from search.trace import TraceWriter
from search.trust import Evidence, weigh


@dataclass(frozen=True, slots=True, eq=False)
class WrittenPrompts:
    """All prompts of a run, in two disjoint sets."""

    searched: PromptSet
    """What the search scores candidates on."""
    unseen: PromptSet
    """Kept for the finalists."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringRequest:
    """How candidates are to be measured."""

    scoring: Scoring
    weak_signal_nats: float
    """An adapter that differs less from the base has prompts that tell nothing; 0 trusts all."""
    balanced: FloatArray
    """(n_adapters,) coefficients of the balanced merge."""
    prior: FloatArray | None
    """(n_groups, n_adapters) one more reference."""
    recorded: Mapping[str, Any] | None
    """The event `signals` of an earlier run: who is weak, and the bounds, are not decided anew."""


@dataclass(frozen=True, slots=True, eq=False)
class Steering:
    """What candidates are measured by."""

    bounds: Bounds
    searched: PopulationEvaluator
    unseen: PopulationEvaluator
    budget: TokenBudget
    """Of both evaluators, with a record of each time memory ran out."""
    weak: tuple[str, ...]
    """Names of adapters whose prompts leave doubt, kept near the balanced merge."""
    reasons: tuple[str, ...]
    """(n_weak,) why."""
    references: tuple[Finalist, ...]
    """Base, uniform and balanced merge, the prior if there is one, and every single expert."""
    reference_scores: Scores
    """Of all references but the single experts, on the searched prompts."""
    searched_candidate_s: float
    """Seconds that one candidate takes on the searched prompts."""
    unseen_candidate_s: float
    """Seconds that one candidate takes on the unseen prompts."""

    def confine(self, start: FloatArray) -> FloatArray:
        """Return first coefficients (n_groups, n_adapters), moved into the bounds."""
        return np.clip(start, self.bounds.low, self.bounds.high)


def prepare_prompts(
    parts: Parts,
    skeletons: Sequence[Sequence[str]],
    request: PromptRequest,
    n_searched: int,
    trace: TraceWriter,
    recorded: Mapping[str, Any] | None,
) -> WrittenPrompts:
    """Write prompts, record them and split off those that the search does not see.

    Args:
        skeletons: (n_adapters,) each adapter's own skeletons.
        n_searched: prompts an adapter to search on; the rest of the request is unseen.
        recorded: the event `prompts` of an earlier run, to be taken instead.

    Raises:
        InputError: if the recorded prompts do not have the hash that is recorded with them.
    """
    if recorded is not None:
        return WrittenPrompts(*read_prompts(recorded, parts.names))
    started_s = time.monotonic()
    prompts = write_prompts(
        parts.model, parts.base.tokenizer, parts.stacked, parts.groups, skeletons, request
    )
    written = WrittenPrompts(*prompts.split(n_searched))
    trace.event(
        "prompts",
        sha256=prompts.sha256,
        searched=describe_prompts(written.searched, parts.names),
        unseen=describe_prompts(written.unseen, parts.names),
        seconds=time.monotonic() - started_s,
    )
    return written


def prepare_steering(
    parts: Parts, prompts: WrittenPrompts, request: SteeringRequest, trace: TraceWriter
) -> Steering:
    """Take the experts' signals, confine weak adapters, and score the references that concern all experts."""
    started_s = time.monotonic()
    both = prompts.searched, prompts.unseen
    budget = _choose_budget(parts, prompts, request)
    signals = [expert_signals(parts.model, parts.stacked, parts.groups, part, budget) for part in both]
    scorings = request.scoring, replace(request.scoring, compiled=False)  # too few are scored on the unseen
    searched, unseen = (
        PopulationEvaluator(parts.model, parts.stacked, parts.groups, part, own, scoring, budget)
        for part, own, scoring in zip(both, signals, scorings, strict=True)
    )
    _refuse_no_numbers(parts.names, searched, unseen)
    references = make_references(parts.shape[0], parts.names, request.balanced, request.prior)
    weak, reasons, bounds = _weigh_prompts(references, prompts.searched, searched, signals[0], request)
    trace.event(
        "signals",
        peak_kl_nats=signals[0].peak_kl,
        peak_kl_nats_unseen=signals[1].peak_kl,
        entropy_ratio=signals[0].entropy_ratio,
        weak_signal_nats=request.weak_signal_nats,
        weak=weak,
        reasons=reasons,
        **asdict(bounds),
        tokens_per_forward=budget.tokens_per_forward,
        seconds=time.monotonic() - started_s,
    )
    _warn_of_weak_prompts(len(parts.names), weak, reasons)
    n_general = len(references) - len(parts.names)
    scores, searched_candidate_s = _score_references(searched, references[:n_general], trace)
    unseen_candidate_s = searched_candidate_s * prompts.unseen.n_tokens / prompts.searched.n_tokens
    return Steering(
        bounds=bounds,
        searched=searched,
        unseen=unseen,
        budget=budget,
        weak=weak,
        reasons=reasons,
        references=references,
        reference_scores=scores,
        searched_candidate_s=searched_candidate_s,
        unseen_candidate_s=unseen_candidate_s,
    )


def _choose_budget(parts: Parts, prompts: WrittenPrompts, request: SteeringRequest) -> TokenBudget:
    """Return the tokens of one forward: as configured, or recorded, or what fits beside all that is kept."""
    asked = request.scoring.tokens_per_forward
    budget = TokenBudget(asked or default_token_budget(parts.model.device), by_memory=asked is None)
    n_kept = sum(len(own) for part in (prompts.searched, prompts.unseen) for own in part.scored)
    plan_budget(parts.model, parts.stacked, parts.groups, prompts.searched, budget, n_kept)
    recorded = (request.recorded or {}).get("tokens_per_forward")
    if recorded and budget.bytes_per_token is not None:  # other batches would have other last bits
        budget.tokens_per_forward = recorded
    return budget


def _weigh_prompts(
    references: Sequence[Finalist],
    prompts: PromptSet,
    evaluator: PopulationEvaluator,
    signals: ExpertSignals,
    request: SteeringRequest,
) -> tuple[tuple[str, ...], tuple[str, ...], Bounds]:
    """Return who is weak, why, and the bounds of all adapters; as recorded, where an earlier run decided."""
    if (recorded := request.recorded) is not None:
        return tuple(recorded["weak"]), tuple(recorded["reasons"]), _read_bounds(recorded)
    singles = [reference for reference in references if reference.name.startswith(SINGLE)]
    names = [single.name.removeprefix(SINGLE) for single in singles]
    rivals = np.full((len(names), len(names)), np.inf)
    if request.weak_signal_nats > 0:
        rivals = evaluator.score(stack_coefficients(singles)).per_expert
    evidence = Evidence(
        names=names,
        peak_kl=signals.peak_kl,
        entropy_ratio=signals.entropy_ratio,
        from_skeleton=~_wrote_freely(prompts),
        rivals=rivals,
    )
    trust = weigh(evidence, request.weak_signal_nats, request.balanced)
    doubtful = [(n, why) for n, why in zip(names, trust.reasons, strict=True) if why]
    return tuple(n for n, _ in doubtful), tuple(why for _, why in doubtful), trust.bounds


def _read_bounds(recorded: Mapping[str, Any]) -> Bounds:
    """Take bounds from the event `signals`, to the last bit: the recorded genomes follow from them."""
    ends = zip(("low", "high"), (-np.inf, np.inf), strict=True)
    return Bounds(*(np.array([free if x is None else x for x in recorded[key]]) for key, free in ends))


def _wrote_freely(prompts: PromptSet) -> NDArray[np.bool_]:
    """Say of each expert (n_experts,) whether it has no prompt from a skeleton.

    What an expert writes from the start token need not look like its task, however far it is from the base's
    text: a search that trusts it can end below the uniform merge (benchmarks.studies, no_skeleton).
    """
    is_free = np.ones(prompts.n_experts, dtype=bool)
    is_free[prompts.expert[list(prompts.from_skeleton)]] = False
    return is_free


def _warn_of_weak_prompts(n_adapters: int, weak: Sequence[str], reasons: Sequence[str]) -> None:
    if weak:
        logging.getLogger(__name__).warning(
            "WEAK SIGNAL: the prompts of %d of %d adapters leave doubt whether they show the adapter's task: "
            "%s. Their coefficients stay near the balanced merge, and the others' the nearer the more these "
            "are. Give them `skeletons:` in the config, in the words that the adapter was trained on.",
            len(weak),
            n_adapters,
            ", ".join(f"{name} ({reason})" for name, reason in zip(weak, reasons, strict=True)),
        )


def _refuse_no_numbers(names: Sequence[str], *evaluators: PopulationEvaluator) -> None:
    """Refuse (InputError) a base that has no finite disagreement with an expert: no loss would be finite."""
    is_finite = np.isfinite(np.stack([evaluator.base_per_expert for evaluator in evaluators]))
    if not is_finite.all():
        found = ", ".join(names[expert] for expert in np.flatnonzero(~is_finite.all(axis=0)).tolist())
        raise InputError(
            f"the base gives no finite numbers on prompts of {found}. Use base.dtype: float32, another "
            "objective, or leave the adapter out."
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
