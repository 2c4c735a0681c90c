"""Rows of prompts through the model, each under its own mixture, and what an objective says of them.

Knows models, populations, prompts, signals and whether to compile; not candidates, losses or memory budgets.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from search.compiled import CompiledLayers, Compiler, choose_widths, pad_to, row_sizes
from search.experts import AT_ONCE, ExpertSignals, TokenBudget, log_softmax, scored_logits, widened_logp
from search.groups import Groups
from search.joined import join_inputs
from search.objective import Objective, disagreement
from search.population import Mixtures, send
from search.prompts import PromptSet
from search.stack import StackedFactors

MOST_UNDER_WAY = 2


class Passes:
    """Forward passes over prompts; in few shapes where layers are compiled, each of which costs seconds."""

    def __init__(
        self,
        model: Any,
        stacked: StackedFactors,
        groups: Groups,
        prompts: PromptSet,
        signals: ExpertSignals,
        *,
        compiled: bool = False,
    ) -> None:
        """Choose the shapes; nothing is compiled before the first pass."""
        self._model, self._shape = model, (len(groups.names), stacked.n_adapters)
        self._mixtures = Mixtures(model, stacked, groups)
        if compiled:
            self._mixtures.rewrap(join_inputs(model, stacked))
        self._prompts, self._signals = prompts, signals
        self._compiler = Compiler() if compiled else None
        self._layers = CompiledLayers(model, self._compiler) if self._compiler else None
        self._objectives: dict[str, Callable[..., Tensor]] = {}  # compiled
        self._under_way: deque[torch.cuda.Event] = deque()
        lengths = [len(ids) for ids in prompts.ids]
        self.widths = choose_widths(lengths) if compiled else []
        """Of compiled passes."""
        self.lengths = [pad_to(length, self.widths) for length in lengths]
        """(n_prompts,) tokens that a row of each prompt takes, with what it is padded to if compiled."""
        self._n_scored = torch.tensor([len(scored) for scored in prompts.scored])
        self._first = self._n_scored.cumsum(0) - self._n_scored  # position of each prompt among the signals'

    def mixed(self, table: Tensor, rows: Sequence[int], budget: TokenBudget | None = None) -> Tensor:
        """Return logits (n_scored, n_vocab) of prompts `rows`, each under its own mixture, row after row.

        Args:
            table: (n_rows, n_groups, n_adapters).
            budget: what `row_sizes` pad compiled passes to follow from; None pads no rows.
        """
        self._keep_pace()
        if self._layers is None:
            with self._mixtures.active(table):
                return scored_logits(self._model, self._prompts, rows)
        width = max(self.lengths[row] for row in rows)
        n_rows = pad_to(len(rows), row_sizes(width, budget.tokens_per_forward) if budget else [])
        if n_rows > len(rows):
            table = torch.cat([table, table.new_zeros(n_rows - len(rows), *table.shape[1:])])
        with self._mixtures.active(table), self._layers.active():
            return scored_logits(self._model, self._prompts, rows, shape=(n_rows, width))

    @torch.no_grad()
    def warm_up(self, budget: TokenBudget) -> None:
        """Compile all shapes that fit the budget, so that no later pass takes longer unawares."""
        tokens = budget.tokens_per_forward
        for width in self.widths:
            prompt = self.lengths.index(width)

            def step(rows: list[int], prompt: int = prompt) -> None:
                self.mixed(torch.zeros(len(rows), *self._shape), [prompt] * len(rows))

            for n_rows in row_sizes(width, tokens):
                budget.run([width] * n_rows, step)

    def _keep_pace(self) -> None:
        """Let two passes wait on a device and no more: it stays busy, and a look at the clock is not late."""
        if self._model.device.type == "cuda":
            if len(self._under_way) == MOST_UNDER_WAY:
                self._under_way.popleft().synchronize()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._model.device))
            self._under_way.append(event)

    def folded(self, weights: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
        """Return logits (n_scored, n_vocab) of prompts `rows` under other weights, by name."""
        return scored_logits(self._model, self._prompts, rows, weights)

    def sums(self, objective: Objective, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Sum an objective over the scored positions of each row: (n_rows,), float64, on the device.

        Logits are those of `rows`. One sum a row: a scattered sum on a GPU is not reproducible, and a product
        lets one NaN spoil all.
        """
        first, counts = self._first[list(rows)], self._n_scored[list(rows)]
        slots, n_values = torch.arange(int(counts.max())), int(counts.sum())
        is_there = slots < counts[:, None]  # (n_rows, most)
        at = (first[:, None] + slots)[is_there]
        places = (counts.cumsum(0) - counts)[:, None] + slots
        places[~is_there] = n_values  # behind the last value stands a zero
        there = send(torch.cat([at, places.flatten()]), logits.device)
        values = self._values(objective, logits, there[:n_values]).double()
        return torch.nn.functional.pad(values, (0, 1))[there[n_values:].view(places.shape)].sum(1)

    def _values(self, objective: Objective, logits: Tensor, at: Tensor) -> Tensor:
        """Return what an objective says at each scored position: (n_scored,); some at a time."""
        evaluate: Any = partial(position_values, objective)
        if self._compiler is not None and isinstance(objective, str):
            if objective not in self._objectives:
                self._objectives[objective] = self._compiler(evaluate, dynamic=True)
            evaluate = self._objectives[objective]
        signals = self._signals
        n_positions = max(1, AT_ONCE[logits.device.type] // logits.shape[-1])
        parts = [
            evaluate(own, signals.logits, signals.next_tokens, places)
            for own, places in zip(
                torch.split(logits, n_positions), torch.split(at, n_positions), strict=True
            )
        ]
        return torch.cat(parts)


def position_values(
    objective: Objective, logits: Tensor, expert_logits: Tensor, next_tokens: Tensor, at: Tensor
) -> Tensor:
    """Return what an objective says at some positions, (n,), for a merge's logits (n, n_vocab) there.

    Args:
        expert_logits: as `next_tokens`, of all positions: an ExpertSignals' own.
        at: (n,) which of them these are.
    """
    expert_logp = widened_logp(expert_logits[at])
    return disagreement(objective, log_softmax(logits), expert_logp, next_tokens[at])
