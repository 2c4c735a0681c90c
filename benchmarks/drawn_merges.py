"""Draw merges at random, from several distributions: what a ranking of merges is to be checked on.

Pure numpy: knows tables of coefficients (n_groups, n_adapters); not models, losses or what a search visits.
"""

from collections.abc import Callable

import numpy as np

from search.space import FloatArray

Draw = Callable[[np.random.Generator, FloatArray, FloatArray], FloatArray]
"""(rng, balanced (n_adapters,), depths (n_groups,)) -> coefficients that broadcast to a table."""


def _uniform(rng: np.random.Generator, balanced: FloatArray, depths: FloatArray) -> FloatArray:
    """Around 1 / n, each adapter's coefficient off by a factor of two or so, the same in all groups."""
    n_adapters = len(balanced)
    return np.exp(rng.normal(0, 0.7, n_adapters)) / n_adapters


def _sparse(rng: np.random.Generator, balanced: FloatArray, depths: FloatArray) -> FloatArray:
    """Some adapters only."""
    n_adapters = len(balanced)
    present = rng.permutation(n_adapters) < rng.integers(1, n_adapters, endpoint=True)
    return np.where(present, rng.uniform(0.1, 1.0, n_adapters), 0.0)


def _scaled(rng: np.random.Generator, balanced: FloatArray, depths: FloatArray) -> FloatArray:
    """All adapters nearly alike, at any scale from almost none to the experts' own."""
    return rng.uniform(0.05, 1.0) * np.exp(rng.normal(0, 0.25, len(balanced)))


def _layer(rng: np.random.Generator, balanced: FloatArray, depths: FloatArray) -> FloatArray:
    """Independent noise in every group, negative values too."""
    return rng.normal(rng.uniform(0.2, 0.6), 0.25, (len(depths), len(balanced)))


def _smooth(rng: np.random.Generator, balanced: FloatArray, depths: FloatArray) -> FloatArray:
    """Rising or falling along the depth of the model, each adapter in its own way."""
    middle, slope = rng.uniform(0.15, 0.8, len(balanced)), rng.normal(0, 0.4, len(balanced))
    return middle * (1 + slope * (2 * depths[:, None] - 1))


def _balanced(rng: np.random.Generator, balanced: FloatArray, depths: FloatArray) -> FloatArray:
    """Around the coefficients that give all updates the same norm, off by adapter, by group and in scale."""
    by_adapter = rng.normal(0, 0.3, len(balanced)) + rng.normal(0, 0.3)
    by_group = rng.normal(0, rng.uniform(0, 0.4), (len(depths), len(balanced)))
    return balanced * np.exp(by_adapter + by_group)


KINDS: dict[str, Draw] = {
    "uniform": _uniform,
    "sparse": _sparse,
    "scaled": _scaled,
    "layer": _layer,
    "smooth": _smooth,
    "balanced": _balanced,
}
"""Name of a distribution -> one draw from it."""


def draw_merges(
    n: int, balanced: FloatArray, depths: FloatArray, rng: np.random.Generator
) -> tuple[list[str], FloatArray]:
    """Draw merges from all distributions in turn.

    Args:
        n: how many.
        balanced: (n_adapters,) coefficients under which all updates are equally long.
        depths: (n_groups,) from 0, the first layer, to 1, the last.
        rng: decides.

    Returns:
        The name of each one's distribution (n,), and the tables (n, n_groups, n_adapters).
    """
    shape = len(depths), len(balanced)
    kinds = [list(KINDS)[k % len(KINDS)] for k in range(n)]
    tables = [np.broadcast_to(KINDS[kind](rng, balanced, depths), shape) for kind in kinds]
    return kinds, np.array(tables).reshape(n, *shape)
