"""Parts of the method as a bundle has them: nothing is compiled, and little is told of memory.

Knows the classes that it derives from: each class here gives that one its methods in a bundle, and is made
nowhere. What is left out neither changes what the methods return nor is asked for by search/kit_search.py.
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from search.errors import InputError
from search.evaluate import PopulationEvaluator
from search.experts import AT_ONCE, ExpertSignals, TokenBudget, scored_logits
from search.groups import Groups
from search.objective import Objective, sum_by_index
from search.passes import Passes, position_values
from search.population import MixedLinear, Mixtures
from search.prompts import PromptSet, _Desk
from search.space import FloatArray
from search.stack import StackedFactors, mix_hidden


class TerseDesk(_Desk):
    """A desk that says a shortage in fewer words."""

    def check_enough(self) -> None:
        """Log a shortage; refuse to go on with nothing to search on, or nothing unseen."""
        found = f"adapter {self.name!r}: {len(self.kept)} usable prompts, expected {self.n_wanted}"
        if len(self.kept) < min(2, self.n_wanted):
            raise InputError(f"{found} ({dict(self.problems)}). Give it other skeletons, or leave it out.")
        if len(self.kept) < self.n_wanted:
            logging.getLogger(__name__).warning("%s; going on", found)


class PlainLinear(MixedLinear):
    """A mixed layer that is never compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n_rows, n_tokens, d_in) to (n_rows, n_tokens, d_out)."""
        if self.idle:
            return self.layer(x)  # type: ignore[no-any-return]
        hidden = mix_hidden(x, self.module.A, self.coefficients[:, self.module.owner])
        output: Tensor
        weight: Tensor
        if self.is_plain:
            output, factor, weight = F.linear(hidden, self.module.B), x, self.layer.get_parameter("weight")
        else:
            output, factor, weight = self.layer(x), hidden, self.module.B
        output.view(-1, output.shape[-1]).addmm_(factor.reshape(-1, factor.shape[-1]), weight.T)
        return output


class PlainPasses(Passes):
    """Passes that are never compiled."""

    def __init__(
        self,
        model: Any,
        stacked: StackedFactors,
        groups: Groups,
        prompts: PromptSet,
        signals: ExpertSignals,
    ) -> None:
        """Note where each prompt's positions are among the signals'."""
        self._model, self._prompts, self._signals = model, prompts, signals
        self._mixtures = Mixtures(model, stacked, groups)
        self._under_way: deque[torch.cuda.Event] = deque()
        self.lengths = [len(ids) for ids in prompts.ids]
        self._n_scored = torch.tensor([len(scored) for scored in prompts.scored])
        self._first = self._n_scored.cumsum(0) - self._n_scored

    def mixed(self, table: Tensor, rows: Sequence[int], budget: TokenBudget | None = None) -> Tensor:
        """Return logits (n_scored, n_vocab) of prompts `rows`, each under its own mixture of `table`."""
        self._keep_pace()
        with self._mixtures.active(table):
            return scored_logits(self._model, self._prompts, rows)

    def _values(self, objective: Objective, logits: Tensor, at: Tensor) -> Tensor:
        """Return what an objective says at each scored position: (n_scored,); some at a time."""
        n_positions = max(1, AT_ONCE[logits.device.type] // logits.shape[-1])
        pieces = zip(torch.split(logits, n_positions), torch.split(at, n_positions), strict=True)
        signals = self._signals
        parts = [
            position_values(objective, own, signals.logits, signals.next_tokens, to) for own, to in pieces
        ]
        return torch.cat(parts)


class BlockSums(NamedTuple):
    """What scoring candidates on some blocks of prompts gave."""

    sums: FloatArray
    """(n_candidates, n_experts) the objective summed over each expert's scored positions."""
    counts: FloatArray
    """(n_experts,) how many positions these are."""
    prompts: NDArray[np.int64]
    """(n_block_prompts,) indices of the prompts scored."""
    n_tokens: int


class Losses(NamedTuple):
    """What scoring candidates on all prompts gave."""

    losses: FloatArray
    """(n_candidates,) not finite where a candidate could not be scored."""
    per_expert: FloatArray
    """(n_candidates, n_experts) what the losses are combined from."""


class PlainEvaluator(PopulationEvaluator):
    """An evaluator that never compiles, and does not say how much memory was in use."""

    def _make_passes(self) -> Passes:
        """Return passes."""
        return Passes(self._model, self._stacked, self._groups, self._prompts, self._signals)

    def score_blocks(self, coefficients: FloatArray, blocks: ArrayLike) -> Any:
        """Score coefficients (n_candidates, n_groups, n_adapters) on some blocks, whose sums add up."""
        prompts = np.flatnonzero(np.isin(self._block_of, blocks))
        sums = self._prompt_sums(self._scoring.objective, coefficients, prompts.tolist())
        n_scored, expert, n_experts = self._n_scored[prompts], self._expert[prompts], self._prompts.n_experts
        n_tokens = len(coefficients) * sum(len(self._prompts.ids[prompt]) for prompt in prompts)
        counts = sum_by_index(n_scored, expert, n_experts).numpy()
        return BlockSums(sum_by_index(sums, expert, n_experts).numpy(), counts, prompts, n_tokens)

    def score(self, coefficients: FloatArray) -> Any:
        """Score coefficients (n_candidates, n_groups, n_adapters) on all prompts."""
        scored = self.score_blocks(coefficients, range(self.n_blocks))
        return Losses(*self.combine(scored.sums, scored.counts))

    @torch.enable_grad()
    def _sums_with_graph(self, objective: Objective, mixture: Tensor, prompts: list[int]) -> Tensor:
        """Sum the objective over each expert's positions in some prompts, (n_experts,), differentiably."""
        self.checkpoint()
        logits = self._passes.mixed(mixture.expand(len(prompts), -1, -1), prompts)
        sums = self._passes.sums(objective, logits, prompts)
        return sum_by_index(sums, self._expert[prompts], self._prompts.n_experts)
