"""Ask, evaluate, tell, until the evaluations or the clock run out; keep an archive of the best.

Knows vectors, losses, seconds and the trace; not models, prompts, coefficients or nevergrad. No torch.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from search.archive import Archive
from search.errors import InputError
from search.interruption import Interrupted
from search.racing import Evaluator, Race, order_blocks, plan_race
from search.space import FloatArray
from search.timebox import OutOfTime, TimeBox
from search.trace import Generation, TraceWriter

CAUTION = 1.2
"""A generation starts only if this many times the longest recent one fits in the time left."""
N_LOOKED_BACK = 8
"""Generations that are recent: the very first may have compiled, or loaded, what later ones find there."""


class Optimizer(Protocol):
    """Proposes genomes and learns from their losses, one generation at a time."""

    def inject(self, genomes: FloatArray) -> None:
        """Have the next `ask` return these (k, n_params) among its own."""
        ...

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
    """What scoring a batch of candidates on all prompts gave."""

    losses: FloatArray
    """(n_candidates,) smaller is better; not finite where a candidate could not be scored."""
    per_expert: FloatArray
    """(n_candidates, n_experts) what the losses are combined from."""
    n_tokens: int
    """Tokens of all forward passes."""
    peak_bytes: int | None
    """Most memory in use, where the device tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a search ends, beside the clock, and how a generation is raced."""

    max_evaluations: int
    """Never exceeded, but for a first generation that is larger."""
    n_finalists: int
    """Size of the archive."""
    race_keep: float | None = None
    """Share of candidates that goes on to 1 / race_keep times the prompts; None scores all on all."""
    seed: int = 0
    """Of the order of blocks."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress line shows after a generation."""

    generations: int
    evaluations: int
    best_loss: float
    left_s: float
    seconds: float = 0.0
    """That scoring this generation took."""
    n_tokens: int = 0
    """In its forward passes."""
    longest_s: float = 0.0
    """Longest recent generation, from ask to tell."""


EndedBy = Literal["evaluations", "clock", "interrupt"]


@dataclass(frozen=True, slots=True)
class Past:
    """What an earlier run of the same search recorded."""

    generations: Sequence[Generation] = ()
    """To be replayed: asked for again, compared, and told, without scoring."""
    ended_by: EndedBy | None = None
    """What ended it, if it was over."""


@dataclass(frozen=True, slots=True, eq=False)
class SearchOutcome:
    """What the search found, and why it stopped."""

    archive_genomes: FloatArray
    """(k, n_params) the best distinct genomes, best first; k = 0 when no generation was finished."""
    archive_losses: FloatArray
    """(k,)."""
    archive_per_expert: FloatArray
    """(k, n_experts)."""
    mean_genome: FloatArray
    """(n_params,) where the optimiser is centred."""
    evaluations: int
    ended_by: EndedBy
    generations: int
    longest_s: float
    """Longest recent generation, earlier stages included."""


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """Who proposes candidates and who scores them."""

    optimizer: Optimizer
    evaluator: Evaluator
    propose: Callable[[int, FloatArray], FloatArray] = lambda generation, mean: np.empty((0, len(mean)))
    """From the number of generations done and the mean (n_params,) to genomes (k, n_params) to inject."""
    proposal_s: Callable[[int], float] = lambda generation: 0.0
    """Seconds that proposing takes after so many generations, beside the generation itself."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchTools:
    """What a search is recorded, timed, shown and stopped with."""

    trace: TraceWriter
    timebox: TimeBox
    on_generation: Callable[[Progress], None] = lambda progress: None
    interrupted: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Before:
    """What came before this search in the same trace: earlier stages."""

    stage: int = 0
    """Index of this stage."""
    generations: int = 0
    evaluations: int = 0
    n_candidates: int = 0
    """Of their last generation."""
    longest_s: float = 0.0
    """Their longest recent generation, from ask to tell."""


_NOTHING, _NO_PAST = Before(), Past()


@dataclass(slots=True)
class SearchState:
    """What a running search has done; replaying recorded generations rebuilds it."""

    archive: Archive
    before: Before
    generations: int = 0
    evaluations: int = 0
    batch: int = 0
    """Candidates of the last generation."""
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=N_LOOKED_BACK))
    """Seconds of recent generations, from ask to tell."""
    n_experts: int = 0

    @property
    def longest_s(self) -> float:
        """The longest of them."""
        return max(self.recent_s, default=0.0)

    def take(self, generation: Generation) -> None:
        """Learn from a finished generation."""
        full = generation.rungs[-1]["candidates"]
        self.archive.add(generation.genomes[full], generation.losses[full], generation.per_expert[full])
        self.batch = len(generation.genomes)
        self.generations, self.evaluations = self.generations + 1, self.evaluations + self.batch
        self.recent_s.append(generation.seconds)
        self.n_experts = generation.per_expert.shape[1]


def search_loop(
    engine: Engine, tools: SearchTools, limits: Limits, *, before: Before = _NOTHING, past: Past = _NO_PAST
) -> SearchOutcome:
    """Search until the evaluations are spent, another generation would not fit, or somebody interrupts.

    The very first generation always begins, whatever the limits. `Interrupted` or `OutOfTime` from the
    evaluator, or `interrupted()` between generations, ends the search with what it has; a generation under
    way is dropped.

    Raises:
        InputError: when no candidate has a finite loss, or `past` is not this optimiser's.
    """
    state = SearchState(Archive(limits.n_finalists), before, batch=before.n_candidates)
    state.recent_s.append(before.longest_s)
    for generation in past.generations:
        _replay_generation(state, generation, engine.optimizer)
    ended_by = past.ended_by
    while ended_by is None:
        try:
            ended_by = _reason_to_end(state, engine, tools, limits)
            if ended_by is None:
                _run_generation(state, engine, tools, limits)
        except Interrupted:
            ended_by = "interrupt"
        except OutOfTime:
            ended_by = "clock"
    mean = engine.optimizer.mean()
    contents = state.archive.contents(len(mean), state.n_experts)
    return SearchOutcome(*contents, mean, state.evaluations, ended_by, state.generations, state.longest_s)


def _reason_to_end(state: SearchState, engine: Engine, tools: SearchTools, limits: Limits) -> EndedBy | None:
    """Say why no further generation may start, None if it may."""
    if tools.interrupted():
        return "interrupt"
    if state.generations + state.before.generations == 0:
        return None
    if state.evaluations + state.batch > limits.max_evaluations:
        return "evaluations"
    next_s = state.longest_s + engine.proposal_s(state.generations)
    return None if tools.timebox.fits(CAUTION * next_s) else "clock"


def _replay_generation(state: SearchState, recorded: Generation, optimizer: Optimizer) -> None:
    """Bring the optimiser to where it stood: telling it what it has not asked for would not."""
    fits = recorded.genomes.shape[1] == len(optimizer.mean())
    if fits and len(recorded.injected):
        optimizer.inject(recorded.injected)
    if not fits or not np.array_equal(optimizer.ask(), recorded.genomes):
        raise InputError(
            f"generation {recorded.index} of the trace cannot be repeated: the optimiser asks for other "
            "genomes. Resume on the machine and with the libraries that wrote it, or choose another --out."
        )
    optimizer.tell(recorded.losses)
    state.take(recorded)


def _run_generation(state: SearchState, engine: Engine, tools: SearchTools, limits: Limits) -> None:
    """Ask, evaluate, record, tell. Recorded first, so that a failure to tell can be replayed."""
    started_s, optimizer = tools.timebox.elapsed_s(), engine.optimizer
    injected = engine.propose(state.generations, optimizer.mean())
    if len(injected):
        optimizer.inject(injected)
    genomes = optimizer.ask()
    index = state.before.generations + state.generations
    race, raced_from_s = Race(genomes, engine.evaluator), tools.timebox.elapsed_s()
    rungs = plan_race(len(genomes), engine.evaluator.n_blocks, limits.race_keep)
    race.run(rungs, order_blocks(engine.evaluator.n_blocks, limits.seed, index))
    scored_s = tools.timebox.elapsed_s()
    generation = Generation(
        index=index,
        stage=state.before.stage,
        genomes=genomes,
        injected=injected,
        losses=race.losses(),
        per_expert=race.per_expert,
        evaluations=state.before.evaluations + state.evaluations + len(genomes),
        n_tokens=race.n_tokens,
        elapsed_s=scored_s,
        seconds=scored_s - started_s,
        peak_bytes=race.peak_bytes,
        rungs=race.rungs,
        prompt_spread=race.prompt_spread(),
    )
    tools.trace.generation(generation)
    state.take(generation)
    optimizer.tell(generation.losses)
    state.recent_s[-1] = max(state.recent_s[-1], tools.timebox.elapsed_s() - started_s)
    tools.on_generation(
        Progress(
            index + 1,
            generation.evaluations,
            state.archive.best_loss(),
            tools.timebox.left_s(),
            scored_s - raced_from_s,
            race.n_tokens,
            state.longest_s,
        )
    )
