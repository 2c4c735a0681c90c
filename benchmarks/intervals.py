"""A mean over seeds and how far it may be off.

Knows numbers, not what they measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
N_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    """Both ends are the mean where all values are the same: nothing is known of the spread."""
    least: float
    most: float
    n: int


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Estimate the mean of values (n,) by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13).

    With few values it is too narrow: of five normal ones it holds the true mean 84 times in 100, not 95. The
    resamples are seeded: the same values give the same interval.

    Raises:
        ValueError: without values.
    """
    if not len(values):
        raise ValueError("no values to take the mean of")
    sample = np.asarray(values, dtype=float)
    mean, least, most = (float(f(sample)) for f in (np.mean, np.min, np.max))
    if least == most:
        return Estimate(mean, mean, mean, least, most, len(sample))
    found = bootstrap(
        (sample,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=N_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), least, most, len(sample))
