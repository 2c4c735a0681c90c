"""Ask, evaluate, tell, until the evaluations or the clock run out; keep an archive of the best.

Knows vectors, losses, seconds and the trace; not models, prompts, coefficients or nevergrad. No torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from search.space import FloatArray
from search.timebox import TimeBox
from search.trace import Generation, TraceWriter

CAUTION = 1.2
"""A generation starts only if this many times the longest one so far fits in the time left."""


class Optimizer(Protocol):
    """Proposes genomes and learns from their losses, one generation at a time."""

    def ask(self) -> FloatArray:
        """Return genomes (n_candidates, n_params)."""
        ...

    def tell(self, losses: FloatArray) -> None:
        """Take the losses (n_candidates,) of the genomes last asked for; NaN where scoring failed."""
        ...

    def mean(self) -> FloatArray:
        """Return the genome (n_params,) that the search is centred on."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What scoring a batch of genomes gave; every candidate on the same prompts."""

    losses: FloatArray
    """(n_candidates,) smaller is better; not finite where a candidate could not be scored."""
    per_expert: FloatArray
    """(n_candidates, n_experts) what the losses are combined from."""
    n_tokens: int
    """Tokens of all forward passes."""
    peak_bytes: int | None
    """Most memory in use, where the device tells."""
    n_prompts: int | None = None
    """Prompts each candidate was scored on, where known."""


class Evaluator(Protocol):
    """Scores genomes."""

    def evaluate(self, genomes: FloatArray) -> Scores:
        """Score genomes (n_candidates, n_params)."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a search ends, beside the clock."""

    max_evaluations: int
    """Never exceeded, but for a first generation that is larger."""
    n_finalists: int
    """Size of the archive."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress line shows after a generation."""

    generations: int
    evaluations: int
    best_loss: float
    left_s: float


EndedBy = Literal["evaluations", "clock", "interrupt"]


@dataclass(frozen=True, slots=True, eq=False)
class SearchOutcome:
    """What the search found, and why it stopped."""

    archive_genomes: FloatArray
    """(k, n_params) the best distinct genomes, best first; k = 0 when no generation was finished."""
    archive_losses: FloatArray
    """(k,)."""
    mean_genome: FloatArray
    """(n_params,) where the optimiser is centred."""
    evaluations: int
    ended_by: EndedBy
    generations: int


class Archive:
    """The best distinct genomes so far; genomes without a finite loss are left out."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._loss_of: dict[tuple[float, ...], float] = {}

    def add(self, genomes: FloatArray, losses: FloatArray) -> None:
        """Take a generation: equal genomes keep their lower loss, equal losses their order of arrival."""
        for genome, loss in zip(genomes.tolist(), losses.tolist(), strict=True):
            if np.isfinite(loss):
                key = tuple(genome)
                self._loss_of[key] = min(loss, self._loss_of.get(key, loss))
        best = sorted(self._loss_of.items(), key=lambda item: item[1])[: self._size]
        self._loss_of = dict(best)

    def best_loss(self) -> float:
        """Return the lowest loss, NaN when there is none."""
        return min(self._loss_of.values(), default=float("nan"))

    def contents(self, n_params: int) -> tuple[FloatArray, FloatArray]:
        """Return genomes (k, n_params) and losses (k,), best first."""
        genomes = np.array(list(self._loss_of), dtype=np.float64).reshape(-1, n_params)
        return genomes, np.array(list(self._loss_of.values()), dtype=np.float64)


@dataclass(slots=True)
class SearchState:
    """What a running search has done; replaying recorded generations would rebuild it."""

    archive: Archive
    generations: int = 0
    evaluations: int = 0
    batch: int = 0
    """Candidates of the last generation."""
    longest_s: float = 0.0
    """Longest generation so far, from ask to tell."""


def search_loop(  # noqa: PLR0913 (two parts, two limits, two callbacks and the record: no group of them has a name)
    optimizer: Optimizer,
    evaluator: Evaluator,
    *,
    trace: TraceWriter,
    timebox: TimeBox,
    limits: Limits,
    on_generation: Callable[[Progress], None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> SearchOutcome:
    """Search until the evaluations are spent, another generation would not fit, or somebody interrupts.

    The first generation always runs, whatever the limits. A KeyboardInterrupt, or `interrupted()` between
    generations, ends the search with what it has; a generation under way is dropped.

    Raises:
        ValueError: from the optimiser, when no candidate of a generation has a finite loss.
    """
    state = SearchState(Archive(limits.n_finalists))
    ended_by: EndedBy | None = None
    while ended_by is None:
        try:
            ended_by = _reason_to_end(state, timebox, limits, interrupted)
            if ended_by is None:
                _run_generation(state, optimizer, evaluator, trace, timebox)
                if on_generation:
                    best = state.archive.best_loss()
                    on_generation(Progress(state.generations, state.evaluations, best, timebox.left_s()))
        except KeyboardInterrupt:
            ended_by = "interrupt"
    mean_genome = optimizer.mean()
    genomes, losses = state.archive.contents(len(mean_genome))
    return SearchOutcome(genomes, losses, mean_genome, state.evaluations, ended_by, state.generations)


def _reason_to_end(
    state: SearchState, timebox: TimeBox, limits: Limits, interrupted: Callable[[], bool]
) -> EndedBy | None:
    """Say why no further generation may start, None if it may."""
    if interrupted():
        return "interrupt"
    if state.generations == 0:
        return None
    if state.evaluations + state.batch > limits.max_evaluations:
        return "evaluations"
    return None if timebox.fits(CAUTION * state.longest_s) else "clock"


def _run_generation(
    state: SearchState, optimizer: Optimizer, evaluator: Evaluator, trace: TraceWriter, timebox: TimeBox
) -> None:
    """Ask, evaluate, record, tell. Recorded first, so that a failure to tell can be replayed."""
    started_s = timebox.elapsed_s()
    genomes = optimizer.ask()
    scores = evaluator.evaluate(genomes)
    scored_s = timebox.elapsed_s()
    evaluations = state.evaluations + len(genomes)
    trace.generation(
        Generation(
            index=state.generations,
            genomes=genomes,
            losses=scores.losses,
            per_expert=scores.per_expert,
            evaluations=evaluations,
            n_tokens=scores.n_tokens,
            elapsed_s=scored_s,
            seconds=scored_s - started_s,
            peak_bytes=scores.peak_bytes,
            rungs=[{"prompts": scores.n_prompts, "candidates": list(range(len(genomes)))}],
        )
    )
    state.archive.add(genomes, scores.losses)
    state.generations, state.evaluations, state.batch = state.generations + 1, evaluations, len(genomes)
    optimizer.tell(scores.losses)
    state.longest_s = max(state.longest_s, timebox.elapsed_s() - started_s)
