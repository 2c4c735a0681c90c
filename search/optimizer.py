"""Nevergrad behind a batch ask/tell, without its traps; the only file that imports it.

Knows vectors and losses; not coefficients, models, the trace or time.
"""

import warnings
from difflib import get_close_matches
from typing import Any

import nevergrad as ng
import numpy as np
from cma.sigma_adaptation import CMAAdaptSigmaTPA  # type: ignore[import-untyped]
from numpy.typing import ArrayLike

from search.errors import InputError
from search.space import FloatArray

DIAGONAL_ABOVE = 100
"""More parameters than this, and CMA learns a diagonal covariance: a full one takes too many samples."""

MIN_POPULATION = 4
"""Candidates below which CMA fails on many parameters, and hardly learns on few."""
PYCMA_OPTIONS = {
    "AdaptSigma": CMAAdaptSigmaTPA,
    "maxiter": np.inf,
    "tolfacupx": np.inf,
    "tolupsigma": np.inf,
    "tolflatfitness": np.inf,
    "tolconditioncov": 0,
    "tolfun": 0,
    "tolfunhist": 0,
    "tolstagnation": 0,
    "tolx": 0,
    "tolxstagnation": False,
}
"""Two-point step size (Hansen 2008, arXiv:0805.0231): on quadratics of 60 to 240 parameters, after 125
generations of 16 candidates, a third of the loss that pycma's default leaves; equal at 10. None of pycma's
stopping rules: nevergrad answers a stop by silently starting over at the first point."""


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

    def __init__(
        self,
        start: ArrayLike,
        spread: ArrayLike,
        n_candidates: int,
        budget: int,
        seed: int,
        name: str = "CMA",
    ) -> None:
        """Start from a point in a free (unbounded) space.

        Args:
            start: (n_params,) the first centre.
            spread: (n_params,) or one number, the first generation's standard deviation in each coordinate.
            n_candidates: size of a generation.
            budget: evaluations in all, as some optimisers pace themselves by it.
            seed: of all randomness.
            name: "CMA", or a name in nevergrad's registry.

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
        # with an idle coordinate where there is one alone: pycma does not search in one dimension
        self._parametrization = ng.p.Array(init=np.zeros(max(2, self._n_params))).set_mutation(sigma=1.0)
        self._parametrization.random_state = np.random.RandomState(seed)
        self._refusal = f"optimizer {name!r} cannot search {self._n_params} parameters by {n_candidates}"
        factory = _find_factory(name, max(2, self._n_params), n_candidates)
        is_cma = isinstance(factory, ng.families.ParametrizedCMA)
        self._is_pycma = is_cma and not factory.config()["fcmaes"]
        try:
            self._optimizer = factory(self._parametrization, budget=budget, num_workers=n_candidates)
        except (ValueError, ImportError) as error:
            raise InputError(f"{self._refusal}: {error}; use CMA") from error
        self._asked: list[Any] = []
        self._worst = np.nan
        self._has_learned = False
        self._last_spread: FloatArray = self._spread

    @property
    def n_injectable(self) -> int:
        """How many genomes can be put into the next generation, of which CMA needs some of its own.

        Into the first only one: pycma would take two for a mirrored pair, and rescale them.
        """
        if not self._is_pycma:
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
        strategy: Any = self._optimizer.es
        standardised = np.zeros((len(genomes), max(2, self._n_params)))
        standardised[:, : self._n_params] = (genomes - self._start) / self._spread
        strategy.inject(list(standardised), force=True)

    def ask(self) -> FloatArray:
        """Return the next genomes (n_candidates, n_params)."""
        if self._asked:
            raise RuntimeError(f"asked again before the losses of {len(self._asked)} genomes were told")
        try:
            self._asked = [self._optimizer.ask() for _ in range(self._n_candidates)]
        except (RuntimeError, ImportError, TypeError) as error:
            raise InputError(f"{self._refusal}: {str(error).splitlines()[0]}; use CMA") from error
        return np.array([self._to_genome(candidate.value) for candidate in self._asked])

    def tell(self, losses: ArrayLike) -> None:
        """Take the losses (n_candidates,) of the genomes last asked for, in their order.

        A loss that is not finite is told as the worst finite one of its generation, else of all so far.

        Raises:
            ValueError: for another number of losses than genomes asked for.
            InputError: when no loss has ever been finite.
        """
        values = np.array(losses, dtype=np.float64)
        if values.shape != (len(self._asked),) or not self._asked:
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
        asked = np.array([self._to_genome(candidate.value) for candidate in self._asked])
        self._last_spread = np.maximum(asked.std(axis=0), np.finfo(np.float64).tiny)
        candidates, self._asked, self._has_learned = self._asked, [], True
        kept_random = np.random.get_state()  # pycma draws from it where it checks itself
        with warnings.catch_warnings():
            # pycma does not recognise its own injected points after nevergrad's rounding, which does no harm
            warnings.filterwarnings("ignore", "orphanated injected solution")
            warnings.filterwarnings("ignore", "elements of z2")  # one far away, whose weight pycma limits
            for candidate, value in zip(candidates, values.tolist(), strict=True):
                self._optimizer.tell(candidate, value)
        np.random.set_state(kept_random)

    def mean(self) -> FloatArray:
        """Return the mean (n_params,) of the search distribution, else the recommendation."""
        strategy = self._find_strategy()
        if strategy is not None:
            return self._to_genome(np.array(strategy.mean))
        return self._to_genome(self._optimizer.provide_recommendation().value)

    def spread(self) -> FloatArray:
        """Return the standard deviations (n_params,) of the distribution, else of the last generation."""
        strategy = self._find_strategy()
        if strategy is not None:
            return np.array(strategy.stds, dtype=np.float64)[: self._n_params] * self._spread
        return self._last_spread

    def _find_strategy(self) -> Any:
        """Return pycma's object, None where there is another optimiser or nothing was asked yet."""
        optimizer = getattr(self._optimizer, "optim", self._optimizer)  # what NGOpt and its like chose
        strategy = getattr(optimizer, "_es", None)  # not `es`, which may start over
        return strategy if hasattr(strategy, "stds") else None

    def _to_genome(self, value: FloatArray) -> FloatArray:
        return self._start + self._spread * value[: self._n_params]


def _find_factory(name: str, n_params: int, n_candidates: int) -> Any:
    """Return what builds the optimiser; CMA and its family get a population of one generation.

    With another population they fail at 300 parameters or more,
    github.com/facebookresearch/nevergrad/issues/1690.
    """
    if n_candidates < MIN_POPULATION and "CMA" in name:
        raise InputError(
            f"optimizer {name!r} needs at least {MIN_POPULATION} candidates a generation, "
            f"found {n_candidates}; raise search.n_candidates or use OnePlusOne"
        )
    if name == "CMA":
        return ng.families.ParametrizedCMA(
            popsize=n_candidates, diagonal=n_params > DIAGONAL_ABOVE, inopts=PYCMA_OPTIONS
        )
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
