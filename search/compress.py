"""Cut a merged adapter to a smaller rank, module by module, as well as that rank allows.

Knows factors A and B; not where they come from, nor files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from search.errors import InputError
from search.merge import MergedAdapter, pack_adapter


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """An adapter of smaller rank, and what it left out."""

    merged: MergedAdapter
    errors: dict[str, float]
    """Module -> Frobenius norm of what was left out, over that of its update; 0 where nothing was."""
    relative_error: float
    """The same over all modules together."""

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the largest error, the first by name of several, and its error."""
        return max(sorted(self.errors.items()), key=lambda named: named[1])


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    A: Tensor
    B: Tensor
    lost: float
    """Squared Frobenius norm of what was left out."""
    whole: float
    """Squared Frobenius norm of the update."""


def compress_adapter(merged: MergedAdapter, rank: int, *, dtype: torch.dtype | None = None) -> Compressed:
    """Replace each update B A by the nearest one of `rank` (Eckart & Young 1936); smaller ones stay as are.

    Errors are those of the cut, from the singular values left out; rounding to `dtype` comes on top.

    Args:
        dtype: of the result's tensors; default: the type that they have.

    Raises:
        InputError: for a rank below 1.
    """
    if rank < 1:
        raise InputError(f"--rank: found {rank}, expected a whole number from 1. Give a larger rank.")
    cuts = {name: _cut(A, B, rank) for name, (A, B) in merged.modules.items()}
    lost, whole = sum(cut.lost for cut in cuts.values()), sum(cut.whole for cut in cuts.values())
    some = next(iter(merged.state_dict.values()))
    base_name = merged.config["base_model_name_or_path"]
    packed = pack_adapter(
        {name: (cut.A, cut.B) for name, cut in cuts.items()}, base_name, dtype or some.dtype
    )
    return Compressed(
        packed, {name: _relative(cut.lost, cut.whole) for name, cut in cuts.items()}, _relative(lost, whole)
    )


def _cut(A: Tensor, B: Tensor, rank: int) -> _Cut:
    """Cut one module, A (total_rank, d_in) and B (d_out, total_rank), without forming B A.

    B = Q_B R_B and A^T = Q_A R_A give B A = Q_B (R_B R_A^T) Q_A^T, whose singular values are those of the
    small core. In float64: where adapters nearly cancel, float32 would round away what is left, and the core
    is so small that it costs little.
    """
    Q_B, R_B = torch.linalg.qr(B.double())  # (d_out, k_B), (k_B, total_rank)
    Q_A, R_A = torch.linalg.qr(A.double().T)  # (d_in, k_A), (k_A, total_rank)
    core = R_B @ R_A.T  # (k_B, k_A)
    if A.shape[0] <= rank:
        return _Cut(A, B, 0.0, float(core.square().sum()))
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    left, right = Q_B @ U[:, :rank], Vh[:rank] @ Q_A.T
    sign = _column_signs(left)
    root = S[:rank].sqrt()  # half to each side, so that neither overflows a narrow type
    powers = S.square()
    return _Cut(
        (root * sign)[:, None] * right, left * (root * sign), float(powers[rank:].sum()), float(powers.sum())
    )


def _column_signs(matrix: Tensor) -> Tensor:
    """(n_columns,) of 1 or -1, to make each column's largest entry positive: equal updates, equal factors."""
    largest = matrix.abs().argmax(dim=0, keepdim=True)
    return torch.where(matrix.gather(0, largest)[0] < 0, -1.0, 1.0).to(matrix.dtype)


def _relative(lost: float, whole: float) -> float:
    """Ratio of two squared norms, as a ratio of norms; 0 of nothing is 0."""
    return (lost / whole) ** 0.5 if whole else 0.0
