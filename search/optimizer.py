"""Nevergrad behind a batch ask/tell, without its traps; without it pycma, and without that our own CMA.

Knows vectors and losses; not coefficients, models, the trace or time. Optimisers are chosen here alone.
"""

import warnings
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from search.errors import InputError
from search.plain_cma import (
    DIAGONAL_ABOVE,
    MIN_POPULATION,
    PYCMA_OPTIONS,
    OptimizerLibrary,
    PlainCMA,
    has_pycma,
    refuse_few,
)
from search.space import FloatArray

try:
    import nevergrad as ng
except ImportError:
    ng = None


def find_library() -> OptimizerLibrary:
    """Return what searches here: nevergrad, else pycma, else the separable CMA of our own."""
    if ng is not None and has_pycma():
        return "nevergrad"
    return "pycma" if has_pycma() else "built-in"


class _Nevergrad:
    """An optimiser of nevergrad's, asked and told a generation at a time."""

    def __init__(self, name: str, n_params: int, n_candidates: int, budget: int, seed: int) -> None:
        parametrization = standard_normal(n_params, seed)
        factory = _find_factory(name, n_params, n_candidates)
        is_cma = isinstance(factory, ng.families.ParametrizedCMA)
        self.takes_points = is_cma and not factory.config()["fcmaes"]
        self._optimizer = factory(parametrization, budget=budget, num_workers=n_candidates)
        self._n_candidates = n_candidates
        self._candidates: list[Any] = []

    def ask(self) -> FloatArray:
        """Return points (n_candidates, n_params)."""
        self._candidates = [self._optimizer.ask() for _ in range(self._n_candidates)]
        return np.array([candidate.value for candidate in self._candidates])

    def tell(self, points: FloatArray, losses: FloatArray) -> None:
        """Learn from the generation that was asked for."""
        for candidate, value in zip(self._candidates, losses.tolist(), strict=True):
            self._optimizer.tell(candidate, value)

    def inject(self, points: FloatArray) -> None:
        """Put points (k, n_params) into the next generation."""
        self._optimizer.es.inject(list(points), force=True)

    @property
    def strategy(self) -> Any:
        """Pycma's object, None where there is another optimiser or nothing was asked yet."""
        optimizer = getattr(self._optimizer, "optim", self._optimizer)  # what NGOpt and its like chose
        strategy = getattr(optimizer, "_es", None)  # not `es`, which may start over
        return strategy if hasattr(strategy, "stds") else None

    def recommend(self) -> FloatArray:
        """Return the point (n_params,) that it would choose."""
        return np.array(self._optimizer.provide_recommendation().value)


class BatchOptimizer:
    """Asks for a whole generation, is told its losses, minimises.

    It works on (genome - start) / spread, which starts with a standard normal distribution whatever the scale
    of a coordinate.

    Example:
        optimizer = BatchOptimizer(start, 0.15, n_candidates=16, budget=2000, seed=0)
        genomes = optimizer.ask()  # (n_candidates, n_params)
        optimizer.tell(losses)     # (n_candidates,), in the same order

    A new one with the same seed, asked and told the same, repeats every genome: this is how a search resumes.
    """

    def __init__(  # noqa: PLR0913 (where to start, how far to look, and what looks)
        self,
        start: ArrayLike,
        spread: ArrayLike,
        n_candidates: int,
        budget: int,
        seed: int,
        name: str = "CMA",
        library: OptimizerLibrary | None = None,
    ) -> None:
        """Start from a point in a free (unbounded) space.

        Args:
            start: (n_params,) the first centre.
            spread: (n_params,) or one number, the first generation's standard deviation in each coordinate.
            n_candidates: size of a generation.
            budget: evaluations in all, as some optimisers pace themselves by it.
            seed: of all randomness.
            name: "CMA", or a name in nevergrad's registry.
            library: that computes CMA; the best that is installed when None.

        Raises:
            InputError: for an unknown name, or an optimiser that cannot work in such generations.
        """
        self._start = np.array(start, dtype=np.float64)
        if self._start.ndim != 1 or not np.isfinite(self._start).all() or not self._start.size:
            raise ValueError(f"start of shape {self._start.shape}, expected (n_params,) finite numbers")
        self._spread = np.broadcast_to(np.asarray(spread, dtype=np.float64), self._start.shape)
        if not (self._spread > 0).all() or not np.isfinite(self._spread).all():
            raise ValueError(f"spread {self._spread.tolist()}, expected finite numbers above 0")
        self._n_params = len(self._start)
        self._n_candidates = n_candidates
        self._refusal = f"optimizer {name!r} cannot search {self._n_params} parameters by {n_candidates}"
        # with an idle coordinate where there is one alone: pycma does not search in one dimension
        self._n_dimensions = max(2, self._n_params)
        library = library or find_library()
        try:
            self._engine: _Nevergrad | PlainCMA = (
                _Nevergrad(name, self._n_dimensions, n_candidates, budget, seed)
                if library == "nevergrad"
                else PlainCMA(name, library, self._n_dimensions, n_candidates, seed)
            )
        except (ValueError, ImportError) as error:
            raise InputError(f"{self._refusal}: {error}; use CMA") from error
        self._asked: FloatArray = np.empty((0, self._n_dimensions))
        self._worst = np.nan
        self._has_learned = False
        self._last_spread: FloatArray = self._spread

    @property
    def n_injectable(self) -> int:
        """How many genomes can be put into the next generation, of which CMA needs some of its own.

        Into the first only one: pycma would take two for a mirrored pair, and rescale them.
        """
        if not self._engine.takes_points:
            return 0
        room = self._n_candidates - MIN_POPULATION
        return room if self._has_learned else min(1, room)

    def inject(self, genomes: FloatArray) -> None:
        """Have the next `ask` return these (k, n_params) in place of k of its own.

        Raises:
            InputError: for more than `n_injectable`: any if the optimiser is not of the CMA family.
        """
        if len(genomes) > self.n_injectable:
            raise InputError(
                f"{self._refusal} with {len(genomes)} put in by gradient steps, at most {self.n_injectable} "
                f"can be; use CMA, search.n_candidates above {MIN_POPULATION} or no gradient.inject_every"
            )
        standardised = np.zeros((len(genomes), self._n_dimensions))
        standardised[:, : self._n_params] = (genomes - self._start) / self._spread
        self._engine.inject(standardised)

    def ask(self) -> FloatArray:
        """Return the next genomes (n_candidates, n_params)."""
        if len(self._asked):
            raise RuntimeError(f"asked again before the losses of {len(self._asked)} genomes were told")
        try:
            self._asked = self._engine.ask()
        except (RuntimeError, ImportError, TypeError) as error:
            raise InputError(f"{self._refusal}: {str(error).splitlines()[0]}; use CMA") from error
        return self._to_genome(self._asked)

    def tell(self, losses: ArrayLike) -> None:
        """Take the losses (n_candidates,) of the genomes last asked for, in their order.

        A loss that is not finite is told as the worst finite one of its generation, else of all so far.

        Raises:
            ValueError: for another number of losses than genomes asked for.
            InputError: when no loss has ever been finite.
        """
        values = np.array(losses, dtype=np.float64)
        if values.shape != (len(self._asked),) or not len(self._asked):
            raise ValueError(f"told losses of shape {values.shape} for {len(self._asked)} genomes asked for")
        finite = np.isfinite(values)
        worst = values[finite].max() if finite.any() else self._worst
        if not np.isfinite(worst):
            raise InputError(
                f"none of {len(values)} candidates has a finite loss: the model gives no usable output. "
                "Lower search.start or search.sigma, or set base.dtype: float32."
            )
        values[~finite] = worst
        self._worst = np.fmax(self._worst, worst)
        asked = self._to_genome(self._asked)
        self._last_spread = np.maximum(asked.std(axis=0), np.finfo(np.float64).tiny)
        points, self._asked, self._has_learned = self._asked, self._asked[:0], True
        kept_random = np.random.get_state()  # pycma draws from it where it checks itself
        with warnings.catch_warnings():
            # pycma does not recognise its own injected points after nevergrad's rounding, which does no harm
            warnings.filterwarnings("ignore", "orphanated injected solution")
            warnings.filterwarnings("ignore", "elements of z2")  # one far away, whose weight pycma limits
            self._engine.tell(points, values)
        np.random.set_state(kept_random)

    def mean(self) -> FloatArray:
        """Return the mean (n_params,) of the search distribution, else the recommendation."""
        strategy = self._engine.strategy
        return self._to_genome(self._engine.recommend() if strategy is None else np.array(strategy.mean))

    def spread(self) -> FloatArray:
        """Return the standard deviations (n_params,) of the distribution, else of the last generation."""
        strategy = self._engine.strategy
        if strategy is not None:
            return np.array(strategy.stds, dtype=np.float64)[: self._n_params] * self._spread
        return self._last_spread

    def _to_genome(self, value: FloatArray) -> FloatArray:
        return self._start + self._spread * value[..., : self._n_params]


def standard_normal(n_params: int, seed: int) -> Any:
    """Return nevergrad's description of points (n_params,) that start with a standard normal distribution."""
    parametrization = ng.p.Array(init=np.zeros(n_params)).set_mutation(sigma=1.0)
    parametrization.random_state = np.random.RandomState(seed)
    return parametrization


def make_cma_family(n_params: int, n_candidates: int) -> Any:
    """Return what builds nevergrad's CMA for generations of one size."""
    return ng.families.ParametrizedCMA(
        popsize=n_candidates, diagonal=n_params > DIAGONAL_ABOVE, inopts=PYCMA_OPTIONS
    )


def _find_factory(name: str, n_params: int, n_candidates: int) -> Any:
    """Return what builds the optimiser; CMA and its family get a population of one generation.

    With another population they fail at 300 parameters or more,
    github.com/facebookresearch/nevergrad/issues/1690.
    """
    refuse_few(name, n_candidates)
    if name == "CMA":
        return make_cma_family(n_params, n_candidates)
    known = sorted(ng.optimizers.registry)
    if name not in known:
        close = get_close_matches(name, known, n=3, cutoff=0.5)
        raise InputError(
            f"unknown optimizer {name!r}; close: {', '.join(close) or 'none'}; "
            "expected CMA or another name of nevergrad's registry, such as DiagonalCMA, OnePlusOne, DE, TBPSA"
        )
    factory = ng.optimizers.registry[name]
    if factory.no_parallelization and n_candidates > 1:
        raise InputError(
            f"optimizer {name!r} takes one candidate at a time, not {n_candidates}; use CMA or OnePlusOne"
        )
    if isinstance(factory, ng.families.ParametrizedCMA):
        return ng.families.ParametrizedCMA(
            **{**factory.config(), "popsize": n_candidates, "inopts": PYCMA_OPTIONS}
        )
    return factory
