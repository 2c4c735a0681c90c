"""What my_merge has when its search begins, for methods that it is compared with: prompts, signals, a clock.

Knows the order of these steps, the limits and the trace; not what a method makes of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_merging.merging.Merges import Merges
from search.delivery import rehearse_merge
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import ExpertSignals, expert_signals
from search.groups import Groups
from search.loop import CAUTION, EndedBy, Scores
from search.prompts import PromptSet
from search.recorded import TRACE_FILE
from search.resume import Record
from search.setup import Setup, load_setup
from search.space import FloatArray
from search.timebox import TimeBox
from search.trace import Generation, TraceWriter


@dataclass(slots=True, kw_only=True, eq=False)
class PromptedSearch:
    """Prompts and signals that are my_merge's for the same seed, and what may still be spent on them."""

    setup: Setup
    prompts: PromptSet
    """Those that my_merge searches on; nobody is compared on unseen ones here."""
    signals: ExpertSignals
    box: TimeBox
    trace: TraceWriter
    max_evaluations: int
    since_s: float
    """When the last candidates were done, by the box."""
    longest_s: float = 0.0
    """Longest of the recorded steps so far."""
    evaluations: int = 0
    generations: int = 0
    ended_by: EndedBy | None = None
    """What did not let the search go on."""

    def evaluator(self, scoring: Scoring | None = None, groups: Groups | None = None) -> PopulationEvaluator:
        """Return what scores candidates, as configured, or by `scoring` and in `groups`."""
        settings, parts = self.setup.config, self.setup.parts
        configured = Scoring(
            objective=self.setup.objective,
            combine=settings.objective.combine,
            tokens_per_forward=settings.search.tokens_per_forward,
        )
        groups, scoring = groups or parts.groups, scoring or configured
        return PopulationEvaluator(parts.model, parts.stacked, groups, self.prompts, self.signals, scoring)

    def may_go_on(self, n_candidates: int) -> bool:
        """Whether so many more candidates fit the limit and the clock; the first ones always do."""
        if self.generations == 0:
            return True
        if self.evaluations + n_candidates > self.max_evaluations:
            self.ended_by = "evaluations"
        elif not self.box.fits(CAUTION * self.longest_s):
            self.ended_by = "clock"
        return self.ended_by is None

    def record(self, genomes: FloatArray, scores: Scores) -> None:
        """Write scored candidates (n_candidates, n_params) to the trace, and see how long they took."""
        now_s = self.box.elapsed_s()
        self.evaluations += len(genomes)
        self.longest_s = max(self.longest_s, now_s - self.since_s)
        generation = Generation(
            index=self.generations,
            genomes=genomes,
            losses=scores.losses,
            per_expert=scores.per_expert,
            evaluations=self.evaluations,
            n_tokens=scores.n_tokens,
            elapsed_s=now_s,
            seconds=now_s - self.since_s,
            peak_bytes=scores.peak_bytes,
        )
        self.trace.generation(generation)
        self.generations, self.since_s = self.generations + 1, now_s

    def provenance(self) -> dict[str, Any]:
        """Return what the merge's record says of the search."""
        ended = {"ended_by": self.ended_by} if self.ended_by else {}
        seed = self.setup.config.search.seed
        return {"seed": seed, "trace": TRACE_FILE, "evaluations": self.evaluations, **ended}


@contextmanager
def prompted_search(method: Merges) -> Iterator[PromptedSearch]:
    """Write prompts and take signals, with base and tokenizer loaded, as `search.phases` does; keep a trace.

    An adapter that my_merge leaves out before its search is not in `setup.parts` either.

    The time box is my_merge's, less what writing the merge takes. There are no finalists to keep time for, so
    that a method may search longer than my_merge by that.

    Raises:
        InputError: for weights or settings that do not fit, or an output that cannot be written.
    """
    config = method.config
    caller_s = method.measure_reserve_s()
    box = TimeBox(config.search.time_box_s)
    box.reserve("caller", caller_s)
    with TraceWriter(method.output / TRACE_FILE) as trace:
        setup = load_setup(config, method.loaded_base)
        parts = setup.parts
        trace.header({**setup.describe(), "method": method.name})
        prompts = setup.write_prompts(trace, Record()).searched
        uniform = np.full(parts.shape, 1 / parts.shape[1])
        box.reserve("merge", CAUTION * rehearse_merge(parts, uniform, config.base.name, method.output))
        yield PromptedSearch(
            setup=setup,
            prompts=prompts,
            signals=expert_signals(parts.model, parts.stacked, parts.groups, prompts),
            box=box,
            trace=trace,
            max_evaluations=config.search.max_evaluations,
            since_s=box.elapsed_s(),
        )
