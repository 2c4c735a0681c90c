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

    Example:
        optimizer = BatchOptimizer(start, sigma=0.15, n_candidates=16, budget=2000, seed=0)
        genomes = optimizer.ask()  # (n_candidates, n_params)
        optimizer.tell(losses)     # (n_candidates,), in the same order

    A new one with the same seed, asked and told the same, repeats every genome: this is how a search resumes.
    """

    def __init__(
        self, start: ArrayLike, sigma: float, n_candidates: int, budget: int, seed: int, name: str = "CMA"
    ) -> None:
        """Start from a point in a free (unbounded) space.

        Args:
            start: (n_params,) the first centre.
            sigma: spread of the first generation in every coordinate.
            n_candidates: size of a generation.
            budget: evaluations in all, as some optimisers pace themselves by it.
            seed: of all randomness.
            name: "CMA", or a name in nevergrad's registry.

        Raises:
            InputError: for an unknown name, or an optimiser that cannot work in such generations.
        """
        centre = np.array(start, dtype=np.float64)
        if centre.ndim != 1 or not np.isfinite(centre).all() or not centre.size:
            raise ValueError(f"start of shape {centre.shape}, expected (n_params,) finite numbers")
        self._n_params = len(centre)
        self._n_candidates = n_candidates
        if self._n_params == 1:
            centre = np.append(centre, 0.0)  # an idle coordinate: pycma does not search in one dimension
        self._parametrization = ng.p.Array(init=centre).set_mutation(sigma=sigma)
        self._parametrization.random_state = np.random.RandomState(seed)
        self._refusal = f"optimizer {name!r} cannot search {self._n_params} parameters by {n_candidates}"
        factory = _find_factory(name, len(centre), n_candidates)
        try:
            self._optimizer = factory(self._parametrization, budget=budget, num_workers=n_candidates)
        except (ValueError, ImportError) as error:
            raise InputError(f"{self._refusal}: {error}; use CMA") from error
        self._asked: list[Any] = []

    def ask(self) -> FloatArray:
        """Return the next genomes (n_candidates, n_params)."""
        if self._asked:
            raise RuntimeError(f"asked again before the losses of {len(self._asked)} genomes were told")
        try:
            self._asked = [self._optimizer.ask() for _ in range(self._n_candidates)]
        except (RuntimeError, ImportError) as error:
            raise InputError(f"{self._refusal}: {str(error).splitlines()[0]}; use CMA") from error
        return np.array([candidate.value[: self._n_params] for candidate in self._asked], dtype=np.float64)

    def tell(self, losses: ArrayLike) -> None:
        """Take the losses (n_candidates,) of the genomes last asked for, in their order.

        A loss that is not finite is told as the worst finite one of its generation.

        Raises:
            ValueError: for another number of losses than genomes asked for, or when none is finite.
        """
        values = np.array(losses, dtype=np.float64)
        if values.shape != (len(self._asked),) or not self._asked:
            raise ValueError(f"told losses of shape {values.shape} for {len(self._asked)} genomes asked for")
        finite = np.isfinite(values)
        if not finite.any():
            raise ValueError(
                f"none of {len(values)} losses is finite, the first are {values[:3].tolist()}: the model "
                "gives no usable output there. Lower search.start or search.sigma, or use float32."
            )
        values[~finite] = values[finite].max()
        candidates, self._asked = self._asked, []
        with warnings.catch_warnings():
            # pycma does not recognise its own injected points after nevergrad's rounding, which does no harm
            warnings.filterwarnings("ignore", "orphanated injected solution")
            for candidate, value in zip(candidates, values.tolist(), strict=True):
                self._optimizer.tell(candidate, value)

    def mean(self) -> FloatArray:
        """Return the mean (n_params,) of the search distribution, else the recommendation."""
        optimizer = getattr(self._optimizer, "optim", self._optimizer)  # what NGOpt and its like chose
        strategy: Any = getattr(optimizer, "_es", None)  # not `es`, which may start over
        if hasattr(strategy, "mean"):
            candidate = self._parametrization.spawn_child().set_standardized_data(np.array(strategy.mean))
        else:
            candidate = self._optimizer.provide_recommendation()
        return np.array(candidate.value[: self._n_params], dtype=np.float64)


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
    if factory.no_parallelization:
        raise InputError(
            f"optimizer {name!r} takes one candidate at a time, not {n_candidates}; use CMA or OnePlusOne"
        )
    if isinstance(factory, ng.families.ParametrizedCMA):
        return ng.families.ParametrizedCMA(
            **{**factory.config(), "popsize": n_candidates, "inopts": PYCMA_OPTIONS}
        )
    return factory
