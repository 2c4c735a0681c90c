"""The phases of a run after loading: prompts, signals, search, finalists, merge.

Knows their order, and the clock and the trace that they share; not how any of them works.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from search.delivery import rehearse_merge
from search.ending import (
    Pace,
    descend,
    judge_on_searched,
    judge_on_unseen,
    measure_ending,
    refine_best,
)
from search.finalists import BALANCED, PRIOR, Finalist, Judgement
from search.interruption import Interrupted, Interruption
from search.loop import EndedBy, Progress, SearchTools
from search.outcome import Ending, RunResult, deliver_ending
from search.planning import choose_optimizer, set_limits
from search.progress import ProgressLine
from search.reserves import OPTIONAL, EndingCosts, Reserves
from search.resume import Record
from search.setup import Setup
from search.stages import Found, StagedSearch, run_stages
from search.steering import Steering
from search.summary import RunFacts, write_skipped, write_summary
from search.timebox import OutOfTime, TimeBox
from search.trace import TraceWriter


@dataclass(frozen=True, slots=True)
class Later:
    """What the caller does with the merge, within the same time box."""

    measure_s: Callable[[], float]
    """Measures the seconds that it takes."""
    measuring_s: float
    """Seconds that measuring took."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all phases use."""

    trace: TraceWriter
    box: TimeBox
    line: ProgressLine
    interruption: Interruption
    record: Record
    later: Later


class Phases:
    """The phases after loading."""

    def __init__(self, setup: Setup, shared: Shared) -> None:
        self._setup, self._config, self._parts = setup, setup.config, setup.parts
        self._trace, self._box, self._line = shared.trace, shared.box, shared.line
        self._interruption, self._record = shared.interruption, shared.record
        self._later = shared.later
        self._phase_name = "load"
        self._n_back_offs = 0

    def finish(self, output: Path) -> RunResult:
        """Do what is left after loading; when the merge begins, what only the search needs is freed."""
        return self._deliver(self._find_ending(output), output)

    def _find_ending(self, output: Path) -> Ending:
        """Find what to merge: without a search, where the time box has no room for one."""
        try:
            with self._forwards_end_in_time():
                self._phase("prompts")
                prompts = self._setup.write_prompts(self._trace, self._record)
                self._phase("signals")
                steering = self._setup.steer(prompts, self._trace, self._record)
                self._record_back_offs(steering)
                reserves = self._reserve_for_the_end(steering, output)
        except OutOfTime:
            return self._skip_search()
        self._interruption.defer()
        steering.searched.checkpoint = steering.unseen.checkpoint = self._check
        found = self._search(steering, reserves)
        ended_by, judgement = self._judge(steering, found, reserves)
        n_unseen = np.bincount(prompts.unseen.expert, minlength=len(self._parts.names)).tolist()
        facts = RunFacts(
            names=self._parts.names,
            judgement=judgement,
            evaluations=found.evaluations,
            generations=found.generations,
            ended_by=ended_by,
            n_unseen=n_unseen,
            left_out=self._setup.left_out,
            twins=self._setup.twins,
            weak=steering.weak,
            back_offs=steering.budget.oom_events,
        )
        per_expert = judgement.per_expert[judgement.place].tolist()
        loss = float(judgement.losses[judgement.place])
        return Ending(judgement.winner, loss, per_expert, ended_by, found.evaluations, write_summary(facts))

    def _check(self) -> None:
        """Raise where somebody asks to end, or only the answers' time is left; what is over is done again."""
        self._interruption.check()
        if not self._record.event("finalists"):
            self._box.check(OPTIONAL)

    @contextmanager
    def _forwards_end_in_time(self) -> Iterator[None]:
        """Raise `OutOfTime` from the next forward pass when nothing is left but what is reserved."""
        began = self._record.event("search")  # what was searched once is merged, whatever the clock says
        hook = self._parts.model.register_forward_pre_hook(lambda *_: None if began else self._box.check())
        try:
            yield
        finally:
            hook.remove()

    def _skip_search(self) -> Ending:
        """Take the prior, or all at the same norm, and say that there was no time to search."""
        left_s = self._box.left_s()
        self._trace.event("search_skipped", phase=self._phase_name, left_s=left_s)
        name, table = BALANCED, np.broadcast_to(self._setup.balanced, self._parts.shape).copy()
        if self._setup.prior:
            name, table = PRIOR, self._setup.first.start
        limit_s = self._box.limit_s
        report = write_skipped(name, self._phase_name, limit_s, self._setup.left_out)
        logging.getLogger(__name__).warning("%s", report.splitlines()[0])
        self._interruption.defer()
        return Ending(Finalist(name, table, True), float("nan"), None, "clock", 0, report)

    def _phase(self, name: str) -> None:
        self._phase_name = name
        self._line.phase(name)

    def _reserve_for_the_end(self, steering: Steering, output: Path) -> Reserves:
        """Measure and reserve what refinement, finalists, merge and the caller's rest take."""
        self._phase("rehearsal")
        uniform = steering.references[1].coefficients
        merge_s = rehearse_merge(self._parts, uniform, self._config.base.name, output)
        known_later_s = [self._box.reserves["later"]]  # measured a moment ago

        def measure() -> EndingCosts:
            later_s = known_later_s.pop() if known_later_s else self._later.measure_s()
            return measure_ending(steering, self._config.search, self._box.elapsed_s, merge_s, later_s)

        return Reserves(self._box, measure, self._later.measuring_s)

    def _search(self, steering: Steering, reserves: Reserves) -> Found:
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
            reserves_s=self._box.reserves,
            elapsed_s=self._box.elapsed_s(),
        )

        def show(progress: Progress) -> None:
            self._line.show(progress)
            self._record_back_offs(steering)
            reserves.see_generation(progress.seconds, progress.n_tokens, progress.longest_s)

        tools = SearchTools(
            trace=self._trace,
            timebox=self._box,
            on_generation=show,
            interrupted=lambda: self._interruption.requested,
        )
        plan = self._plan_search(steering, search_s, reserves.costs.gradient_s)
        found = run_stages(plan, start, spread, tools)
        self._trace.event(
            "search_ended",
            ended_by=found.ended_by,
            generations=found.generations,
            evaluations=found.evaluations,
            best_loss=found.archive_losses.min(initial=np.inf),
            reserves_s=self._box.reserves,
            elapsed_s=self._box.elapsed_s(),
            mean=found.mean,
            spread=found.spread,
        )
        return found

    def _plan_search(self, steering: Steering, search_s: float, gradient_s: float) -> StagedSearch:
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
            improve_s=(steps + 1) * gradient_s,
        )

    def _judge(self, steering: Steering, found: Found, reserves: Reserves) -> tuple[EndedBy, Judgement]:
        """Compare on unseen prompts; on searched ones after an interrupt (before or now), or without time."""
        self._phase("finalists")
        done = self._record.event("finalists")  # is done again as it was, whatever the clock says
        try:
            if self._interruption.requested:
                raise Interrupted
            reserves.begin_ending()
            if not (done["prompts"] == "unseen" if done else reserves.may_compare()):
                raise OutOfTime
            pace = self._pace_refinement(done is not None, reserves)
            space = self._setup.plan(steering)[-1].space
            refined = refine_best(steering, found, space, pace, self._trace)
            n_most = len(done["names"]) if done else reserves.n_affordable()
            judgement = judge_on_unseen(steering, found, refined, self._trace, n_most)
            self._record_back_offs(steering)
            return found.ended_by, judgement
        except OutOfTime:
            self._trace.event("finalists_skipped", left_s=self._box.left_s(), needed_s=reserves.few_s())
            return found.ended_by, judge_on_searched(steering, found, self._trace)
        except Interrupted:
            phase = "search" if found.ended_by == "interrupt" else "finalists"
            self._trace.event("interrupt", phase=phase)
            return "interrupt", judge_on_searched(steering, found, self._trace)

    def _pace_refinement(self, is_done: bool, reserves: Reserves) -> Pace:
        """Return steps as configured while there is time, or exactly those of an earlier run."""
        settings, recorded = self._config.search.gradient, self._record.event("refined")
        if is_done:
            steps = len(recorded["losses"]) - 1 if recorded else 0
            return Pace(steps, settings.learning_rate, lambda: recorded is not None)
        steps = settings.refine_steps
        return Pace(steps, settings.learning_rate, lambda: steps > 0 and reserves.may_refine())

    def _record_back_offs(self, steering: Steering) -> None:
        """Record the times that memory ran out since the last call."""
        for event in steering.budget.oom_events[self._n_back_offs :]:
            self._trace.event("out_of_memory", phase=self._phase_name, **event)
        self._n_back_offs = len(steering.budget.oom_events)

    def _deliver(self, ending: Ending, output: Path) -> RunResult:
        """Merge the winner, write everything, and say what happened."""
        self._phase("merge")
        started_s = self._box.elapsed_s()
        merged = deliver_ending(self._setup, ending, output)
        self._trace.event(
            "merged",
            winner=ending.winner.name,
            ended_by=ending.ended_by,
            elapsed_s=self._box.elapsed_s(),
            seconds=self._box.elapsed_s() - started_s,
        )
        return RunResult(
            adapters=self._parts.adapters,
            coefficients=ending.winner.coefficients,
            groups=self._parts.groups,
            merged=merged,
            winner=ending.winner.name,
            loss=ending.loss,
            evaluations=ending.evaluations,
            ended_by=ending.ended_by,
            interrupted=self._interruption.requested,
            report=ending.report,
        )
