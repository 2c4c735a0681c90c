"""A separable CMA-ES: an evolution strategy that learns one step size a coordinate, in numpy alone.

Knows points and losses; not genomes, budgets or other optimisers. Linear in time and space.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
TREND_RATE = 0.3
"""Of the two-point step size, as in pycma."""


class SeparableCMA:
    """CMA-ES with a diagonal covariance, from a standard normal distribution on.

    Ros and Hansen 2008, "A simple modification in CMA-ES achieving linear time and space complexity": the
    covariance is diagonal, and is learned about n / 3 times faster. Its rates are those of pycma 4.5 with
    `CMA_diagonal`, without negative weights. The step size is two-point (Hansen 2008, arXiv:0805.0231): a
    generation's first two points lie on either side of the mean, along its last shift. Points put in are
    shortened as in Hansen 2011, arXiv:1110.4181.
    """

    def __init__(self, n_params: int, n_candidates: int, seed: int) -> None:
        """Start at 0 with step size 1."""
        n, n_parents = n_params, n_candidates // 2
        self._rng, self._shape = np.random.default_rng(seed), (n_candidates, n)
        weights = np.log((n_candidates + 1) / 2) - np.log(np.arange(1, n_parents + 1))
        self._weights = weights / weights.sum()
        self._mass = mass = 1.0 / (self._weights**2).sum()
        self._path_rate = (1 + (1 + mass) / n) / (np.sqrt(n) + (1 + 2 * mass) / n)
        self._one_rate = 1 / (n + 2 * np.sqrt(n) + mass / n)
        many_rate = (mass + 1 / mass - 1.75) / (n + 4 * np.sqrt(n) + mass / 2)
        self._many_rate = min(1 - self._one_rate, many_rate)
        self._damping = 0.7 + 2 * np.log(n) + 2 * np.log(max(1, n_candidates - n))
        self._longest = np.sqrt(n) + 2 * n / (n + 2)
        self._sigma, self._trend = 1.0, 0.0
        self.mean: _Floats = np.zeros(n)
        self._variances, self._path, self._shift = np.ones(n), np.zeros(n), np.zeros(n)
        self._injected: Sequence[_Floats] = ()

    @property
    def stds(self) -> _Floats:
        """(n_params,) the standard deviations."""
        stds: _Floats = self._sigma * np.sqrt(self._variances)
        return stds

    def inject(self, points: Sequence[_Floats]) -> None:
        """Have the next `ask` return these (k, n_params) in place of k of its own."""
        self._injected = points

    def ask(self) -> _Floats:
        """Return points (n_candidates, n_params)."""
        normal = self._rng.standard_normal(self._shape)
        n_pair = 0
        if self._shift.any():
            along, n_pair = self._shift / self.stds, 2
            normal[0] = along * np.linalg.norm(normal[0]) / np.linalg.norm(along)
            normal[1] = -normal[0]
        points: _Floats = self.mean + self.stds * normal
        points[n_pair : n_pair + len(self._injected)] = np.reshape(self._injected, (-1, self._shape[1]))
        self._injected = ()
        return points

    def tell(self, points: _Floats, losses: _Floats) -> None:
        """Learn from the points (n_candidates, n_params) last asked for and their losses (n_candidates,)."""
        best = np.argsort(losses, kind="stable")[: len(self._weights)]
        normal = (points[best] - self.mean) / self.stds  # as they were drawn
        lengths = np.linalg.norm(normal, axis=1, keepdims=True)
        normal *= np.minimum(1.0, self._longest / np.maximum(lengths, np.finfo(np.float64).tiny))
        steps = np.sqrt(self._variances) * normal
        step, had_pair = self._weights @ steps, bool(self._shift.any())
        self._shift = self._sigma * step
        self.mean = self.mean + self._shift

        rate = self._path_rate
        self._path = (1 - rate) * self._path + np.sqrt(rate * (2 - rate) * self._mass) * step
        learned = self._one_rate * self._path**2 + self._many_rate * (self._weights @ steps**2)
        self._variances = (1 - self._one_rate - self._many_rate) * self._variances + learned
        if had_pair:
            self._follow_pair(losses)

    def _follow_pair(self, losses: _Floats) -> None:
        """Lengthen steps where going on as before was better than going back, else shorten them."""
        ahead = ((losses < losses[1]).sum() - (losses < losses[0]).sum()) / (len(losses) - 1)
        self._trend += TREND_RATE * (np.sign(ahead) * np.sqrt(abs(ahead)) - self._trend)
        self._sigma *= float(np.exp(self._trend / self._damping))
