"""CMA-ES as a submission searches: nevergrad's, else pycma's, else our own, in fewer lines than optimizer.py.

Knows vectors and losses; not coefficients, models or time. It stands in for `BatchOptimizer`, which takes
points and has other optimisers too; asked and told the same, it asks for the same.
"""

import warnings
from typing import Any

import numpy as np

from search.errors import InputError
from search.optimizer import find_library, make_cma_family, standard_normal
from search.plain_cma import start_pycma
from search.sep_cma import SeparableCMA
from search.space import FloatArray


class NevergradCMA:
    """Nevergrad's CMA, asked and told a generation at a time."""

    def __init__(self, n_params: int, n_candidates: int, budget: int, seed: int) -> None:
        """Start at 0 with standard deviation 1."""
        family = make_cma_family(n_params, n_candidates)
        self._optimizer = family(standard_normal(n_params, seed), budget=budget, num_workers=n_candidates)
        self._n_candidates, self._asked = n_candidates, list[Any]()

    def ask(self) -> list[FloatArray]:
        """Return points (n_params,) of a generation."""
        self._asked = [self._optimizer.ask() for _ in range(self._n_candidates)]
        return [candidate.value for candidate in self._asked]

    def tell(self, points: list[FloatArray], losses: FloatArray) -> None:
        """Learn from the generation that was asked for."""
        for candidate, loss in zip(self._asked, losses.tolist(), strict=True):
            self._optimizer.tell(candidate, loss)

    @property
    def mean(self) -> FloatArray:
        """(n_params,) the mean of the distribution."""
        strategy = getattr(self._optimizer, "_es", None)  # not `es`, which may start over
        return np.array(self._optimizer.provide_recommendation().value if strategy is None else strategy.mean)


class KitOptimizer:
    """Asks for a generation, is told its losses, minimises; it works on (genome - start) / spread."""

    def __init__(
        self,
        start: FloatArray,
        spread: FloatArray,
        n_candidates: int,
        budget: int,
        seed: int,
        name: str,
    ) -> None:
        """Start from a point (n_params,) and standard deviations (n_params,), in a free space."""
        self._start, self._spread, self._worst = start, spread, np.nan
        # with an idle coordinate where there is one alone: pycma does not search in one dimension
        n = max(2, len(start))
        library = find_library()
        if library == "nevergrad":
            self._engine: Any = NevergradCMA(n, n_candidates, budget, seed)
        else:
            self._engine = (start_pycma if library == "pycma" else SeparableCMA)(n, n_candidates, seed)
        self._asked: Any = ()

    def ask(self) -> FloatArray:
        """Return the next genomes (n_candidates, n_params)."""
        self._asked = self._engine.ask()
        return self._to_genome(np.array(self._asked))

    def tell(self, losses: FloatArray) -> None:
        """Take the losses (n_candidates,) of the genomes last asked for; one that is not finite is the worst.

        Raises:
            InputError: when no loss has ever been finite.
        """
        finite = np.isfinite(losses)
        self._worst = np.fmax(self._worst, losses[finite].max()) if finite.any() else self._worst
        if not np.isfinite(self._worst):
            raise InputError("no candidate has a finite loss: the model gives no usable output")
        worst = losses[finite].max() if finite.any() else self._worst
        kept_random = np.random.get_state()  # pycma draws from it where it checks itself
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "elements of z2")  # one far away, whose weight pycma limits
            self._engine.tell(self._asked, np.where(finite, losses, worst))
        np.random.set_state(kept_random)

    def mean(self) -> FloatArray:
        """Return the mean (n_params,) of the search distribution."""
        return self._to_genome(np.array(self._engine.mean))

    def _to_genome(self, value: FloatArray) -> FloatArray:
        return self._start + self._spread * value[..., : len(self._start)]
