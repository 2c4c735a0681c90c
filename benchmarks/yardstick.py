"""Objectives of one merge on a set of prompts, fast: all that does not change lies ready on the device.

The merge is folded into dense weights, modules of the same shape in one product, and prompts are padded into
few forward passes; the numbers are those of search.evaluate. Knows models, prompts and objectives; not where
merges come from nor what is made of the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.func import functional_call

from search.experts import ExpertSignals, TokenBudget
from search.groups import Groups
from search.objective import disagreement
from search.prompts import PromptSet
from search.stack import StackedFactors, at_least_float32


@dataclass(frozen=True, slots=True, eq=False)
class _Alike:
    """Modules of the same shape whose rank rows belong to the same adapters."""

    names: list[str]
    weight: Tensor
    """(n_modules, d_out, d_in), the base's own."""
    A: Tensor
    """(n_modules, total_rank, d_in)."""
    B: Tensor
    """(n_modules, d_out, total_rank)."""
    owner: Tensor
    """(total_rank,)."""
    groups: Tensor
    """(n_modules,) the row of the coefficients that each obeys."""


class DenseFolds:
    """Weights of merges, by name, for `functional_call`; Linear layers alone."""

    def __init__(self, model: Any, stacked: StackedFactors, groups: Groups) -> None:
        """Put modules that are alike side by side, copies of the base's weights included."""
        self._device, self._dtype = model.device, model.dtype
        alike: dict[tuple[object, ...], list[str]] = {}
        for name, module in stacked.modules.items():
            shapes = tuple(module.A.shape), tuple(module.B.shape)
            alike.setdefault((*shapes, *module.owner.tolist()), []).append(name)
        self._alike = [
            _Alike(
                names,
                weight=torch.stack([model.get_submodule(name).weight for name in names]),
                A=torch.stack([stacked.modules[name].A for name in names]),
                B=torch.stack([stacked.modules[name].B for name in names]),
                owner=stacked.modules[names[0]].owner,
                groups=torch.tensor([groups.group_of[name] for name in names], device=model.device),
            )
            for names in alike.values()
        ]

    def table(self, coefficients: ArrayLike) -> Tensor:
        """Return coefficients (..., n_groups, n_adapters) on the model's device, in its type."""
        return torch.as_tensor(coefficients).to(self._device, self._dtype)

    def fold(self, table: Tensor) -> dict[str, Tensor]:
        """Return the merged weights of coefficients (n_groups, n_adapters) from `table`."""
        weights: dict[str, Tensor] = {}
        for alike in self._alike:
            c = table[alike.groups][:, alike.owner]  # (n_modules, total_rank)
            folded = torch.baddbmm(alike.weight, alike.B * c[:, None], alike.A)
            weights |= dict(zip((f"{name}.weight" for name in alike.names), folded.unbind(), strict=True))
        return weights


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """The prompts of one forward pass."""

    ids: Tensor
    """(n_rows, longest)."""
    columns: Tensor
    """(n_columns,) positions that some row scores."""
    row_of: Tensor
    """(n_scored,) of each scored position; `column_of` likewise."""
    column_of: Tensor
    at: Tensor
    """(n_scored,) where it stands among all prompts' scored positions."""


class Yardstick:
    """A set of prompts, and what is wanted at their scored positions."""

    def __init__(self, model: Any, prompts: PromptSet, signals: ExpertSignals, tokens: int) -> None:
        """Lay out the forward passes, each of so many `tokens`, padding included."""
        self._model, self._signals = model, signals
        n_scored = [len(scored) for scored in prompts.scored]
        places = torch.split(torch.arange(sum(n_scored)), n_scored)
        self._batches: list[_Batch] = []
        TokenBudget(tokens).run(
            [len(ids) for ids in prompts.ids],
            lambda rows: self._batches.append(_lay_out(prompts, rows, places, model.device)),
        )

    @torch.no_grad()
    def measure(self, weights: dict[str, Tensor], objectives: Sequence[str]) -> Tensor:
        """Return what each objective says at each scored position, (n_objectives, n_scored), on the device.

        Args:
            weights: by name, in place of the model's own.
            objectives: keys of search.objective.OBJECTIVES.
        """
        signals, found = self._signals, None
        for batch in self._batches:
            inputs = {"input_ids": batch.ids, "logits_to_keep": batch.columns, "use_cache": False}
            logits = functional_call(self._model, weights, (), inputs, tie_weights=False).logits
            scored = logits[batch.row_of, batch.column_of]  # (n_scored, n_vocab)
            logp = scored.to(at_least_float32(scored.dtype)).log_softmax(-1)
            target, tokens = signals.logp(batch.at), signals.next_tokens[batch.at]
            values = torch.stack([disagreement(name, logp, target, tokens) for name in objectives])
            if found is None:
                found = values.new_empty(len(objectives), len(signals.next_tokens))
            found[:, batch.at] = values
        if found is None:
            raise ValueError("no prompts to measure on")
        return found


def _lay_out(prompts: PromptSet, rows: list[int], places: Sequence[Tensor], device: torch.device) -> _Batch:
    longest = max(len(prompts.ids[row]) for row in rows)
    ids = [[*prompts.ids[row], *[0] * (longest - len(prompts.ids[row]))] for row in rows]
    positions = torch.tensor([position for row in rows for position in prompts.scored[row]])
    columns, column_of = torch.unique(positions, return_inverse=True)
    row_of = torch.repeat_interleave(torch.tensor([len(prompts.scored[row]) for row in rows]))
    at = torch.cat([places[row] for row in rows])
    parts = (torch.tensor(ids), columns, row_of, column_of, at)
    return _Batch(*(part.to(device) for part in parts))


class Means:
    """Means over the positions that share a label; the same on every call, on a GPU too."""

    def __init__(self, labels: Sequence[int], size: int, device: torch.device) -> None:
        """Take a label below `size` for each position, -1 for those that count nowhere.

        Raises:
            ValueError: if a label has no position.
        """
        label_of = torch.tensor(labels)
        own = [torch.nonzero(label_of == label)[:, 0] for label in range(size)]
        if not all(map(len, own)):
            raise ValueError("a label without a position has no mean")
        padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=len(label_of))
        self._places = padded.to(device)  # (size, most); the place behind the last holds a zero
        self._counts = torch.tensor([len(places) for places in own]).to(device)

    def __call__(self, values: Tensor) -> Tensor:
        """Return means (..., size) of values (..., n_positions)."""
        padded = torch.nn.functional.pad(values, (0, 1))
        return padded[..., self._places].sum(-1) / self._counts
