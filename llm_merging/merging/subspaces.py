"""Singular vectors of LoRA updates, from their factors: no dense update is decomposed.

Knows adapters and linear algebra in float64; not what a merge makes of the vectors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from search.adapters import Adapter

_SMALLEST = 1e-10
"""Singular values below this share of the largest are rounding: their vectors are arbitrary, and dropped."""


class LowRank(NamedTuple):
    """An update B @ A, the scaling in B."""

    B: Tensor
    """(d_out, rank) float64."""
    A: Tensor
    """(rank, d_in) float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """Return B @ A, (d_out, d_in)."""
        return self.B @ self.A


class Svd(NamedTuple):
    """U @ diag(s) @ V, singular values falling and none of them zero."""

    U: Tensor
    """(d_out, k)."""
    s: Tensor
    """(k,)."""
    V: Tensor
    """(k, d_in)."""


def low_rank_updates(
    adapters: Sequence[Adapter], module: str, device: torch.device | str = "cpu"
) -> list[LowRank]:
    """Return the updates of those adapters that touch the module, in their order."""
    present = [adapter.modules[module] for adapter in adapters if module in adapter.modules]
    return [
        LowRank(f.B.to(device, torch.float64) * f.scaling, f.A.to(device, torch.float64)) for f in present
    ]


def add_updates(updates: Sequence[LowRank]) -> LowRank:
    """Return the exact sum: ranks side by side."""
    return LowRank(torch.cat([u.B for u in updates], dim=1), torch.cat([u.A for u in updates]))


def thin_svd(update: LowRank) -> Svd:
    """Decompose B @ A through the QR of both factors, at the cost of rank x rank; k is the numerical rank."""
    Q_out, R_out = torch.linalg.qr(update.B)
    Q_in, R_in = torch.linalg.qr(update.A.T)
    U, s, V = _supported(R_out @ R_in.T)
    return Svd(Q_out @ U, s, V @ Q_in.T)


def column_space(matrix: Tensor) -> Tensor:
    """Return the left singular vectors (d, k) of a matrix (d, n), k its numerical rank."""
    return _supported(matrix).U


def closest_isometry(columns: Tensor) -> Tensor:
    """Return the matrix (d, n) of orthonormal columns that is closest to `columns`: orthogonal Procrustes.

    It is P Q^T of the SVD P D Q^T. Where columns depend on each other it is not unique; then the directions
    without singular value are left out, so that equal columns share one direction.
    """
    P, _, Q = _supported(columns)
    return P @ Q


def flatten_spectrum(update: LowRank) -> LowRank:
    """Return B @ A with each singular value that is not zero replaced by their mean."""
    U, s, V = thin_svd(update)
    return LowRank(U * s.mean(), V)


def _supported(matrix: Tensor) -> Svd:
    U, s, V = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > _SMALLEST * s[:1]
    return Svd(U[:, kept], s[kept], V[kept])
