"""Smooth factors over the depth of a model that multiply an adapter's weight.

Pure numpy: knows depths, knots and tables of coefficients; not genomes or modules.
"""

import numpy as np
from numpy.typing import NDArray

LEVEL_SHARE = 0.1
"""A table's mean is its weight, unless it is a smaller share than this of its root mean square."""
NEGLIGIBLE = 1e-9
"""A root mean square of coefficients that shows no profile."""


def make_windows(depths: NDArray[np.float64], n_knots: int) -> NDArray[np.float64]:
    """Return (n_rows, n_knots): how much each knot counts at each depth (n_rows,) in [0, 1].

    Knot k sits at t_k = k h, with h = 1 / (n_knots - 1), and counts (1 + cos(pi (d - t_k) / h)) / 2 within h
    of it, 0 farther away. At every depth the windows add up to 1, so that a factor stays within the range of
    its knots.
    """
    offsets = depths[:, None] * (n_knots - 1) - np.arange(n_knots)
    return (1 + np.cos(np.pi * np.clip(offsets, -1, 1))) / 2


def fit_weights(table: NDArray[np.float64], *, is_shared: bool, is_signed: bool) -> NDArray[np.float64]:
    """Return the weights (n_adapters,) to put before profiles, for coefficients (n_rows, n_adapters).

    A weight is the mean over rows. Where that all but vanishes because the coefficients change their sign, it
    is their root mean square, lest the profile that is left be huge.

    Args:
        table: coefficients.
        is_shared: all adapters have one profile, so their weights keep the proportions and signs of the best
            approximation of rank one.
        is_signed: without it weights are positive where that is possible, and the profile takes the sign.
    """
    means, sizes = table.mean(axis=0), np.sqrt((table**2).mean(axis=0))
    if is_shared:
        direction = np.linalg.svd(table, full_matrices=False)[2][0]
        has_level = np.linalg.norm(means) >= LEVEL_SHARE * np.linalg.norm(sizes)
        weights: NDArray[np.float64] = means if has_level else np.sign(direction) * sizes
        return weights if is_signed or weights.sum() >= 0 else -weights
    weights = np.where(np.abs(means) >= LEVEL_SHARE * sizes, means, sizes)
    return weights if is_signed else np.abs(weights)


def fit_knots(
    table: NDArray[np.float64],
    weights: NDArray[np.float64],
    windows: NDArray[np.float64],
    *,
    is_shared: bool,
) -> NDArray[np.float64]:
    """Return knots (n_knots, n_adapters), or (n_knots, 1) for a shared profile, by least squares.

    Of all knots that fit coefficients / weights equally well they are those closest to 1: what no row tells
    is left flat, and so is the profile of an adapter whose coefficients are all 0.
    """
    sizes = np.sqrt((table**2).mean(axis=0))
    if is_shared:
        sizes = sizes.max(keepdims=True)
        table, weights = (table @ weights)[:, None], np.array([weights @ weights])
    has_profile = sizes > NEGLIGIBLE
    factors = np.where(has_profile, table / np.where(has_profile, weights, 1.0), 1.0)
    deviations: NDArray[np.float64] = np.linalg.lstsq(windows, factors - 1, rcond=None)[0]
    return 1 + deviations
