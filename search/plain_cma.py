"""CMA-ES without nevergrad: pycma's, or our own separable one where that is not installed either.

Knows points, losses and pycma's options; not genomes, nor which of the two is better.
"""

from typing import Any, Literal

import numpy as np

from search.errors import InputError
from search.sep_cma import SeparableCMA
from search.space import FloatArray

try:
    import cma  # type: ignore[import-untyped]
    from cma.sigma_adaptation import CMAAdaptSigmaTPA  # type: ignore[import-untyped]
except ImportError:
    cma = CMAAdaptSigmaTPA = None

OptimizerLibrary = Literal["nevergrad", "pycma", "built-in"]
DIAGONAL_ABOVE = 100
"""More parameters than this, and CMA learns a diagonal covariance: a full one takes too many samples."""

MIN_POPULATION = 4
"""Candidates below which CMA fails on many parameters, and hardly learns on few."""
PYCMA_OPTIONS = {
    "AdaptSigma": CMAAdaptSigmaTPA,
    **dict.fromkeys(["maxiter", "tolfacupx", "tolupsigma", "tolflatfitness"], np.inf),
    **dict.fromkeys(["tolconditioncov", "tolfun", "tolfunhist", "tolstagnation", "tolx"], 0),
    "tolxstagnation": False,
}
"""Two-point step size (Hansen 2008, arXiv:0805.0231): on quadratics of 60 to 240 parameters, after 125
generations of 16 candidates, a third of the loss that pycma's default leaves; equal at 10. None of pycma's
stopping rules: nevergrad answers a stop by silently starting over at the first point."""


def has_pycma() -> bool:
    """Whether pycma is installed."""
    return cma is not None


def start_pycma(n_params: int, n_candidates: int, seed: int) -> Any:
    """Start pycma's CMA with a standard normal distribution."""
    options = {
        **PYCMA_OPTIONS,
        "popsize": n_candidates,
        "CMA_diagonal": n_params > DIAGONAL_ABOVE,
        "randn": np.random.RandomState(seed).randn,
        "seed": np.nan,  # none: the global generator is not ours
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(np.zeros(n_params), 1.0, options)


class PlainCMA:
    """CMA without nevergrad: pycma's, or the separable one."""

    takes_points = True

    def __init__(
        self, name: str, library: OptimizerLibrary, n_params: int, n_candidates: int, seed: int
    ) -> None:
        if name != "CMA":
            raise ImportError(f"only CMA goes without nevergrad, found {name!r}")
        refuse_few(name, n_candidates)
        self._is_pycma = library == "pycma"
        self.strategy: Any = (start_pycma if self._is_pycma else SeparableCMA)(n_params, n_candidates, seed)

    def ask(self) -> FloatArray:
        """Return points (n_candidates, n_params)."""
        return np.array(self.strategy.ask(), dtype=np.float64)

    def tell(self, points: FloatArray, losses: FloatArray) -> None:
        """Learn from the generation that was asked for."""
        self.strategy.tell(list(points) if self._is_pycma else points, losses)

    def inject(self, points: FloatArray) -> None:
        """Put points (k, n_params) into the next generation."""
        self.strategy.inject(list(points), **({"force": True} if self._is_pycma else {}))

    def recommend(self) -> FloatArray:
        """Return the point (n_params,) that it would choose."""
        return np.array(self.strategy.mean)


def refuse_few(name: str, n_candidates: int) -> None:
    """Refuse (InputError) generations in which CMA cannot learn."""
    if n_candidates < MIN_POPULATION and "CMA" in name:
        raise InputError(
            f"optimizer {name!r} needs at least {MIN_POPULATION} candidates a generation, "
            f"found {n_candidates}; raise search.n_candidates or use OnePlusOne"
        )
