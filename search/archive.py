"""The best distinct genomes of a search so far.

Knows vectors and losses; not what a genome means.
"""

import numpy as np

from search.space import FloatArray


class Archive:
    """The best distinct genomes; those without a finite loss are left out."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores_of: dict[tuple[float, ...], tuple[float, FloatArray]] = {}

    def add(self, genomes: FloatArray, losses: FloatArray, per_expert: FloatArray) -> None:
        """Take genomes (n, n_params) with losses (n,) and per_expert (n, n_experts), all on the same prompts.

        Equal genomes keep their lower loss, equal losses their order of arrival.
        """
        for genome, loss, shares in zip(genomes.tolist(), losses.tolist(), per_expert, strict=True):
            known = self._scores_of.get(tuple(genome))
            if np.isfinite(loss) and (known is None or loss < known[0]):
                self._scores_of[tuple(genome)] = loss, shares.copy()
        best = sorted(self._scores_of.items(), key=lambda item: item[1][0])[: self._size]
        self._scores_of = dict(best)

    def best_loss(self) -> float:
        """Return the lowest loss, NaN when there is none."""
        return min((loss for loss, _ in self._scores_of.values()), default=float("nan"))

    def contents(self, n_params: int, n_experts: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return genomes (k, n_params), losses (k,) and per_expert (k, n_experts), best first."""
        losses = np.array([loss for loss, _ in self._scores_of.values()], dtype=np.float64)
        genomes = np.array(list(self._scores_of), dtype=np.float64).reshape(len(losses), n_params)
        per_expert = np.array([shares for _, shares in self._scores_of.values()], dtype=np.float64)
        return genomes, losses, per_expert.reshape(len(losses), n_experts)
