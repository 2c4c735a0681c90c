"""Controls of a searched merge: the same coefficients in the wrong places.

Pure numpy: knows a table of coefficients; not adapters, groups, or how good the merge is. Where such a merge
is as good as the searched one, what counts is how large coefficients are, not which expert has which, where.
"""

import numpy as np
from numpy.typing import NDArray

from search.space import FloatArray


def permuted_coefficients(
    coefficients: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray | None]:
    """Return a merge's table (n_groups, n_adapters) with its adapters permuted, and one with its groups.

    In the first every adapter has another one's column, in all groups the same one's; in the second, None
    where there is only one group, every group has another one's row. No column, or row, stays in its place.

    Raises:
        ValueError: for fewer than two adapters.
    """
    n_groups, n_adapters = coefficients.shape
    if n_adapters < 2:
        raise ValueError(
            f"coefficients have shape {coefficients.shape}, expected at least 2 adapters: "
            "one alone cannot change places"
        )
    by_adapter = coefficients[:, _draw_cycle(n_adapters, rng)]
    return by_adapter, coefficients[_draw_cycle(n_groups, rng)] if n_groups > 1 else None


def _draw_cycle(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the sources (n,) of a random permutation that is one cycle, so that nothing stays."""
    order = rng.permutation(n)
    source = np.empty(n, dtype=np.int64)
    source[order] = np.roll(order, 1)
    return source
