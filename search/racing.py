"""Race candidates over blocks of prompts and drop the losers early.

Pure numpy: knows losses on blocks, not models, what a prompt is, or time. Sequential halving, Karnin et al.
2013 (proceedings.mlr.press/v28/karnin13.pdf), algorithm 1, with the same blocks for all candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from search.space import FloatArray

MIN_FULLY_SCORED = 2
"""The last rung holds at least this many, so that a generation always ends with a choice."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One round of a race."""

    n_candidates: int
    """That run in it; fewer where losses are not finite."""
    n_blocks: int
    """That each of them has been scored on by its end."""


def plan_race(n_candidates: int, n_blocks: int, keep: float | None) -> tuple[Rung, ...]:
    """Plan rungs: each keeps this share of the candidates, on 1 / `keep` times the blocks; the last has all.

    16 candidates and 8 blocks at a half:

        blocks      1   2   4   8
        candidates  16  8   4   2      40 blocks' worth of tokens instead of 128

    Args:
        n_candidates: in the generation.
        n_blocks: of prompts.
        keep: between 0 and 1; None for no race.

    Raises:
        ValueError: for a share outside (0, 1).
    """
    if keep is None:
        return (Rung(n_candidates, n_blocks),)
    if not 0 < keep < 1:
        raise ValueError(f"keep is {keep}, expected a share between 0 and 1, or None for no race")
    rungs = [Rung(n_candidates, 1)]
    while rungs[-1].n_blocks < n_blocks:
        fewer = max(min(MIN_FULLY_SCORED, n_candidates), math.ceil(rungs[-1].n_candidates * keep))
        rungs.append(Rung(fewer, min(n_blocks, math.ceil(rungs[-1].n_blocks / keep))))
    return tuple(rungs)


def order_blocks(n_blocks: int, seed: int, generation: int) -> NDArray[np.int64]:
    """Return the order (n_blocks,) in which a generation meets the blocks; another in each, none favoured."""
    return np.random.default_rng([seed, generation]).permutation(n_blocks)


def select_survivors(losses: FloatArray, n_kept: int) -> NDArray[np.int64]:
    """Return the indices, ascending, of the `n_kept` lowest of the losses (n,), fewer if fewer are finite.

    Equal losses keep their order.
    """
    finite = np.flatnonzero(np.isfinite(losses))
    best = finite[np.argsort(losses[finite], kind="stable")[:n_kept]]
    return np.sort(best)


def rank_by_rung(n_candidates: int, rungs: Sequence[tuple[NDArray[np.int64], FloatArray]]) -> FloatArray:
    """Return losses (n_candidates,) that rank those who went further before those who did not.

    Who dropped out has the loss of its last rung, raised to that of the worst who went further: losses on
    different prompts cannot be compared, and all optimisers in use go by ranks.

    Args:
        n_candidates: in the generation.
        rungs: for each, the candidates (k,) in it and their losses (k,) on the prompts seen by then.
    """
    told = np.full(n_candidates, np.nan)
    worst = -np.inf
    is_settled = np.zeros(n_candidates, dtype=bool)
    for candidates, losses in reversed(rungs):
        dropped = ~is_settled[candidates]
        own = losses[dropped]
        told[candidates[dropped]] = np.where(np.isfinite(own), np.maximum(own, worst), own)
        is_settled[candidates] = True
        finite = told[candidates][np.isfinite(told[candidates])]
        worst = finite.max(initial=-np.inf)  # of this rung, which holds all later ones
    return told


@dataclass(frozen=True, slots=True, eq=False)
class BlockScores:
    """What scoring candidates on some blocks of prompts gave."""

    sums: FloatArray
    """(n_candidates, n_experts) the objective summed over each expert's scored positions in the blocks."""
    counts: FloatArray
    """(n_experts,) how many positions these are; every expert has some in every block."""
    prompts: NDArray[np.int64]
    """(n_block_prompts,) indices of the prompts scored."""
    prompt_means: FloatArray
    """(n_candidates, n_block_prompts) the objective's mean over each prompt's scored positions."""
    n_tokens: int
    """Tokens of all forward passes."""
    peak_bytes: int | None
    """Most memory in use, where the device tells."""


class Evaluator(Protocol):
    """Scores genomes on blocks of prompts."""

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        ...

    def score_blocks(self, genomes: FloatArray, blocks: Sequence[int]) -> BlockScores:
        """Score genomes (n_candidates, n_params) on the prompts of some blocks."""
        ...

    def combine(self, sums: FloatArray, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Turn sums (n_candidates, n_experts) into losses (n_candidates,) and per_expert, their shape."""
        ...


class Race:
    """One generation on its way through the rungs."""

    def __init__(self, genomes: FloatArray, evaluator: Evaluator) -> None:
        """Prepare a race of genomes (n_candidates, n_params)."""
        self._genomes, self._evaluator = genomes, evaluator
        self._sums: FloatArray = np.zeros((len(genomes), 0))
        self._counts: FloatArray = np.zeros(0)
        self._prompt_means: dict[int, FloatArray] = {}
        self._scored: list[tuple[NDArray[np.int64], FloatArray]] = []
        self.per_expert: FloatArray = np.zeros((len(genomes), 0))
        """(n_candidates, n_experts) on the prompts that each candidate was scored on."""
        self.rungs: list[dict[str, Any]] = []
        """What the trace says of each."""
        self.n_tokens = 0
        self.peak_bytes: int | None = None

    def run(self, rungs: Sequence[Rung], order: NDArray[np.int64]) -> None:
        """Score all candidates on the first rung's blocks in this order, and the survivors on more."""
        alive = np.arange(len(self._genomes))
        n_seen = 0
        for rung in rungs:
            if n_seen:
                alive = alive[select_survivors(self._scored[-1][1], rung.n_candidates)]
            if not len(alive):
                return
            self._score(alive, order[n_seen : rung.n_blocks].tolist())
            n_seen = rung.n_blocks

    def losses(self) -> FloatArray:
        """Return what to tell the optimiser, (n_candidates,)."""
        return rank_by_rung(len(self._genomes), self._scored)

    def prompt_spread(self) -> FloatArray:
        """Return the standard deviation (n_prompts,) over candidates of each prompt's disagreement."""
        spread = np.full(max(self._prompt_means, default=-1) + 1, np.nan)
        for prompt, means in self._prompt_means.items():
            finite = means[np.isfinite(means)]
            spread[prompt] = finite.std() if len(finite) > 1 else np.nan
        return spread

    def _score(self, alive: NDArray[np.int64], blocks: Sequence[int]) -> None:
        scores = self._evaluator.score_blocks(self._genomes[alive], blocks)
        if not self._sums.shape[1]:
            self._sums = np.zeros((len(self._genomes), scores.sums.shape[1]))
            self._counts = np.zeros(scores.sums.shape[1])
            self.per_expert = np.full(self._sums.shape, np.nan)
        self._sums[alive] += scores.sums
        self._counts += scores.counts
        losses, self.per_expert[alive] = self._evaluator.combine(self._sums[alive], self._counts)
        self._scored.append((alive, losses))
        self._prompt_means.update(zip(scores.prompts.tolist(), scores.prompt_means.T, strict=True))
        self.n_tokens += scores.n_tokens
        if scores.peak_bytes is not None:
            self.peak_bytes = max(scores.peak_bytes, self.peak_bytes or 0)
        self.rungs.append(
            {"prompts": len(self._prompt_means), "candidates": alive.tolist(), "losses": losses}
        )
