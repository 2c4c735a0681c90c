"""Run a model whose every row of the batch obeys its own mixture of adapters, without touching a weight.

Knows stacks, groups and modules by name; not prompts, losses or candidates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from search.groups import Groups
from search.stack import StackedFactors, StackedModule, at_least_float32, delta_weight, mix_hidden


class Mixtures:
    """A model's touched layers, wrapped once: what a pass costs before its first product is kept small."""

    def __init__(self, model: nn.Module, stacked: StackedFactors, groups: Groups) -> None:
        """Find the layers; the model, bare now, stays as it is.

        Args:
            model: any causal language model; its Linear and Conv1D layers are found by name.
            stacked: factors on the model's device and in its type.
            groups: which row of the coefficients each module obeys.

        Raises:
            ValueError: names that do not fit.
        """
        unknown = [name for name in stacked.modules if name not in groups.group_of]
        if unknown:
            raise ValueError(f"module {unknown[0]!r} of the adapters is missing in the groups")
        self._model, self._stacked = model, stacked
        self._expected = len(groups.names), stacked.n_adapters
        self._places = []
        for name, module in stacked.modules.items():
            siblings, attribute, layer = _find_layer(model, name)
            place = siblings, attribute, layer, MixedLinear(name, layer, module), groups.group_of[name]
            self._places.append(place)

    def rewrap(self, layers: Mapping[str, "MixedLinear"]) -> None:
        """Run modules, by name, through other mixed layers from here on."""
        self._places = [
            (siblings, attribute, layer, layers.get(mixed.name, mixed), group)
            for siblings, attribute, layer, mixed, group in self._places
        ]

    @contextmanager
    def active(self, coefficients: Tensor) -> Iterator[nn.Module]:
        """Within the context, row r of every forward pass (and of `generate`) runs under coefficients[r].

        Each touched layer's output W x gains B (c * (A x)), computed in the model's type; a row of zeros is
        the base itself, on a CPU bit for bit. Gradients flow into `coefficients`. Leaving restores the model,
        also after an exception.

        Args:
            coefficients: (n_rows, n_groups, n_adapters).

        Raises:
            ValueError: another shape; in a forward pass, another number of rows.
        """
        if coefficients.ndim != 3 or coefficients.shape[1:] != self._expected:
            raise ValueError(
                f"coefficients have shape {tuple(coefficients.shape)}, expected (n_rows, n_groups, "
                f"n_adapters) = (n_rows, {self._expected[0]}, {self._expected[1]})"
            )
        of_group = _split_groups(self._stacked, coefficients)
        try:
            for siblings, attribute, _, mixed, group in self._places:
                mixed.coefficients, mixed.idle = of_group[group]
                siblings[attribute] = mixed
            yield self._model
        finally:
            for siblings, attribute, layer, _, _ in self._places:
                siblings[attribute] = layer


def population(
    model: nn.Module, stacked: StackedFactors, coefficients: Tensor, groups: Groups
) -> AbstractContextManager[nn.Module]:
    """Return the context of `Mixtures.active`, for a model that is run under few coefficients."""
    return Mixtures(model, stacked, groups).active(coefficients)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, without waiting for what it is doing where no gradient has to come back."""
    if device.type != "cuda" or tensor.device == device or tensor.requires_grad:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be pinned


def _find_layer(model: nn.Module, name: str) -> tuple[dict[str, nn.Module | None], str, nn.Module]:
    """Return the modules that a layer is one of, by name, its name among them, and the layer."""
    above, _, attribute = name.rpartition(".")
    try:
        return model.get_submodule(above)._modules, attribute, model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"module {name!r} of the adapters is missing in the model") from error


def _split_groups(stacked: StackedFactors, coefficients: Tensor) -> list[tuple[Tensor, bool]]:
    """Return each group's coefficients (n_rows, n_adapters) on the device, and whether all are zero."""
    if not stacked.modules:
        return []
    first = next(iter(stacked.modules.values()))
    idle = (~(coefficients != 0).any(dim=2).any(dim=0)).tolist()  # (n_groups,)
    by_group = coefficients.transpose(0, 1).to(at_least_float32(first.A.dtype)).contiguous()
    free = coefficients.requires_grad
    return [
        (own, flag and not free)
        for own, flag in zip(send(by_group, first.A.device).unbind(), idle, strict=True)
    ]


HAS_CUSTOM_OPS = hasattr(torch.library, "custom_op")
"""Not before torch 2.4, where nothing is compiled."""


def _custom_op(name: str, mutated: str, schema: str) -> Callable[[Any], Any]:
    """Have a compiler take a function as one operation; the schema, since annotations may be unevaluated."""
    if HAS_CUSTOM_OPS:
        return torch.library.custom_op(name, mutates_args={mutated}, schema=schema)
    return lambda function: function


@_custom_op("concord::add_product_", "output", "(Tensor(a!) output, Tensor x, Tensor weight) -> ()")
def _add_product_(output: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add x (..., d) @ weight.T to output (..., d_out) in place; weight is (d_out, d).

    One operation to a compiler, which would copy what `addmm_` adds to.
    """
    _add_product(output, x, weight)


def _add_product(output: Tensor, x: Tensor, weight: Tensor) -> None:
    """As `_add_product_`, with a gradient."""
    output.view(-1, output.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.T)


class MixedLinear(nn.Module):
    """A linear layer whose output W x gains B (c * (A x)), with a c of its own for each row of the batch."""

    def __init__(self, name: str, layer: nn.Module, module: StackedModule) -> None:
        """Wrap a Linear or Conv1D, named for errors, and its stack; nothing is copied."""
        super().__init__()
        self.name, self.layer, self.module = name, layer, module
        self.is_plain = type(layer) is nn.Linear and layer.bias is None
        """The layer's product can be added to the mixture's, which is the smaller one: their sum is rounded
        once and only the small part twice, so that in bfloat16 a mixture costs next to no accuracy."""
        self.coefficients = torch.empty(0, 0)
        """(n_rows, n_adapters), on the stack's device, float32 at least. Set for each pass."""
        self.idle = False
        """All are zero, so that an uncompiled pass may skip the product."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n_rows, n_tokens, d_in) to (n_rows, n_tokens, d_out)."""
        self.check_rows(x)
        compiling = is_compiling()
        if not compiling and self.idle:
            return self.layer(x)  # type: ignore[no-any-return]
        c = self.coefficients[:, self.module.owner]  # (n_rows, total_rank)
        hidden = mix_hidden(x, self.module.A, c)
        add = _add_product_ if compiling and not torch.is_grad_enabled() else _add_product
        output: Tensor
        if self.is_plain:
            output = F.linear(hidden, self.module.B)
            add(output, x, self.layer.get_parameter("weight"))
        else:
            output = self.layer(x)
            add(output, hidden, self.module.B)
        return output

    def check_rows(self, x: Tensor) -> None:
        """Refuse (ValueError) an input whose rows are not as many as the coefficients'."""
        n_rows = self.coefficients.shape[0]
        if x.ndim != 3 or x.shape[0] != n_rows:
            raise ValueError(
                f"{self.name}: input of shape {tuple(x.shape)}, expected (n_rows, n_tokens, d_in) "
                f"with n_rows = {n_rows}: one row of the batch for each row of the coefficients"
            )


def is_compiling() -> bool:
    """Say whether a compiler is tracing what is run."""
    return HAS_CUSTOM_OPS and torch.compiler.is_compiling()


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
