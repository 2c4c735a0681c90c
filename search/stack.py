"""Concatenate LoRA factors along the rank axis, so adapters of any rank mix exactly and without padding.

Knows factors and coefficients; not models, groups or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from search.adapters import Adapter, Factors


@dataclass(frozen=True, slots=True, eq=False)
class StackedModule:
    """One module of all adapters that touch it."""

    A: Tensor
    """(total_rank, d_in)."""
    B: Tensor
    """(d_out, total_rank), scaling folded in."""
    owner: Tensor
    """(total_rank,) int64, the adapter index of each rank row."""


@dataclass(frozen=True, slots=True, eq=False)
class StackedFactors:
    """All modules of all adapters."""

    modules: dict[str, StackedModule]
    """Module name -> its stack; a module is here when at least one adapter touches it."""
    names: tuple[str, ...]
    """(n_adapters,) adapter names, in order."""

    @property
    def n_adapters(self) -> int:
        """Number of adapters, whether or not each touches every module."""
        return len(self.names)


def stack_module(factors: Sequence[Factors | None]) -> StackedModule:
    """Stack one module's factors, adapter by adapter; None where an adapter lacks the module.

    With c = coefficients[owner], B @ (c[:, None] * A) equals sum_i coefficients[i] * scaling_i * B_i @ A_i.

    Raises:
        ValueError: no factors at all, unequal ranks in a pair, or widths that differ between adapters.
    """
    present = [(index, f) for index, f in enumerate(factors) if f is not None]
    if not present:
        raise ValueError("no adapter touches this module: nothing to stack")
    widths = {(f.B.shape[0], f.A.shape[1]) for _, f in present}
    if len(widths) > 1:
        raise ValueError(f"widths (d_out, d_in) differ between adapters: {sorted(widths)}")
    for index, f in present:
        if f.A.shape[0] != f.B.shape[1]:
            raise ValueError(f"adapter {index}: A has rank {f.A.shape[0]} but B has rank {f.B.shape[1]}")
    return StackedModule(
        A=torch.cat([f.A for _, f in present]),
        B=torch.cat([f.B * f.scaling for _, f in present], dim=1),
        owner=torch.cat([torch.full((f.A.shape[0],), index, device=f.A.device) for index, f in present]),
    )


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def stack_adapters(
    adapters: Sequence[Adapter], *, device: torch.device | str, dtype: torch.dtype
) -> StackedFactors:
    """Stack every module that any adapter touches, on one device and in one type (the model's)."""
    wide = at_least_float32(dtype)  # scaling is multiplied in before B is rounded to `dtype`

    def stack(name: str) -> StackedModule:
        present = [adapter.modules.get(name) for adapter in adapters]
        moved = [f and Factors(f.A.to(device, wide), f.B.to(device, wide), f.scaling) for f in present]
        module = stack_module(moved)
        return StackedModule(module.A.to(dtype), module.B.to(dtype), module.owner)

    names = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    return StackedFactors({name: stack(name) for name in names}, tuple(adapter.name for adapter in adapters))


def delta_output(x: Tensor, module: StackedModule, coefficients: Tensor) -> Tensor:
    """What the mixture adds to a layer's output: B (c * (A x)), with c = coefficients[row, owner].

    Args:
        x: (n_rows, n_tokens, d_in), the layer's input.
        coefficients: (n_rows, n_adapters).

    Returns:
        (n_rows, n_tokens, d_out)
    """
    return F.linear(mix_hidden(x, module.A, coefficients[:, module.owner]), module.B)


def mix_hidden(x: Tensor, A: Tensor, c: Tensor) -> Tensor:
    """The inner product c * (A x), (n_rows, n_tokens, total_rank), for c (n_rows, total_rank).

    c may be wider than x (float32 beside bfloat16): the product is then taken in c's type and rounded once,
    so that candidates closer than a step of bfloat16 still differ.
    """
    return F.linear(x, A).mul_(c[:, None, :])


def delta_weight(module: StackedModule, coefficients: Tensor) -> Tensor:
    """The dense sum of coefficients[i] * scaling_i * B_i @ A_i, (d_out, d_in); coefficients (n_adapters,)."""
    return (module.B * coefficients[module.owner]) @ module.A
