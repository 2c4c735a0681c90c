"""How well losses rank merges by true accuracy: rank correlations, prompts needed, and the label-free bound.

Knows losses, accuracies and prompts of a variant; not models or how they were measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from search.objective import COMBINATIONS
from search.space import FloatArray

BEST_SHARE = 0.25
"""The best merges by true held-in N: where a search has to tell merges apart."""
N_RESAMPLES = 500
N_SUBSETS = 20
LOG_OFFSET = 0.01
WHERE = ("held_in", "held_in_best", "held_out", "held_out_best")
"""What losses are compared with: both accuracies, of all merges and of the best quarter."""
NORMAL_95 = 1.96


def mean_log(per_expert: FloatArray) -> FloatArray:
    """Return the mean over experts of log(x + 0.01), of (n, n_experts)."""
    losses: FloatArray = np.log(per_expert.clip(min=0) + LOG_OFFSET).mean(axis=-1)
    return losses


def _known(name: str) -> Callable[[FloatArray], FloatArray]:
    return lambda per_expert: COMBINATIONS[name](torch.tensor(per_expert)).numpy()


COMBINES: dict[str, Callable[[FloatArray], FloatArray]] = {
    **{name: _known(name) for name in COMBINATIONS},
    "mean_log": mean_log,
}
"""Name -> losses (n,) of distances (n, n_experts): what the configuration knows, and one more."""


def spearman(losses: FloatArray, accuracies: FloatArray) -> float:
    """Return the rank correlation of -loss and accuracy; NaN where either says nothing (all are equal)."""
    if len(losses) < 3 or np.ptp(losses) == 0 or np.ptp(accuracies) == 0:
        return float("nan")
    return -float(spearmanr(losses, accuracies).statistic)


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank correlation and its 95 % interval over merges."""

    rho: float
    low: float
    high: float


class Judge:
    """True accuracies of merges, to rank losses by; resamples are drawn once, the same for all losses."""

    def __init__(self, held_in: FloatArray, held_out: FloatArray, n_resamples: int = N_RESAMPLES) -> None:
        """Take the accuracies (n,) of all merges."""
        self.held_in, self.held_out = held_in, held_out
        self.best = best_quarter(held_in)
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(held_in), size=(n_resamples, len(held_in)))
        order = np.argsort(-held_in[drawn], axis=1, kind="stable")[:, : len(self.best)]
        self._drawn = {"": drawn, "_best": np.take_along_axis(drawn, order, axis=1)}
        self._ranks = {
            name + part: _centred_ranks(accuracies[chosen])
            for part, chosen in self._drawn.items()
            for name, accuracies in (("held_in", held_in), ("held_out", held_out))
        }

    def judge(self, losses: FloatArray) -> dict[str, Rank]:
        """Return the rank correlation of -losses (n,) with each of WHERE; bootstrap over merges."""
        resampled = {part: _centred_ranks(losses[chosen]) for part, chosen in self._drawn.items()}
        return {name: self._rank(name, losses, resampled) for name in WHERE}

    def _rank(self, name: str, losses: FloatArray, resampled: dict[str, FloatArray]) -> Rank:
        of_best = name.endswith("_best")
        ranks, wanted = resampled["_best" if of_best else ""], self._ranks[name]
        scale = np.sqrt((ranks**2).sum(axis=1) * (wanted**2).sum(axis=1))
        with np.errstate(invalid="ignore"):
            found = -(ranks * wanted).sum(axis=1) / scale
        known = found[np.isfinite(found)]
        low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
        return Rank(self.correlate(name, losses), float(low), float(high))

    def correlate(self, name: str, losses: FloatArray) -> float:
        """Return the rank correlation with one of WHERE, alone."""
        accuracies = self.held_in if name.startswith("held_in") else self.held_out
        chosen = self.best if name.endswith("_best") else slice(None)
        return spearman(losses[chosen], accuracies[chosen])


def best_quarter(held_in: FloatArray) -> NDArray[np.intp]:
    """Return the best quarter of merges, rounded up, best first."""
    return np.argsort(-held_in, kind="stable")[: int(np.ceil(BEST_SHARE * len(held_in)))]


def _centred_ranks(values: FloatArray) -> FloatArray:
    """Return ranks along the last axis, ties shared, less their mean."""
    ranks: FloatArray = rankdata(values, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    return ranks


def draw_subsets(expert: NDArray[np.int64], n: int, rng: np.random.Generator) -> list[NDArray[np.intp]]:
    """Return random sets of `n` prompts of every expert; one where there are no more than that.

    Args:
        expert: (n_prompts,) of each prompt.
    """
    own = [np.flatnonzero(expert == index) for index in range(expert.max() + 1)]
    n_sets = N_SUBSETS if n < max(map(len, own)) else 1
    return [np.concatenate([rng.permutation(rows)[:n] for rows in own]) for _ in range(n_sets)]


@dataclass(frozen=True, slots=True)
class Bound:
    """How often |accuracy lost| <= 1 - agreement, over pairs of a merge and an expert."""

    n_pairs: int
    holds: float
    """Share of pairs, as measured."""
    holds_within_error: float
    """Share where what is lost exceeds 1 - agreement by no more than the 95 % error of their difference."""
    worst_excess: float
    """The largest |accuracy lost| - (1 - agreement)."""
    worst_pair: tuple[int, int]
    """Merge and expert that it is of."""


def check_bound(lost: FloatArray, n_queries: int, agreement: FloatArray, n_prompts: int) -> Bound:
    """Check the bound of docs/METHOD.md on pairs (n_merges, n_experts).

    Agreement is a share of prompts and accuracy a share of queries: the error of each is that of a share p of
    n, sqrt(p (1 - p) / (n + 4)) with p = (k + 2) / (n + 4), k of n counted (Agresti & Coull 1998), and the
    difference's is both squared, added, and the root taken.

    Args:
        lost: accuracy of the expert less that of the merge.
        n_queries: that each accuracy is a share of.
        agreement: share of the expert's prompts where the merge has its top token throughout.
        n_prompts: that each agreement is a share of.
    """
    excess = np.abs(lost) - (1 - agreement)
    variance = _share_variance(1 - np.abs(lost), n_queries) + _share_variance(agreement, n_prompts)
    worst = np.unravel_index(int(excess.argmax()), excess.shape)
    return Bound(
        n_pairs=excess.size,
        holds=float((excess <= 1e-6).mean()),  # shares are stored in float32
        holds_within_error=float((excess <= NORMAL_95 * np.sqrt(variance)).mean()),
        worst_excess=float(excess.max()),
        worst_pair=(int(worst[0]), int(worst[1])),
    )


def _share_variance(share: FloatArray, n: int) -> FloatArray:
    smoothed = (share * n + 2) / (n + 4)
    variance: FloatArray = smoothed * (1 - smoothed) / (n + 4)
    return variance
