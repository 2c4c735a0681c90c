"""Layers of one input, compiled: one product A x for them all, and W x + B h as one product, [W B] [x h].

Knows a model's layers and stacks by name; not prompts, candidates or compilers. A sum is rounded once so,
where a GPU rounds a product before adding it to another, and a wide output is not read and written again.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from search.population import MixedLinear, is_compiling
from search.stack import StackedFactors, StackedModule, mix_hidden

OF_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What models call the layers that one input goes to, in the order in which they call them. A model that has
such names for layers of several inputs loses time, but no digits."""
_ALIGNED_BYTES = 128
"""A row of [W B] begins at a multiple of so many; products were seen to take longer where it did not."""


class SharedInput:
    """The layers that one input goes to, and c * (A x) of them all, taken when the first is called."""

    def __init__(self, A: Tensor) -> None:
        """Take the layers' A, one under another: (sum of their total ranks, d_in)."""
        self.A = A
        self.layers: list[JoinedLinear] = []
        """In the order of A."""
        self._x: Tensor | None = None
        self._hidden: tuple[Tensor, ...] = ()

    def hidden_of(self, place: int, x: Tensor) -> Tensor:
        """Return c * (A x), (n_rows, n_tokens, total_rank), of the layer at a place.

        The first takes it anew, also for a tensor that it had before: coefficients or content may be others.
        """
        if place == 0 or self._x is not x:
            c = torch.cat([layer.coefficients[:, layer.module.owner] for layer in self.layers], dim=1)
            ranks = [len(layer.module.owner) for layer in self.layers]
            self._x, self._hidden = x, torch.split(mix_hidden(x, self.A, c), ranks, dim=-1)
        found = self._hidden[place]
        if place == len(self.layers) - 1:  # the last to be called: nothing is kept
            self._x, self._hidden = None, ()
        return found


class JoinedLinear(MixedLinear):
    """A mixed layer that, while compiled, is one product of joined factors."""

    def __init__(
        self, name: str, layer: nn.Module, module: StackedModule, shared: SharedInput, joined: Tensor
    ) -> None:
        """Wrap a Linear without bias, its input's next; joined, [W B], is (d_out, d_in + total_rank)."""
        super().__init__(name, layer, module)
        self.joined = joined
        self._shared, self._place = shared, len(shared.layers)
        shared.layers.append(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n_rows, n_tokens, d_in) to (n_rows, n_tokens, d_out)."""
        if not is_compiling():
            return super().forward(x)
        self.check_rows(x)
        return F.linear(torch.cat([x, self._shared.hidden_of(self._place, x)], dim=-1), self.joined)


@torch.no_grad()
def join_inputs(model: nn.Module, stacked: StackedFactors) -> dict[str, MixedLinear]:
    """Join the factors of layers for which that pays; return what is to be put in these layers' places.

    It costs to copy an input, and saves to read and write again what its layers put out: it pays where they
    put out more than they read. Nothing is held twice: weights of `model` and factors of `stacked`, with the
    values that they have, become views of what is joined.

    Args:
        model: its layers are found by name.
        stacked: factors on the model's device and in its type.
    """
    if not all(weight.is_contiguous() for weight in model.parameters()):
        gc.collect()  # what an earlier search joined are layers that hold each other, and these weights
    joined: dict[str, MixedLinear] = {}
    for names in _share_inputs(stacked):
        own = [MixedLinear(name, model.get_submodule(name), stacked.modules[name]) for name in names]
        if all(mixed.is_plain for mixed in own) and _pays([mixed.module for mixed in own]):
            shared, start = SharedInput(torch.cat([mixed.module.A for mixed in own])), 0
            for mixed in own:
                total_rank, d_in = mixed.module.A.shape
                factors = _concatenate(mixed.layer.get_parameter("weight"), mixed.module.B)
                A, B = shared.A[start : start + total_rank], factors[:, d_in:]
                mixed.layer.get_parameter("weight").data = factors[:, :d_in]
                stacked.modules[mixed.name] = module = replace(mixed.module, A=A, B=B)
                joined[mixed.name] = JoinedLinear(mixed.name, mixed.layer, module, shared, factors)
                start += total_rank
    return joined


def _share_inputs(stacked: StackedFactors) -> list[list[str]]:
    """Return the names of modules, those of one input together and in the order of their calls."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in stacked.modules:
        above, _, last = name.rpartition(".")
        siblings = next((names for names in OF_ONE_INPUT if last in names), (last,))
        found.setdefault((above, siblings), []).append(name)
    return [
        sorted(names, key=lambda name: siblings.index(name.rpartition(".")[2]))
        for (_, siblings), names in found.items()
    ]


def _pays(modules: Sequence[StackedModule]) -> bool:
    """Say whether modules can have one input, and put out more than they read."""
    widths = {module.A.shape[1] for module in modules}
    return len(widths) == 1 and sum(len(module.B) for module in modules) > min(widths)


def _concatenate(weight: Tensor, B: Tensor) -> Tensor:
    """Return [W B] (d_out, d_in + total_rank), its rows aligned."""
    d_in, end = weight.shape[1], weight.shape[1] + B.shape[1]
    aligned = _ALIGNED_BYTES // weight.dtype.itemsize
    joined = weight.new_zeros(len(weight), -(-end // aligned) * aligned)
    joined[:, :d_in], joined[:, d_in:end] = weight, B
    return joined[:, :end]
