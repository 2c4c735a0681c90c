"""Run a model whose every row of the batch obeys its own mixture of adapters, without touching a weight.

Knows stacks, groups and modules by name; not prompts, losses or candidates.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from search.groups import Groups
from search.stack import StackedFactors, StackedModule, at_least_float32, delta_weight, mix_hidden


@contextmanager
def population(
    model: nn.Module, stacked: StackedFactors, coefficients: Tensor, groups: Groups
) -> Iterator[nn.Module]:
    """Within the context, row r of every forward pass (and of `generate`) runs under coefficients[r].

    Each touched layer's output W x gains B (c * (A x)), computed in the model's type; a row of zeros is the
    base itself, bit for bit. Gradients flow into `coefficients`. Leaving restores the model, also after an
    exception.

    Args:
        model: any causal language model; its Linear and Conv1D layers are found by name.
        stacked: factors on the model's device and in its type.
        coefficients: (n_rows, n_groups, n_adapters).
        groups: which row of the coefficients each module obeys.

    Raises:
        ValueError: shapes or names that do not fit; in a forward pass, another number of rows.
    """
    expected = (len(groups.names), stacked.n_adapters)
    if coefficients.ndim != 3 or coefficients.shape[1:] != expected:
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)}, expected (n_rows, n_groups, n_adapters) = "
            f"(n_rows, {expected[0]}, {expected[1]})"
        )
    unknown = [name for name in stacked.modules if name not in groups.group_of]
    if unknown:
        raise ValueError(f"module {unknown[0]!r} of the adapters is missing in the groups")
    layers = {name: _find_layer(model, name) for name in stacked.modules}
    of_group = _split_groups(stacked, coefficients)
    with ExitStack() as undo:
        for name, (parent, attribute, layer) in layers.items():
            mixed = MixedLinear(name, layer, stacked.modules[name], *of_group[groups.group_of[name]])
            undo.callback(setattr, parent, attribute, layer)
            setattr(parent, attribute, mixed)
        yield model


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, without waiting for what it is doing where no gradient has to come back."""
    if device.type != "cuda" or tensor.device == device or tensor.requires_grad:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be pinned


def _find_layer(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    """Return the module that holds a layer, as which attribute, and the layer; faster than get_submodule."""
    above, _, attribute = name.rpartition(".")
    try:
        parent = attrgetter(above)(model) if above else model
        return parent, attribute, getattr(parent, attribute)
    except AttributeError as error:
        raise ValueError(f"module {name!r} of the adapters is missing in the model") from error


def _split_groups(stacked: StackedFactors, coefficients: Tensor) -> list[tuple[Tensor, bool]]:
    """Return each group's coefficients (n_rows, n_adapters) on the device, and whether all are zero."""
    if not stacked.modules:
        return []
    first = next(iter(stacked.modules.values()))
    idle = (~(coefficients != 0).any(dim=2).any(dim=0)).tolist()  # (n_groups,)
    wide = send(coefficients.to(at_least_float32(first.A.dtype)), first.A.device)
    return [
        (wide[:, group].contiguous(), flag and not coefficients.requires_grad)
        for group, flag in enumerate(idle)
    ]


@torch.library.custom_op("concord::add_product_", mutates_args={"output"})
def _add_product_(output: Tensor, hidden: Tensor, B: Tensor) -> None:
    """Add hidden (..., total_rank) @ B.T to output (..., d_out) in place; B is (d_out, total_rank).

    One operation to a compiler, which would copy what `addmm_` adds to.
    """
    output.view(-1, output.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), B.T)


class MixedLinear(nn.Module):
    """A linear layer whose output W x gains B (c * (A x)), with a c of its own for each row of the batch."""

    def __init__(
        self, name: str, layer: nn.Module, module: StackedModule, coefficients: Tensor, idle: bool
    ) -> None:
        """Wrap; nothing is copied.

        Args:
            name: for errors.
            layer: Linear or Conv1D.
            module: its stack.
            coefficients: (n_rows, n_adapters), on the stack's device, in float32 at least.
            idle: all are zero, so that an uncompiled pass may skip the product.
        """
        super().__init__()
        self.name, self.layer, self.module = name, layer, module
        self.coefficients, self.idle = coefficients, idle

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n_rows, n_tokens, d_in) to (n_rows, n_tokens, d_out)."""
        n_rows = self.coefficients.shape[0]
        if x.ndim != 3 or x.shape[0] != n_rows:
            raise ValueError(
                f"{self.name}: input of shape {tuple(x.shape)}, expected (n_rows, n_tokens, d_in) "
                f"with n_rows = {n_rows}: one row of the batch for each row of the coefficients"
            )
        output: Tensor = self.layer(x)
        compiling = torch.compiler.is_compiling()
        if not compiling and self.idle:
            return output
        c = self.coefficients[:, self.module.owner]  # (n_rows, total_rank)
        hidden = mix_hidden(x, self.module, c)
        if compiling and not torch.is_grad_enabled():
            _add_product_(output, hidden, self.module.B)
        else:  # in place: no second copy of the output
            output.view(-1, output.shape[-1]).addmm_(hidden.flatten(0, 1), self.module.B.T)
        return output


def folded_weights(model: nn.Module, updates: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return weights by name, for `functional_call`: each named module's own plus an update (d_out, d_in).

    What every row shares costs less so, where a forward pass costs by the token (on a CPU).
    """
    weights = {}
    for name, update in updates:
        layer: Any = model.get_submodule(name)
        folded = layer.weight + (update.T if isinstance(layer, Conv1D) else update)
        weights[f"{name}.weight"] = folded.to(layer.weight.dtype)
    return weights


def mixed_weights(
    model: nn.Module, stacked: StackedFactors, mixture: Tensor, groups: Groups
) -> dict[str, Tensor]:
    """Return the weights, by name, of the model with the mixture (n_groups, n_adapters) added to its own."""
    mixed = (
        (name, delta_weight(module, mixture[groups.group_of[name]]))
        for name, module in stacked.modules.items()
    )
    return folded_weights(model, mixed)
