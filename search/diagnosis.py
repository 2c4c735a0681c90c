"""What a dry run found, and what to change where the run would not fit.

Knows the facts and the settings that they follow from; not how any of it was measured, nor how it is shown.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from search.forecast import Forecast, SearchPlan, Timetable

GIB = 2**30
ENOUGH_GENERATIONS = 20
"""Of fewer, CMA makes little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """The base model."""

    id: str
    n_parameters: int
    dtype: str
    device: str
    device_name: str | None
    """The card's; None for a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """One expert."""

    name: str
    n_modules: int
    ranks: tuple[int, int]
    """Least and most of any module."""
    scalings: tuple[float, float]
    """Least and most of any module."""
    sha256: str
    has_skeletons: bool
    peak_kl_nats: float
    """Largest KL(expert, base) at a scored position, averaged over the few prompts measured on."""
    entropy_ratio: float
    """The expert's entropy over the base's, on the same prompts."""
    weak_reason: str
    """Why its prompts, these few, leave doubt; empty where they do not."""

    @property
    def is_weak(self) -> bool:
        """Whether its coefficients are to be kept near the balanced merge."""
        return bool(self.weak_reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """One stage of the search."""

    groups: str
    genome: str
    n_params: int
    optimizer: str
    """And what covariance it learns, where it is CMA."""


@dataclass(frozen=True, slots=True)
class PriorFacts:
    """What the search starts from."""

    source: str
    missing: tuple[str, ...]
    """Names of adapters that it does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFacts:
    """What candidates are scored on."""

    n_adapters: int
    searched: int
    """An adapter, as configured."""
    unseen: int
    """An adapter, as configured."""
    tried_searched: int
    """An adapter, that were written for this diagnosis in place of those."""
    tried_unseen: int
    tokens_per_prompt: float
    """Mean of those."""

    @property
    def growth(self) -> float:
        """How many times as many prompts the run has."""
        return (self.searched + self.unseen) / (self.tried_searched + self.tried_unseen)

    @property
    def tokens_per_candidate(self) -> float:
        """Tokens that scoring one candidate on all searched prompts takes."""
        return self.n_adapters * self.searched * self.tokens_per_prompt


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """What is computed at once."""

    tokens: int
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a run of full size takes on the device, in bytes, and in what batches it works."""

    is_measured: bool
    """Forwards on the device were; else all but the weights follows from the model's shape."""
    usable_bytes: int
    """What the process may hold, with a reserve left free."""
    base_bytes: int
    adapters_bytes: int
    signals_bytes: int
    """What the experts say on all prompts."""
    scoring: BatchFacts
    gradient: BatchFacts | None
    """None where none is configured."""
    prompts: BatchFacts
    answers: BatchFacts
    choices: BatchFacts
    tokens_asked: int | None
    """search.tokens_per_forward."""

    @property
    def search_bytes(self) -> int:
        """While candidates are scored, or the gradient is taken."""
        largest = max(self.scoring.n_bytes, self.gradient.n_bytes if self.gradient else 0)
        return self.base_bytes + self.adapters_bytes + self.signals_bytes + largest

    @property
    def needed_bytes(self) -> int:
        """At most, of all phases."""
        writing = self.base_bytes + self.adapters_bytes + self.prompts.n_bytes
        answering = self.base_bytes + max(self.answers.n_bytes, self.choices.n_bytes)
        return max(self.search_bytes, writing, answering)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """Bytes on the device: of the GPU, or of the whole process."""

    peak_bytes: int
    """Measured, with few prompts."""
    expected_bytes: int
    """With all prompts: what the experts say is kept for each of them."""
    available_bytes: int
    tokens_per_forward: int | None
    """What a forward pass was cut down to; None where memory did not run out."""
    plan: MemoryPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What would run."""

    base: BaseFacts
    adapters: tuple[AdapterFacts, ...]
    left_out: Mapping[str, str]
    """Name of each adapter that no merge can use, and why."""
    weak_signal_nats: float
    groups: tuple[str, ...]
    """(n_groups,) rows of the coefficients."""
    stages: tuple[StageFacts, ...]
    prior: PriorFacts | None
    prompts: PromptFacts
    candidate_s: float
    """Seconds of one candidate alone, on all searched prompts."""
    gradient_s: float | None
    """Seconds of one gradient step; None where none is configured."""
    race_keep: float | None
    n_finalists: int
    times: Timetable
    plan: SearchPlan
    forecast: Forecast
    memory: MemoryFacts


def advise(found: Diagnosis) -> tuple[str, ...]:
    """Say what to change, a line each; nothing where all is well."""
    return (*_advise_on_time(found), *_advise_on_memory(found), *_advise_on_signals(found))


def _advise_on_time(found: Diagnosis) -> Iterator[str]:
    times, n_made, box_s = found.times, found.forecast.generations, found.times.time_box_s
    n_first = len(found.stages)
    enough_s = times.box_for(ENOUGH_GENERATIONS)
    if (least_s := times.box_for(n_first)) > box_s:
        yield (
            f"the time box of {box_s:g} s is too small: one generation of each stage and all else take "
            f"{least_s} s. Raise search.time_box_s to at least {least_s} ({enough_s} for "
            f"{ENOUGH_GENERATIONS} generations), or lower {_name_costs(found)}"
        )
    elif n_made < ENOUGH_GENERATIONS and found.forecast.ended_by == "clock":
        yield (
            f"only {n_made} generations fit the time box; a search needs {ENOUGH_GENERATIONS} or more. Raise "
            f"search.time_box_s to at least {enough_s}, or lower {_name_costs(found)}"
        )
    if found.plan.max_evaluations < ENOUGH_GENERATIONS * found.plan.n_candidates:
        yield (
            f"search.max_evaluations = {found.plan.max_evaluations} allows fewer than {ENOUGH_GENERATIONS} "
            f"generations of {found.plan.n_candidates}; raise it to at least "
            f"{ENOUGH_GENERATIONS * found.plan.n_candidates}, or lower search.n_candidates"
        )


def _name_costs(found: Diagnosis) -> str:
    """The settings that take time, with their values; racing where there is none."""
    costs = (
        f"prompts.per_adapter ({found.prompts.searched}), prompts.unseen_per_adapter "
        f"({found.prompts.unseen}), search.n_candidates ({found.plan.n_candidates}) or search.n_finalists "
        f"({found.n_finalists})"
    )
    return costs if found.race_keep else f"{costs}, or race candidates: search.race_keep = 0.5"


def _advise_on_memory(found: Diagnosis) -> Iterator[str]:
    memory = found.memory
    if memory.tokens_per_forward is not None:
        yield (
            "memory ran out, and each time the work is done again: set search.tokens_per_forward to "
            f"{memory.tokens_per_forward}, which fitted"
        )
    plan = memory.plan
    if plan.is_measured:
        yield from _advise_on_plan(plan)
    elif memory.expected_bytes > memory.available_bytes:
        yield (
            f"about {memory.expected_bytes / 1e9:.1f} GB are needed, {memory.available_bytes / 1e9:.1f} GB "
            "are there. Lower prompts.per_adapter, prompts.unseen_per_adapter or prompts.max_new_tokens "
            "(what is kept for each scored token), or search.tokens_per_forward (what is computed at once)"
        )


def _advise_on_plan(plan: MemoryPlan) -> Iterator[str]:
    """Name the first thing that leaves no room, and the setting that it follows from."""
    usable, weights = plan.usable_bytes, plan.base_bytes + plan.adapters_bytes
    if plan.needed_bytes <= usable:
        return
    found = f"{plan.needed_bytes / GIB:.1f} GiB are needed, {usable / GIB:.1f} GiB can be used"
    if plan.tokens_asked and plan.search_bytes > usable > weights + plan.signals_bytes:
        yield (
            f"{found}: search.tokens_per_forward is {plan.tokens_asked}. Leave it out, and it follows from "
            "the memory"
        )
    elif weights + plan.signals_bytes > usable > weights:
        yield (
            f"{found}: what the experts say takes {plan.signals_bytes / GIB:.1f}. Lower prompts.per_adapter, "
            "prompts.unseen_per_adapter or prompts.max_new_tokens"
        )
    else:
        yield (
            f"{found}: base and adapters take {weights / GIB:.1f}. Choose a narrower base.dtype or a smaller "
            "base, free the device, or raise the process's share of it"
        )


def _advise_on_signals(found: Diagnosis) -> Iterator[str]:
    weak = [adapter for adapter in found.adapters if adapter.is_weak]
    for has_skeletons, cure in (
        (False, "give them `skeletons:` in the config"),
        (True, "give them other `skeletons:`, ones that show what they were trained on"),
    ):
        names = [adapter.name for adapter in weak if adapter.has_skeletons == has_skeletons]
        if names:
            yield (
                f"weak signal, to be kept near the balanced merge: {', '.join(names)}; {cure}. (Measured on "
                f"{found.prompts.tried_searched} prompts each; the run measures again)"
            )
