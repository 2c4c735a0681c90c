"""Translate the optimiser's flat vectors (genomes) into merging coefficients, and back.

Pure numpy: knows groups of modules, adapters and boxes; not models, losses or optimisers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.groups import Groups

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """A box of coefficients (n_groups, n_adapters); a genome is its rows laid end to end, unbounded.

    Bounds apply when decoding, not to the genome, so the optimiser works in a free space.
    """

    groups: Groups
    n_adapters: int
    low: FloatArray
    """(n_adapters,) lower bound of each adapter's coefficients, -inf where free."""
    high: FloatArray
    """(n_adapters,) upper bound, inf where free."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n_groups, n_adapters)."""
        return len(self.groups.names), self.n_adapters

    @property
    def n_params(self) -> int:
        """Length of a genome."""
        return len(self.groups.names) * self.n_adapters

    def to_coefficients(self, genomes: ArrayLike) -> FloatArray:
        """Decode (n_candidates, n_params) into (n_candidates, n_groups, n_adapters), clipped to the box.

        Raises:
            ValueError: on another shape, or on a value that is not finite.
        """
        vectors = np.asarray(genomes, dtype=np.float64)
        if vectors.ndim != 2 or vectors.shape[1] != self.n_params:
            raise ValueError(
                f"genomes have shape {vectors.shape}, expected (n_candidates, {self.n_params}): "
                f"{len(self.groups.names)} groups x {self.n_adapters} adapters. Pass one as genome[None]."
            )
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"{np.sum(~np.isfinite(vectors))} of {vectors.size} genome values are not finite"
            )
        return np.clip(vectors.reshape(-1, *self.shape), self.low, self.high)

    def to_genome(self, coefficients: ArrayLike) -> FloatArray:
        """Encode coefficients (n_groups, n_adapters) as a genome (n_params,), without clipping."""
        table = np.array(coefficients, dtype=np.float64)
        if table.shape != self.shape:
            raise ValueError(
                f"coefficients have shape {table.shape}, expected (n_groups, n_adapters) = {self.shape}"
            )
        return table.reshape(-1)

    def constant(self, value: float) -> FloatArray:
        """Return the genome (n_params,) that gives every adapter the same coefficient in every group."""
        return np.full(self.n_params, value, dtype=np.float64)


def make_space(
    groups: Groups, n_adapters: int, *, low: ArrayLike = -np.inf, high: ArrayLike = np.inf
) -> Space:
    """Build a space; `low` and `high` are one number for all adapters, or one each.

    Raises:
        ValueError: when there is no adapter, or a lower bound lies above its upper bound.
    """
    if n_adapters < 1:
        raise ValueError(f"n_adapters is {n_adapters}, expected at least 1")
    lower = np.broadcast_to(np.asarray(low, dtype=np.float64), (n_adapters,)).copy()
    upper = np.broadcast_to(np.asarray(high, dtype=np.float64), (n_adapters,)).copy()
    if not (lower <= upper).all():
        raise ValueError(f"lower bounds {lower.tolist()} exceed upper bounds {upper.tolist()}")
    return Space(groups, n_adapters, lower, upper)
