"""Search coarse to fine: stage after stage, each in its own space, carrying the best and the spread along.

Knows spaces, optimisers and the loop; not models, prompts or what becomes of the outcome.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from search.loop import Before, EndedBy, Engine, Limits, Past, SearchTools, search_loop
from search.optimizer import BatchOptimizer
from search.racing import BlockScores
from search.space import FloatArray, Space
from search.trace import TraceWriter

SAME = 1e-9
"""Closer coefficients are one candidate, put into a later stage's first generation again."""
LEAST_SPREAD = 0.5
"""Of the first spread: a coarse search has not tried the finer directions, so says little of them."""


class TableEvaluator(Protocol):
    """Scores coefficients on blocks of prompts."""

    n_blocks: int

    def score_blocks(self, coefficients: FloatArray, blocks: Sequence[int]) -> BlockScores:
        """Score coefficients (n_candidates, n_groups, n_adapters) on the prompts of some blocks."""
        ...

    def combine(self, sums: FloatArray, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Turn sums (n_candidates, n_experts) into losses and per_expert."""
        ...


class GenomeEvaluator:
    """Decodes genomes of one space for an evaluator of coefficients."""

    def __init__(self, space: Space, evaluator: TableEvaluator) -> None:
        self._space, self._evaluator = space, evaluator

    @property
    def n_blocks(self) -> int:
        """How many blocks of prompts there are."""
        return self._evaluator.n_blocks

    def score_blocks(self, genomes: FloatArray, blocks: Sequence[int]) -> BlockScores:
        """Score genomes (n_candidates, n_params)."""
        return self._evaluator.score_blocks(self._space.to_coefficients(genomes), blocks)

    def combine(self, sums: FloatArray, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Turn sums into losses."""
        return self._evaluator.combine(sums, counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One space to search in, and its share of the search."""

    space: Space
    share: float
    """Of evaluations and seconds, relative to the other stages'."""
    settings: Mapping[str, Any]
    """What the trace says of the space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerChoice:
    """Which optimiser, and how large its generations are."""

    name: str
    n_candidates: int
    seed: int

    @property
    def takes_injections(self) -> bool:
        """Whether a genome can be put into a generation."""
        return self.make(np.zeros(2), np.ones(2), self.n_candidates, 0).n_injectable > 0

    def make(self, start: FloatArray, spread: FloatArray, budget: int, stage: int) -> BatchOptimizer:
        """Start one at a genome (n_params,), for `budget` evaluations or at least one generation."""
        seed, budget = (self.seed + stage) % 2**32, max(budget, self.n_candidates)
        return BatchOptimizer(start, spread, self.n_candidates, budget, seed, self.name)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What all stages found, as coefficients of the run's groups."""

    archive: FloatArray
    """(k, n_groups, n_adapters) the best of all stages, best first."""
    archive_losses: FloatArray
    """(k,)."""
    archive_per_expert: FloatArray
    """(k, n_experts)."""
    mean: FloatArray
    """(n_groups, n_adapters) where the last stage's distribution is centred."""
    spread: FloatArray
    """(n_groups, n_adapters) its standard deviation."""
    evaluations: int
    generations: int
    ended_by: EndedBy


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedSearch:
    """What all stages share."""

    stages: Sequence[Stage]
    choice: OptimizerChoice
    limits: Limits
    evaluator: TableEvaluator
    search_s: float
    """Seconds for all stages together."""
    past_of: Callable[[int], Past]
    """What the trace already knows of a stage."""
    inject_every: int
    """Generations from one improved mean, put into the population, to the next; 0 for none."""
    improve: Callable[[FloatArray], FloatArray]
    """From coefficients (n_groups, n_adapters) to better ones."""
    improve_s: float = 0.0
    """Seconds that this takes."""

    def improves_after(self, generations: int) -> bool:
        """Whether an improved mean is put in once so many generations of a stage are done."""
        return self.inject_every > 0 and (generations + 1) % self.inject_every == 0


def run_stages(search: StagedSearch, start: FloatArray, spread: FloatArray, tools: SearchTools) -> Found:
    """Run the stages one after the other, from coefficients and spread (n_groups, n_adapters).

    Optimiser, evaluator and proposals are made anew for each stage.
    """
    first_spread, total = spread, sum(stage.share for stage in search.stages)
    injects = search.choice.takes_injections
    founds: list[Found] = []
    best, before = np.empty((0, *start.shape)), Before()
    spent = 0.0
    for index, stage in enumerate(search.stages):
        spent += stage.share
        later_s = search.search_s * (1 - spent / total)
        n_left = round(search.limits.max_evaluations * spent / total) - before.evaluations
        limits = replace(search.limits, max_evaluations=n_left)
        tools.timebox.reserve("later stages", max(0.0, later_s))
        _record_start(tools, stage, before, start, spread)
        found, before = _run_stage(search, stage, _Start(start, spread, best, limits, before), tools)
        founds.append(found)
        _record_end(tools.trace, index, found, tools.timebox.elapsed_s())
        if found.ended_by == "interrupt":
            break
        best = _join(founds, 1).archive  # empty where no loss was finite
        start, best = (best[0], best[:0]) if len(best) and not injects else (found.mean, best)
        spread = np.maximum(found.spread, LEAST_SPREAD * first_spread)
    tools.timebox.release("later stages")
    return _join(founds, search.limits.n_finalists)


@dataclass(frozen=True, slots=True, eq=False)
class _Start:
    coefficients: FloatArray
    spread: FloatArray
    best: FloatArray
    """(0 or 1, n_groups, n_adapters) of the stages before, to be put into the first generation."""
    limits: Limits
    before: Before


def _run_stage(search: StagedSearch, stage: Stage, start: _Start, tools: SearchTools) -> tuple[Found, Before]:
    """Return what the stage found, and what the next one has before it."""
    space, before = stage.space, start.before
    genome, genome_spread = space.encode(start.coefficients, start.spread)
    optimizer = search.choice.make(genome, genome_spread, start.limits.max_evaluations, before.stage)

    def propose(generation: int, mean: FloatArray) -> FloatArray:
        tables = list(start.best) if generation == 0 else []
        if search.improves_after(generation):
            tables.append(search.improve(space.to_coefficients(mean[None])[0]))
        genomes = [space.encode(table, start.spread)[0] for table in tables]
        return np.array(genomes[: max(1, optimizer.n_injectable)]).reshape(-1, len(mean))

    engine = Engine(
        optimizer,
        GenomeEvaluator(space, search.evaluator),
        propose,
        lambda generation: search.improve_s if search.improves_after(generation) else 0.0,
    )
    outcome = search_loop(engine, tools, start.limits, before=before, past=search.past_of(before.stage))
    rng = np.random.default_rng([search.choice.seed, before.stage])
    found = Found(
        archive=space.to_coefficients(outcome.archive_genomes),
        archive_losses=outcome.archive_losses,
        archive_per_expert=outcome.archive_per_expert,
        mean=space.to_coefficients(outcome.mean_genome[None])[0],
        spread=space.spread_of(outcome.mean_genome, optimizer.spread(), rng),
        evaluations=before.evaluations + outcome.evaluations,
        generations=before.generations + outcome.generations,
        ended_by=outcome.ended_by,
    )
    n_candidates = search.choice.n_candidates
    later = Before(before.stage + 1, found.generations, found.evaluations, n_candidates, outcome.longest_s)
    return found, later


def _record_start(
    tools: SearchTools, stage: Stage, before: Before, start: FloatArray, spread: FloatArray
) -> None:
    tools.trace.event(
        "stage",
        index=before.stage,
        space=stage.settings,
        n_params=stage.space.n_params,
        first_generation=before.generations,
        start=start,
        spread=spread,
        left_s=tools.timebox.left_s(),
    )


def _record_end(trace: TraceWriter, index: int, found: Found, elapsed_s: float) -> None:
    trace.event(
        "stage_ended",
        index=index,
        ended_by=found.ended_by,
        generations=found.generations,
        evaluations=found.evaluations,
        elapsed_s=elapsed_s,
    )


def _join(founds: Sequence[Found], n_finalists: int) -> Found:
    """Keep the best distinct of all stages' archives, scored on the same prompts, and the last mean.

    The clock ended the search if it ended any stage: then it cannot be repeated.
    """
    losses = np.concatenate([found.archive_losses for found in founds])
    tables = np.concatenate([found.archive for found in founds])
    best: list[int] = []
    for place in np.argsort(losses, kind="stable").tolist():
        distances = np.abs(tables[best] - tables[place]).max(axis=(1, 2))
        if len(best) < n_finalists and not (distances < SAME).any():
            best.append(place)
    by_clock = founds[-1].ended_by == "evaluations" and any(found.ended_by == "clock" for found in founds)
    with_experts = [found.archive_per_expert for found in founds if len(found.archive_losses)]
    return replace(
        founds[-1],
        archive=tables[best],
        archive_losses=losses[best],
        archive_per_expert=np.concatenate(with_experts)[best] if with_experts else np.empty((0, 0)),
        ended_by="clock" if by_clock else founds[-1].ended_by,
    )
