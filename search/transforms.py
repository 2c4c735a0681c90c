"""Stretch the optimiser's free numbers into coefficients of a sign and a scale, and back.

Pure numpy, element by element: knows numbers; not genomes, groups or adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sign = Literal["signed", "non_negative"]
Scale = Literal["plain", "log"]
Elementwise = Callable[[NDArray[np.float64]], NDArray[np.float64]]

SOFTNESS = 0.1
"""tau: where softplus and sinh bend; well above it they are a line and an exponential."""
MAX_EXPONENT = 60.0
"""e^60 is beyond any merge that a model survives, and still finite in float32."""
SMALL_COEFFICIENT = 1e-3
"""Stands for coefficients <= 0, which no free number gives in a non-negative space."""
N_NODES = 32
"""Of the quadrature over a Gaussian: they reach 10 standard deviations."""


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """An increasing function of every number by itself."""

    forward: Elementwise
    """Free number -> coefficient."""
    inverse: Elementwise
    """Coefficient -> free number, finite for every coefficient above `infimum`."""
    slope: Elementwise
    """Derivative of `forward` at a free number."""
    infimum: float
    """Greatest number below all coefficients."""


def pick_transform(sign: Sign, scale: Scale) -> Transform:
    """Return the transform whose coefficients have this sign, spaced plainly or by their logarithm.

    With tau = SOFTNESS: signed and plain x; non-negative and plain tau log(1 + exp(x / tau)), x itself far
    above 0; signed and log tau sinh(x / tau), logarithmic far from 0 and linear near it; non-negative and
    log exp(x).
    """
    if sign == "signed":
        return _IDENTITY if scale == "plain" else _SINH
    return _SOFTPLUS if scale == "plain" else _EXPONENTIAL


def invert(transform: Transform, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the free numbers that give these coefficients, or SMALL_COEFFICIENT where nothing gives them."""
    return transform.inverse(np.where(values > transform.infimum, values, SMALL_COEFFICIENT))


def match_spread(
    transform: Transform, raw: NDArray[np.float64], spread: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return standard deviations of free numbers around `raw` that let coefficients spread by `spread`.

    For a small spread that is spread / slope. Near the end of a range, where the slope vanishes, that would
    overshoot by orders of magnitude, so the answer is bisected, between bounds that hold for all four
    transforms, with Gauss-Hermite quadrature.

    Args:
        transform: of free numbers into coefficients.
        raw: free numbers, any shape.
        spread: positive, of the same shape.
    """
    if transform is _IDENTITY:
        return spread
    nodes, weights = np.polynomial.hermite_e.hermegauss(N_NODES)
    weights /= weights.sum()
    first_order = spread / np.maximum(transform.slope(raw), 1e-30)
    low, high = np.log(0.1 * np.minimum(first_order, SOFTNESS)), np.log(4 * first_order)
    for _ in range(50):  # from a factor below 1e35 down to rounding
        middle = (low + high) / 2
        coefficients = transform.forward(raw[..., None] + np.exp(middle)[..., None] * nodes)
        deviations = coefficients - (coefficients @ weights)[..., None]
        is_wide = np.sqrt(deviations**2 @ weights) > spread
        low, high = np.where(is_wide, low, middle), np.where(is_wide, middle, high)
    return np.exp((low + high) / 2)


def _softplus(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    return SOFTNESS * np.logaddexp(0.0, raw / SOFTNESS)


def _softplus_inverse(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return value + SOFTNESS * np.log(-np.expm1(-value / SOFTNESS))


def _softplus_slope(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -raw / SOFTNESS))


def _sinh(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    return SOFTNESS * np.sinh(_limit(raw / SOFTNESS))


def _sinh_inverse(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return SOFTNESS * np.arcsinh(value / SOFTNESS)


def _sinh_slope(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.cosh(_limit(raw / SOFTNESS))


def _exponential(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(_limit(raw))


def _limit(exponent: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(exponent, -MAX_EXPONENT, MAX_EXPONENT)


_IDENTITY = Transform(lambda raw: raw, lambda value: value, np.ones_like, -np.inf)
_SINH = Transform(_sinh, _sinh_inverse, _sinh_slope, -np.inf)
_SOFTPLUS = Transform(_softplus, _softplus_inverse, _softplus_slope, 0.0)
_EXPONENTIAL = Transform(_exponential, np.log, _exponential, 0.0)
