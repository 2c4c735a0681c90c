"""Score candidates: how far each mixture of adapters is from every expert, on that expert's prompts.

Knows models, prompts, signals and objectives; not who proposes candidates, which of them are worth scoring on
more prompts, or when to stop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from search.compiled import compiling_pays
from search.errors import InputError
from search.experts import ExpertSignals, TokenBudget, default_token_budget
from search.groups import Groups
from search.loop import Scores
from search.memory import reset_peak
from search.objective import Objective, combine_experts, normalise, objective_label, smooth_part, sum_by_index
from search.passes import Passes
from search.population import folded_weights, mixed_weights, send
from search.prompts import PromptSet
from search.racing import BlockScores
from search.space import FloatArray
from search.stack import StackedFactors

# (candidates, prompts), row by row -> (n_scored, n_vocab)
_LogitsOf = Callable[[list[int], list[int]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What a loss is."""

    objective: Objective = "entropy_excess"
    combine: str = "mean_sqrt"
    floor_nats: float = 0.02
    """The least that the base's value, which an expert's is divided by, counts for."""
    tokens_per_forward: int | None = None
    """Chosen by device when None."""
    compiled: bool | None = None
    """Whether decoder layers are; None where it pays."""
    n_ahead: int = 0
    """Candidates to be scored, which what compiling costs is weighed against."""


@dataclass(frozen=True, slots=True, eq=False)
class GradientScores:
    """The loss of one mixture on all prompts, and which way it falls."""

    loss: float
    gradient: FloatArray
    """(n_groups, n_adapters) d loss / d coefficients."""
    per_expert: FloatArray
    """(n_experts,) what the loss is combined from."""
    n_tokens: int
    """Tokens of all forward passes, with a graph or without."""


class PopulationEvaluator:
    """Scores candidates, all on the same prompts, so that they differ by their coefficients alone.

    Each expert's mean disagreement is divided by the base's on all prompts: 0 is the expert itself, 1 no
    better than the base. Candidates share forward passes through `population`; on a CPU, where a pass costs
    by the token however many rows it has, each is folded into the weights instead.
    """

    def __init__(  # noqa: PLR0913 (what is merged, what it is measured by, and a budget that others may share)
        self,
        model: Any,
        stacked: StackedFactors,
        groups: Groups,
        prompts: PromptSet,
        signals: ExpertSignals,
        scoring: Scoring,
        budget: TokenBudget | None = None,
    ) -> None:
        """Score the base, at one candidate's cost.

        Args:
            budget: of tokens a forward pass; a new one, from `scoring`, when None.

        Raises:
            ValueError: if an expert has no prompt.
            InputError: if a user's objective returns what cannot be averaged.
        """
        self._model, self._stacked, self._groups = model, stacked, groups
        self._prompts, self._signals, self._scoring = prompts, signals, scoring
        tokens_per_forward = scoring.tokens_per_forward or default_token_budget(model.device)
        self._budget = budget or TokenBudget(tokens_per_forward, by_memory=scoring.tokens_per_forward is None)
        self.graph_budget = replace(self._budget, bytes_per_token=None)
        """Of tokens with a graph. Chosen at the first gradient; one list of events for both."""
        n_scored = torch.tensor([len(scored) for scored in prompts.scored])
        self._n_scored, self._expert = n_scored.double(), torch.from_numpy(prompts.expert)
        self._block_of, self.n_blocks = _assign_blocks(prompts)
        self._counts = sum_by_index(self._n_scored, self._expert, prompts.n_experts)
        self._folds = model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64)
        self._passes = self._make_passes()
        self.checkpoint: Callable[[], None] = lambda: None
        """Called before each forward pass and each folding. It may raise, to abandon the work."""
        self._base_means: dict[Objective, Tensor] = {}
        self.base_per_expert: FloatArray = self._base_mean(scoring.objective).numpy()
        """(n_experts,) the base's disagreement, in the objective's own unit."""

    def _make_passes(self) -> Passes:
        """Return passes that are compiled where that pays, and warm."""
        scoring, budget = self._scoring, self._budget
        n_forwards = scoring.n_ahead * self._prompts.n_tokens / budget.tokens_per_forward
        pays = compiling_pays(self._model, n_forwards) if scoring.compiled is None else scoring.compiled
        compiled = pays and not self._folds
        case = self._model, self._stacked, self._groups, self._prompts, self._signals
        passes = Passes(*case, compiled=compiled)
        passes.warm_up(budget)
        return passes

    @property
    def oom_events(self) -> list[dict[str, int]]:
        """When memory ran out, and with how many tokens it went on: the budget's list."""
        return self._budget.oom_events

    def score_blocks(self, coefficients: FloatArray, blocks: ArrayLike) -> BlockScores:
        """Score coefficients (n_candidates, n_groups, n_adapters) on some blocks, whose sums add up."""
        if self._model.device.type == "cuda":
            reset_peak(self._model.device)
        prompts = np.flatnonzero(np.isin(self._block_of, blocks))
        sums = self._prompt_sums(self._scoring.objective, coefficients, prompts.tolist())
        n_scored, expert = self._n_scored[prompts], self._expert[prompts]
        return BlockScores(
            sums=sum_by_index(sums, expert, self._prompts.n_experts).numpy(),
            counts=sum_by_index(n_scored, expert, self._prompts.n_experts).numpy(),
            prompts=prompts,
            prompt_means=(sums / n_scored).numpy(),
            n_tokens=len(coefficients) * sum(len(self._prompts.ids[prompt]) for prompt in prompts),
            peak_bytes=_peak_bytes(self._model.device),
        )

    def combine(self, sums: FloatArray, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Make losses of sums (n_candidates, n_experts) over counts (n_experts,) of scored positions.

        Returns:
            Losses (n_candidates,), finite or not, and the (n_candidates, n_experts) they are combined from.
        """
        base = self._base_mean(self._scoring.objective)
        losses, per_expert = self._combine(torch.tensor(sums), torch.tensor(counts), base)
        return losses.numpy(), per_expert.numpy()

    def score(self, coefficients: FloatArray) -> Scores:
        """Score coefficients (n_candidates, n_groups, n_adapters) on all prompts."""
        scored = self.score_blocks(coefficients, range(self.n_blocks))
        losses, per_expert = self.combine(scored.sums, scored.counts)
        return Scores(losses, per_expert, scored.n_tokens, scored.peak_bytes)

    @torch.no_grad()
    def score_updates(self, updates: Mapping[str, Tensor]) -> Scores:
        """Score one merge on all prompts, given as updates (d_out, d_in) of modules: it may be no mixture."""
        sums = torch.empty(1, len(self._expert), device=self._model.device, dtype=torch.float64)
        weights, passes = folded_weights(self._model, updates.items()), self._passes
        own = range(len(self._expert))
        self._fill(sums, self._scoring.objective, own, lambda _, rows: passes.folded(weights, rows))
        per_expert = sum_by_index(sums, self._expert, self._prompts.n_experts).numpy()
        n_tokens, peak_bytes = self._prompts.n_tokens, _peak_bytes(self._model.device)
        return Scores(*self.combine(per_expert, self._counts.numpy()), n_tokens, peak_bytes)

    def agreement(self, coefficients: FloatArray) -> FloatArray:
        """Return the share (n_experts,) of an expert's prompts where a merge has its top token throughout.

        Args:
            coefficients: (n_groups, n_adapters), one merge.
        """
        misses = self._prompt_sums("top1_disagreement", coefficients[None], range(len(self._expert)))[0]
        hits = sum_by_index((misses == 0).double(), self._expert, self._prompts.n_experts)
        return hits.numpy() / np.bincount(self._prompts.expert)

    def gradient(self, coefficients: FloatArray) -> GradientScores:
        """Differentiate the loss of coefficients (n_groups, n_adapters) on all prompts.

        Of an objective with a flat part it is the loss by the other part alone: weighed by both, the experts
        that are furthest away would count least.

        Where all prompts fit one forward pass, one graph does. Else a pass without a graph tells the slope of
        the loss in each expert's sum, with which the gradients of parts are weighted and added up.

        Raises:
            InputError: if the objective has no gradient.
            torch.OutOfMemoryError: if one prompt's graph does not fit.
        """
        mixture = torch.tensor(coefficients, dtype=torch.float64, requires_grad=True)
        lengths, objective = self._passes.lengths, smooth_part(self._scoring.objective)
        gradient, sums = torch.zeros(mixture.shape, dtype=torch.float64), torch.zeros(0)  # sums: none known
        n_tokens, base = 0, self._base_mean(objective)

        def step(rows: list[int]) -> None:
            nonlocal sums, n_tokens
            if not len(sums) and len(rows) < len(lengths):
                sums, n_tokens = self._expert_sums(objective, coefficients), sum(lengths)
            own = self._sums_with_graph(objective, mixture, rows)
            total = sums if len(sums) else own.detach()
            (part,) = torch.autograd.grad(own, mixture, self._slopes(total, base))
            gradient.add_(part)  # from here on memory cannot run out: nothing is counted twice
            sums, n_tokens = total, n_tokens + sum(lengths[row] for row in rows)

        def differentiate(rows: list[int]) -> None:
            torch.autograd.grad(self._sums_with_graph(objective, mixture, rows).sum(), mixture)

        self.graph_budget.plan(self._model.device, lengths, self._n_scored.tolist(), differentiate)
        self.graph_budget.run(lengths, step)
        loss, per_expert = self._combine(sums, self._counts, base)
        return GradientScores(loss.item(), gradient.numpy(), per_expert.numpy(), n_tokens)

    def _base_mean(self, objective: Objective) -> Tensor:
        """Return the base's mean on each expert's positions, (n_experts,), measured once."""
        if objective not in self._base_means:
            at_base = np.zeros((len(self._groups.names), self._stacked.n_adapters))
            self._base_means[objective] = self._expert_sums(objective, at_base) / self._counts
        return self._base_means[objective]

    def _expert_sums(self, objective: Objective, coefficients: FloatArray) -> Tensor:
        """Sum an objective over each expert's positions for one merge, (n_experts,)."""
        per_prompt = self._prompt_sums(objective, coefficients[None], range(len(self._expert)))[0]
        return sum_by_index(per_prompt, self._expert, self._prompts.n_experts)

    def _combine(self, sums: Tensor, counts: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        per_expert = normalise(sums / counts, base, self._scoring.floor_nats)
        return combine_experts(per_expert, self._scoring.combine), per_expert

    def _slopes(self, sums: Tensor, base: Tensor) -> Tensor:
        """Return d loss / d sums, (n_experts,)."""
        with torch.enable_grad():
            leaf = sums.clone().requires_grad_()
            return torch.autograd.grad(self._combine(leaf, self._counts, base)[0], leaf)[0]

    @torch.enable_grad()
    def _sums_with_graph(self, objective: Objective, mixture: Tensor, prompts: list[int]) -> Tensor:
        """Sum the objective over each expert's positions in some prompts, (n_experts,), differentiably."""
        self.checkpoint()
        logits = self._passes.mixed(mixture.expand(len(prompts), -1, -1), prompts)
        sums = self._passes.sums(objective, logits, prompts)
        if not sums.requires_grad:
            raise InputError(
                f"objective.name: {objective_label(objective)} has no gradient, which gradient "
                "steps need; choose another objective, or no gradient steps"
            )
        return sum_by_index(sums, self._expert[prompts], self._prompts.n_experts)

    @torch.no_grad()  # not inference mode: gradients cannot flow through what a model keeps from that
    def _prompt_sums(self, objective: Objective, coefficients: FloatArray, prompts: Sequence[int]) -> Tensor:
        """Sum an objective over each prompt's scored positions: (n_candidates, n_prompts), on the CPU."""
        model, table, passes = self._model, torch.tensor(coefficients, dtype=torch.float64), self._passes
        sums = torch.empty(len(table), len(prompts), device=model.device, dtype=torch.float64)
        if not self._folds:
            budget = self._budget
            self._fill(sums, objective, prompts, lambda rows, own: passes.mixed(table[rows], own, budget))
            return sums.cpu()
        for candidate, mixture in enumerate(table.to(model.dtype)):
            self.checkpoint()
            weights = mixed_weights(model, self._stacked, mixture, self._groups)
            own = sums[candidate : candidate + 1]
            self._fill(own, objective, prompts, lambda _, rows, weights=weights: passes.folded(weights, rows))  # type: ignore[misc]
        return sums

    def _fill(self, sums: Tensor, objective: Objective, prompts: Sequence[int], logits_of: _LogitsOf) -> None:
        """Compute sums (n_candidates, n_prompts); candidate c on p-th prompt is row p * n_candidates + c."""
        n_candidates = len(sums)
        lengths = [self._passes.lengths[prompt] for prompt in prompts for _ in range(n_candidates)]

        def step(rows: list[int]) -> None:
            candidates, columns = [row % n_candidates for row in rows], [row // n_candidates for row in rows]
            own = [prompts[column] for column in columns]
            self.checkpoint()
            found = self._passes.sums(objective, logits_of(candidates, own), own)
            places = send(torch.tensor([candidates, columns]), sums.device)
            sums[places[0], places[1]] = found

        self._budget.run(lengths, step)


def _assign_blocks(prompts: PromptSet) -> tuple[NDArray[np.int64], int]:
    """Split prompts into as many blocks as hold at least one of every expert, each expert's in turn.

    Returns:
        Each prompt's block, (n_prompts,), and the number of blocks.
    """
    n_own = np.bincount(prompts.expert, minlength=prompts.n_experts)
    n_blocks = int(n_own.min())
    if len(n_own) != prompts.n_experts or n_blocks == 0:
        raise ValueError(
            f"prompts per expert are {n_own.tolist()}, expected at least one for each of {prompts.n_experts}"
        )
    turn = np.empty(prompts.n_prompts, dtype=np.int64)
    for expert, n in enumerate(n_own):
        turn[prompts.expert == expert] = np.arange(n)
    return turn % n_blocks, n_blocks


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
