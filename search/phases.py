"""The phases of a run after loading: prompts, signals, search, finalists, merge.

Knows their order, and the clock and the trace that they share; not how any of them works.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search.adapters import Adapter
from search.delivery import deliver_merge, rehearse_merge
from search.ending import (
    Pace,
    descend,
    estimate_finalists_s,
    judge_on_searched,
    judge_on_unseen,
    refine_best,
)
from search.finalists import Judgement
from search.groups import Groups
from search.interruption import Interrupted, Interruption
from search.loop import CAUTION, EndedBy, Progress, SearchTools
from search.merge import MergedAdapter
from search.objective import objective_label
from search.planning import choose_optimizer, set_limits
from search.progress import ProgressLine
from search.provenance import checkout_commit, library_versions
from search.recorded import TRACE_FILE
from search.resume import Record
from search.setup import Setup
from search.space import FloatArray
from search.stages import Found, StagedSearch, run_stages
from search.steering import Steering
from search.summary import RunFacts, write_summary
from search.timebox import TimeBox
from search.trace import TraceWriter

REFINE_SHARE = 0.5
"""Of the time that is left for search and refinement, the most that is kept for the latter."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunResult:
    """What a run found and wrote."""

    adapters: tuple[Adapter, ...]
    coefficients: FloatArray
    """(n_groups, n_adapters) of the winner."""
    groups: Groups
    merged: MergedAdapter
    winner: str
    """The finalist's name."""
    loss: float
    """On unseen prompts, or on the searched ones where finalists were skipped."""
    evaluations: int
    ended_by: EndedBy
    interrupted: bool
    """Whether somebody asked to end, be it when all was done but the merge."""
    report: str
    """For people."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all phases use."""

    trace: TraceWriter
    box: TimeBox
    line: ProgressLine
    interruption: Interruption
    record: Record


class Phases:
    """The phases after loading."""

    def __init__(self, setup: Setup, shared: Shared) -> None:
        self._setup, self._config, self._parts = setup, setup.config, setup.parts
        self._trace, self._box, self._line = shared.trace, shared.box, shared.line
        self._interruption, self._record = shared.interruption, shared.record
        self._phase_name = "load"
        self._n_back_offs = 0
        self._gradient_s = 0.0

    def finish(self, output: Path) -> RunResult:
        """Do what is left after loading."""
        self._phase("prompts")
        prompts = self._setup.write_prompts(self._trace, self._record)
        self._phase("signals")
        steering = self._setup.steer(prompts, self._trace, self._record)
        self._record_back_offs(steering)
        finalists_s = self._reserve_for_the_end(steering, output)
        self._interruption.defer()
        steering.searched.checkpoint = steering.unseen.checkpoint = self._interruption.check
        found = self._search(steering)
        ended_by, judgement = self._judge(steering, found, finalists_s)
        n_unseen = np.bincount(prompts.unseen.expert, minlength=len(self._parts.names)).tolist()
        facts = RunFacts(
            names=self._parts.names,
            judgement=judgement,
            evaluations=found.evaluations,
            generations=found.generations,
            ended_by=ended_by,
            n_unseen=n_unseen,
            left_out=self._setup.left_out,
            weak=steering.weak,
            back_offs=steering.budget.oom_events,
        )
        return self._deliver(facts, output)

    def _phase(self, name: str) -> None:
        self._phase_name = name
        self._line.phase(name)

    def _reserve_for_the_end(self, steering: Steering, output: Path) -> float:
        """Measure and reserve what finalists, or one candidate in their place, and merge take at most.

        Returns:
            The finalists' seconds.
        """
        self._phase("rehearsal")
        uniform = steering.references[1].coefficients
        merge_s = rehearse_merge(self._parts, uniform, self._config.base.name, output)
        settings = self._config.search
        self._gradient_s = self._time_gradient(steering, uniform)
        finalists_s = CAUTION * estimate_finalists_s(steering, settings.n_finalists)
        self._box.reserve("merge", CAUTION * (merge_s + steering.searched_candidate_s))
        self._box.reserve("finalists", finalists_s)
        steps = settings.gradient.refine_steps
        refine_s = CAUTION * (steps + 1) * self._gradient_s if steps else 0.0
        self._box.reserve("refine", min(refine_s, REFINE_SHARE * max(0.0, self._box.left_s())))
        return finalists_s

    def _time_gradient(self, steering: Steering, at: FloatArray) -> float:
        """Take two gradients where some are asked for, the faster one's seconds; what cannot be shows now."""
        gradient, seconds = self._config.search.gradient, []
        for _ in range(2 if gradient.refine_steps or gradient.inject_every else 0):
            started_s = time.monotonic()
            steering.searched.gradient(at)
            seconds.append(time.monotonic() - started_s)
        return min(seconds, default=0.0)

    def _search(self, steering: Steering) -> Found:
        self._phase("search")
        first = self._setup.first
        start, spread, search_s = steering.confine(first.start), first.spread, self._box.left_s()
        if began := self._record.event("search"):  # to the last bit: the recorded genomes follow from it
            start, spread, search_s = np.array(began["start"]), np.array(began["spread"]), began["left_s"]
        self._trace.event(
            "search",
            start=start,
            spread=spread,
            prior=self._setup.describe_prior(),
            left_s=search_s,
            elapsed_s=self._box.elapsed_s(),
        )

        def show(progress: Progress) -> None:
            self._line.show(progress)
            self._record_back_offs(steering)

        tools = SearchTools(
            trace=self._trace,
            timebox=self._box,
            on_generation=show,
            interrupted=lambda: self._interruption.requested,
        )
        found = run_stages(self._plan_search(steering, search_s), start, spread, tools)
        self._trace.event(
            "search_ended",
            ended_by=found.ended_by,
            generations=found.generations,
            evaluations=found.evaluations,
            best_loss=found.archive_losses.min(initial=np.inf),
            elapsed_s=self._box.elapsed_s(),
            mean=found.mean,
            spread=found.spread,
        )
        return found

    def _plan_search(self, steering: Steering, search_s: float) -> StagedSearch:
        settings, gradient = self._config.search, self._config.search.gradient
        steps, rate = gradient.inject_steps, gradient.learning_rate
        return StagedSearch(
            stages=self._setup.plan(steering),
            choice=choose_optimizer(settings),
            limits=set_limits(settings),
            evaluator=steering.searched,
            search_s=search_s,
            past_of=self._record.past,
            inject_every=gradient.inject_every,
            improve=lambda mean: descend(steering, mean, steps, rate)[0].best,
            improve_s=(steps + 1) * self._gradient_s,
        )

    def _judge(self, steering: Steering, found: Found, finalists_s: float) -> tuple[EndedBy, Judgement]:
        """Compare on unseen prompts; on searched ones after an interrupt (before or now), or without time."""
        self._phase("finalists")
        self._box.release("refine")
        self._box.release("finalists")
        done = self._record.event("finalists")  # is done again as it was, whatever the clock says
        try:
            if self._interruption.requested:
                raise Interrupted
            if done["prompts"] == "unseen" if done else self._box.fits(finalists_s):
                pace = self._pace_refinement(done is not None, finalists_s)
                space = self._setup.plan(steering)[-1].space
                refined = refine_best(steering, found, space, pace, self._trace)
                judgement = judge_on_unseen(steering, found, refined, self._trace)
                self._record_back_offs(steering)
                return found.ended_by, judgement
            self._trace.event("finalists_skipped", left_s=self._box.left_s(), needed_s=finalists_s)
        except Interrupted:
            phase = "search" if found.ended_by == "interrupt" else "finalists"
            self._trace.event("interrupt", phase=phase)
            return "interrupt", judge_on_searched(steering, found, self._trace)
        return found.ended_by, judge_on_searched(steering, found, self._trace)

    def _pace_refinement(self, is_done: bool, finalists_s: float) -> Pace:
        """Return steps as configured while there is time, or exactly those of an earlier run."""
        settings, recorded = self._config.search.gradient, self._record.event("refined")
        if is_done:
            steps = len(recorded["losses"]) - 1 if recorded else 0
            return Pace(steps, settings.learning_rate, lambda: recorded is not None)
        needed_s = finalists_s + CAUTION * self._gradient_s
        steps = settings.refine_steps
        return Pace(steps, settings.learning_rate, lambda: steps > 0 and self._box.fits(needed_s))

    def _record_back_offs(self, steering: Steering) -> None:
        """Record the times that memory ran out since the last call."""
        for event in steering.budget.oom_events[self._n_back_offs :]:
            self._trace.event("out_of_memory", phase=self._phase_name, **event)
        self._n_back_offs = len(steering.budget.oom_events)

    def _deliver(self, facts: RunFacts, output: Path) -> RunResult:
        """Merge the winner, write everything, and say what happened."""
        self._phase("merge")
        started_s, judgement, winner = time.monotonic(), facts.judgement, facts.judgement.winner
        merged = deliver_merge(
            self._parts,
            winner.coefficients,
            self._config.base.name,
            output,
            objective=self._describe_loss(judgement),
            provenance={
                "commit": checkout_commit(),
                "versions": library_versions(),
                "seed": self._config.search.seed,
                "trace": TRACE_FILE,
                "winner": winner.name,
                "ended_by": facts.ended_by,
                "evaluations": facts.evaluations,
                "left_out": dict(facts.left_out),
            },
        )
        self._trace.event(
            "merged",
            winner=winner.name,
            ended_by=facts.ended_by,
            elapsed_s=self._box.elapsed_s(),
            seconds=time.monotonic() - started_s,
        )
        return RunResult(
            adapters=self._parts.adapters,
            coefficients=winner.coefficients,
            groups=self._parts.groups,
            merged=merged,
            winner=winner.name,
            loss=float(judgement.losses[judgement.place]),
            evaluations=facts.evaluations,
            ended_by=facts.ended_by,
            interrupted=self._interruption.requested,
            report=write_summary(facts),
        )

    def _describe_loss(self, judgement: Judgement) -> dict[str, Any]:
        """Return what coefficients.json says of the winner's loss."""
        return {
            "name": objective_label(self._setup.objective),
            "combine": self._config.objective.combine,
            "loss": float(judgement.losses[judgement.place]),
            "per_expert": judgement.per_expert[judgement.place].tolist(),
        }
