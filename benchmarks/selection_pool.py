"""A pool of questions that the base writes and all experts answer, and what the models say of the answers.

All questions come from one template, the same for all adapters: what the prompts of a family of adapters
have in common, and nothing of what any adapter is for. Knows models and text; not which questions are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.selection_criteria import Signals
from search.drafts import Draft, DraftSettings, DraftWriter
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import ExpertSignals, TokenBudget, default_token_budget, expert_signals, scored_logp
from search.objective import disagreement, entropy
from search.parts import Parts
from search.prompts import PromptSet
from search.skeleton import normal_form, parse_skeleton
from search.space import FloatArray

TEMPLATE = "### Task:{question}\n### Answer:"
QUESTIONS_TOGETHER = 32
"""Whose answers, of all experts, are measured at a time: bounds the memory for log-probabilities."""
LEAST_ENTROPY_NATS = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Questions, answers and what is known of them."""

    drafts: list[list[Draft]]
    """(n_experts)(n_questions), answered."""
    signals: Signals

    def keep(self, chosen: NDArray[np.int64]) -> PromptSet:
        """Return the prompts of chosen questions (n_experts, n), ordered by expert, with answers scored."""
        rows = zip(self.drafts, chosen.tolist(), strict=True)
        return _collect([own[question] for own, questions in rows for question in questions], len(chosen))


def write_pool(parts: Parts, template: str, n_questions: int, settings: DraftSettings) -> Pool:
    """Let the base write up to `n_questions` different questions and every expert answer each, greedily.

    Raises:
        InputError: for a template that is no skeleton.
    """
    skeleton = parse_skeleton(template)
    writer = DraftWriter(parts.model, parts.base.tokenizer, parts.stacked, parts.groups, settings)
    written = [Draft(0, skeleton, skeleton.literals[0]) for _ in range(n_questions)]
    writer.write(written)
    asked = {normal_form(draft.text): draft for draft in written if draft.prompt}  # the slot is not blank
    first = list(asked.values())
    others = [[Draft(expert, skeleton, d.text) for d in first] for expert in range(1, len(parts.names))]
    writer.answer([draft for own in others for draft in own], 0.0)
    drafts = [first, *others]
    return Pool(drafts, _measure(parts, drafts))


def _measure(parts: Parts, drafts: list[list[Draft]]) -> Signals:
    parts_of = [
        _measure_some(parts, [own[start : start + QUESTIONS_TOGETHER] for own in drafts])
        for start in range(0, len(drafts[0]), QUESTIONS_TOGETHER)
    ]
    divergence, ratio, nearest = (np.concatenate(found, axis=1) for found in zip(*parts_of, strict=True))
    usable = np.array([[not draft.problem for draft in own] for own in drafts])
    return Signals(usable, divergence, ratio, nearest)


def _measure_some(parts: Parts, drafts: list[list[Draft]]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return divergence, entropy ratio and nearest, (n_experts, n_questions) each."""
    n_experts, shape = len(drafts), (len(drafts), len(drafts[0]))
    prompts = _collect([draft for own in drafts for draft in own], n_experts)
    signals = expert_signals(parts.model, parts.stacked, parts.groups, prompts)
    divergence, ratio = np.empty(prompts.n_prompts), np.empty(prompts.n_prompts)
    for row, found in _against_base(parts, prompts, signals):
        divergence[row], ratio[row] = found
    scoring = Scoring()
    evaluator = PopulationEvaluator(parts.model, parts.stacked, parts.groups, prompts, signals, scoring)
    singles = np.eye(n_experts + 1, n_experts, k=-1)  # the base, then each expert
    tables = np.repeat(singles[:, None], len(parts.groups.names), axis=1)
    means = evaluator.score_blocks(tables, range(evaluator.n_blocks)).prompt_means
    relative = means[1:] / np.maximum(means[0], scoring.floor_nats)
    relative[prompts.expert, np.arange(prompts.n_prompts)] = np.inf  # itself
    return divergence.reshape(shape), ratio.reshape(shape), relative.min(axis=0).reshape(shape)


@torch.no_grad()
def _against_base(
    parts: Parts, prompts: PromptSet, signals: ExpertSignals
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Yield each prompt's index, its largest KL(expert || base) and its entropy ratio."""
    found: dict[int, tuple[float, float]] = {}
    expert_logp = torch.split(
        signals.logp(torch.arange(len(signals.next_tokens))), [len(scored) for scored in prompts.scored]
    )

    def step(rows: list[int]) -> None:
        base = scored_logp(parts.model, prompts, rows)
        for row, base_logp in zip(rows, base.split([len(prompts.scored[row]) for row in rows]), strict=True):
            own = expert_logp[row]
            kl = disagreement("forward_kl", base_logp, own, torch.zeros(len(own)))
            base_entropy = entropy(base_logp).mean().clamp_min(LEAST_ENTROPY_NATS)
            found[row] = float(kl.max()), float(entropy(own).mean() / base_entropy)

    budget = TokenBudget(default_token_budget(parts.model.device))
    budget.run([len(ids) for ids in prompts.ids], step)
    yield from found.items()


def _collect(drafts: Sequence[Draft], n_experts: int) -> PromptSet:
    """Return answered drafts, ordered by expert, as prompts whose answers are scored."""
    ids = tuple((*draft.prompt, *draft.answer) for draft in drafts)
    return PromptSet(
        ids=ids,
        expert=np.array([draft.adapter for draft in drafts], dtype=np.int64),
        scored=tuple(
            tuple(range(len(draft.prompt) - 1, len(row) - 1)) for draft, row in zip(drafts, ids, strict=True)
        ),
        texts=tuple(draft.full_text for draft in drafts),
        from_skeleton=(True,) * len(drafts),
        n_experts=n_experts,
    )
