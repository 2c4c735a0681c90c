"""Run a model whose every row of the batch obeys its own mixture of adapters, without touching a weight.

Knows stacks, groups and modules by name; not prompts, losses or candidates.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from search.groups import Groups
from search.stack import StackedFactors, StackedModule, at_least_float32, delta_weight, mix_hidden

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


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
    layers = dict(model.named_modules())
    unknown = [name for name in stacked.modules if name not in layers or name not in groups.group_of]
    if unknown:
        raise ValueError(f"module {unknown[0]!r} of the adapters is missing in the model or in the groups")
    with ExitStack() as undo:
        for name, hook in _make_hooks(stacked, coefficients, groups).items():
            undo.callback(layers[name].register_forward_hook(hook).remove)
        yield model


def _make_hooks(stacked: StackedFactors, coefficients: Tensor, groups: Groups) -> dict[str, Hook]:
    """One forward hook a module; in a group that is all zeros it only checks the rows."""
    idle = (~(coefficients != 0).any(dim=2).any(dim=0)).tolist()  # (n_groups,)
    hooks = {}
    for name, module in stacked.modules.items():
        group = groups.group_of[name]
        wide = coefficients[:, group].to(module.A.device, at_least_float32(module.A.dtype))
        c = wide[:, module.owner]  # (n_rows, total_rank)
        hooks[name] = _make_hook(name, module, c, idle[group] and not coefficients.requires_grad)
    return hooks


def _make_hook(name: str, module: StackedModule, c: Tensor, idle: bool) -> Hook:
    n_rows = c.shape[0]

    def add_delta(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = inputs[0]  # (n_rows, n_tokens, d_in)
        if x.ndim != 3 or x.shape[0] != n_rows:
            raise ValueError(
                f"{name}: input of shape {tuple(x.shape)}, expected (n_rows, n_tokens, d_in) "
                f"with n_rows = {n_rows}: one row of the batch for each row of the coefficients"
            )
        if not idle:
            hidden = mix_hidden(x, module, c).flatten(0, 1)
            output.view(-1, output.shape[-1]).addmm_(
                hidden, module.B.T
            )  # in place: no second copy of the output
        return None

    return add_delta


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
