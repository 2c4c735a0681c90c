"""Score candidates: how far each mixture of adapters is from every expert, on that expert's prompts.

Knows models, prompts, signals and objectives; not who proposes candidates or when to stop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from search.experts import ExpertSignals, TokenBudget, default_token_budget, scored_logp
from search.groups import Groups
from search.loop import Scores
from search.objective import combine_experts, disagreement, normalise, per_expert_means
from search.population import population
from search.prompts import PromptSet
from search.space import Space
from search.stack import StackedFactors, delta_weight

_LogpOf = Callable[[list[int], list[int]], Tensor]  # (candidates, prompts), row by row -> (n_scored, n_vocab)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What a loss is."""

    objective: str = "entropy_excess"
    combine: str = "mean_sqrt"
    floor_nats: float = 0.02
    """The least that the base's value, which an expert's is divided by, counts for."""
    tokens_per_forward: int | None = None
    """Chosen by device when None."""


class PopulationEvaluator:
    """Scores candidates, all on the same prompts, so that they differ by their coefficients alone.

    Each expert's mean disagreement is divided by the base's: 0 is the expert itself, 1 no better than the
    base. Candidates share forward passes through `population`; on a CPU, where a pass costs by the token
    however many rows it has, each is folded into the weights instead.
    """

    def __init__(
        self,
        model: Any,
        stacked: StackedFactors,
        space: Space,
        prompts: PromptSet,
        signals: ExpertSignals,
        scoring: Scoring,
    ) -> None:
        """Score the base, at one candidate's cost."""
        self._model, self._stacked, self._space = model, stacked, space
        self._prompts, self._signals, self._scoring = prompts, signals, scoring
        self._budget = TokenBudget(scoring.tokens_per_forward or default_token_budget(model.device))
        self._n_scored = [len(scored) for scored in prompts.scored]
        positions = torch.arange(len(signals.next_tokens), device=model.device)
        self._positions_of = torch.split(positions, self._n_scored)  # one tensor a prompt
        self._folds = model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64)
        base = self._per_expert(scoring.objective, np.zeros((1, *space.shape)))
        self.base_per_expert: NDArray[np.float64] = base[0].numpy()
        """(n_experts,) the base's disagreement, in the objective's own unit."""

    @property
    def oom_events(self) -> list[dict[str, int]]:
        """When memory ran out, and with how many tokens to a forward pass it went on."""
        return self._budget.oom_events

    def evaluate(self, genomes: ArrayLike) -> Scores:
        """Score genomes (n_candidates, n_params)."""
        return self.score(self._space.to_coefficients(genomes))

    def score(self, coefficients: NDArray[np.float64]) -> Scores:
        """Score coefficients (n_candidates, n_groups, n_adapters); a loss that is not finite is passed on."""
        if self._model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._model.device)
        raw = self._per_expert(self._scoring.objective, coefficients)
        per_expert = normalise(raw, torch.from_numpy(self.base_per_expert), self._scoring.floor_nats)
        return Scores(
            losses=combine_experts(per_expert, self._scoring.combine).numpy(),
            per_expert=per_expert.numpy(),
            n_tokens=len(coefficients) * self._prompts.n_tokens,
            peak_bytes=_peak_bytes(self._model.device),
            n_prompts=self._prompts.n_prompts,
        )

    def agreement(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share (n_experts,) of an expert's prompts where a merge has its top token throughout.

        Args:
            coefficients: (n_groups, n_adapters), one merge.
        """
        misses = self._position_values("top1_disagreement", coefficients[None])[0].cpu()
        hits = torch.stack([(own == 0).all() for own in torch.split(misses, self._n_scored)])  # (n_prompts,)
        expert_of = torch.from_numpy(self._prompts.expert)
        return per_expert_means(hits.double(), expert_of, self._prompts.n_experts).numpy()

    def _per_expert(self, objective: str, coefficients: NDArray[np.float64]) -> Tensor:
        """Average an objective over each expert's positions: (n_candidates, n_experts), on the CPU."""
        values = self._position_values(objective, coefficients).double()
        return per_expert_means(values, self._signals.expert_of, self._prompts.n_experts).cpu()

    @torch.inference_mode()
    def _position_values(self, objective: str, coefficients: NDArray[np.float64]) -> Tensor:
        """Return an objective at every scored position, (n_candidates, n_scored)."""
        model, table = self._model, torch.from_numpy(coefficients)
        n_scored, dtype = len(self._signals.next_tokens), self._signals.logp.dtype
        values = torch.empty(len(table), n_scored, device=model.device, dtype=dtype)
        if not self._folds:
            self._fill(values, objective, partial(self._mixed_logp, table))
            return values
        for candidate, mixture in enumerate(table.to(model.dtype)):
            weights = _fold(model, self._stacked, mixture, self._space.groups)
            folded_logp = partial(self._folded_logp, weights)
            self._fill(values[candidate : candidate + 1], objective, folded_logp)
        return values

    def _mixed_logp(self, table: Tensor, candidates: list[int], prompts: list[int]) -> Tensor:
        with population(self._model, self._stacked, table[candidates], self._space.groups):
            return scored_logp(self._model, self._prompts, prompts)

    def _folded_logp(self, weights: dict[str, Tensor], candidates: list[int], prompts: list[int]) -> Tensor:
        return scored_logp(self._model, self._prompts, prompts, weights)

    def _fill(self, values: Tensor, objective: str, logp_of: _LogpOf) -> None:
        """Compute values (n_candidates, n_scored); candidate c on prompt p is row p * n_candidates + c."""
        signals, n_candidates = self._signals, len(values)
        lengths = [len(ids) for ids in self._prompts.ids for _ in range(n_candidates)]

        def step(rows: list[int]) -> None:
            candidates, prompts = [row % n_candidates for row in rows], [row // n_candidates for row in rows]
            n_scored = torch.tensor([self._n_scored[prompt] for prompt in prompts])
            of = torch.tensor(candidates).repeat_interleave(n_scored).to(values.device)
            at = torch.cat([self._positions_of[prompt] for prompt in prompts])
            logp = logp_of(candidates, prompts)
            values[of, at] = disagreement(objective, logp, signals.logp[at], signals.next_tokens[at])

        self._budget.run(lengths, step)


def _fold(model: Any, stacked: StackedFactors, mixture: Tensor, groups: Groups) -> dict[str, Tensor]:
    """Return the weights, by name, of the model with the mixture (n_groups, n_adapters) added to its own."""
    weights = {}
    for name, module in stacked.modules.items():
        layer = model.get_submodule(name)
        delta = delta_weight(module, mixture[groups.group_of[name]])  # (d_out, d_in)
        weights[f"{name}.weight"] = layer.weight + (delta.T if isinstance(layer, Conv1D) else delta)
    return weights


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
