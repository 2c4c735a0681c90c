"""One run from configuration to merged adapter: load, prompts, signals, search, finalists, merge.

The only file that knows all the parts; not how any of them works, nor the command line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search.adapters import Adapter, load_adapter
from search.base import LoadedBase, load_base
from search.config import SearchConfig, config_hash
from search.delivery import ADAPTER_FOLDER, TRACE_FILE, deliver_merge, rehearse_merge
from search.ending import estimate_finalists_s, judge_on_searched, judge_on_unseen
from search.evaluate import PopulationEvaluator, Scoring
from search.finalists import Judgement
from search.groups import Groups
from search.loop import CAUTION, EndedBy, Limits, Progress, SearchOutcome, search_loop
from search.merge import MergedAdapter, refuse_strangers
from search.optimizer import BatchOptimizer
from search.parts import Parts, assemble_parts, identify_parts
from search.progress import ProgressLine
from search.prompts import PromptRequest
from search.provenance import checkout_commit, library_versions
from search.space import FloatArray
from search.steering import Steering, WrittenPrompts, prepare_prompts, prepare_steering
from search.summary import RunFacts, write_summary
from search.timebox import TimeBox
from search.trace import TraceWriter


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
    report: str
    """For people."""


def run_search(
    config: SearchConfig, *, output: Path, base: LoadedBase | None = None, reserve_s: float = 0.0
) -> RunResult:
    """Find coefficients within the time box, and write trace, adapter and coefficients to `output`.

    Ctrl-C ends the search or the finalists and merges the best so far; before that it is passed on.

    Args:
        base: the configured base, if it is loaded already.
        reserve_s: seconds of the time box that are the caller's, gone or still needed.

    Raises:
        InputError: for weights or settings that do not fit, or an output that cannot be written.
        ValueError: where the model gives no usable numbers.
    """
    refuse_strangers(output / ADAPTER_FOLDER)
    box = TimeBox(config.search.time_box_s)
    box.reserve("caller", reserve_s)
    with ProgressLine(config.search.max_evaluations) as line:
        line.phase("load")
        parts = _load_parts(config, base)
        _make_optimizer(config, np.zeros(parts.shape))  # refused before anything is written
        with TraceWriter(output / TRACE_FILE) as trace:
            trace.header(_describe_run(config, parts))
            return _Run(config, parts, trace, box, line).finish(output)


def _load_parts(config: SearchConfig, base: LoadedBase | None) -> Parts:
    adapters = [
        load_adapter(a.source, revision=a.revision, name=a.name, allow_pickle=a.allow_pickle)
        for a in config.adapters
    ]
    base = base or load_base(
        config.base.source, revision=config.base.revision, device=config.device, dtype=config.base.dtype
    )
    return assemble_parts(base, adapters, base_name=config.base.name, kind=config.search.space)


def _make_optimizer(config: SearchConfig, start: FloatArray) -> BatchOptimizer:
    """Build the optimiser from its first coefficients (n_groups, n_adapters)."""
    search = config.search
    return BatchOptimizer(
        start.reshape(-1),
        search.sigma,
        search.n_candidates,
        search.max_evaluations,
        search.seed,
        search.optimizer,
    )


def _describe_run(config: SearchConfig, parts: Parts) -> dict[str, Any]:
    """Return the trace's header: what the run depends on."""
    return {
        "config": config.model_dump(mode="json"),
        "config_sha256": config_hash(config),
        "seed": config.search.seed,
        **identify_parts(parts),
        "versions": library_versions(),
        "commit": checkout_commit(),
    }


class _Run:
    """The phases after loading, with the trace, clock and line that they share."""

    def __init__(
        self, config: SearchConfig, parts: Parts, trace: TraceWriter, box: TimeBox, line: ProgressLine
    ) -> None:
        self._config, self._parts = config, parts
        self._trace, self._box, self._line = trace, box, line
        self._n_back_offs = dict.fromkeys(("searched", "unseen"), 0)

    def finish(self, output: Path) -> RunResult:
        """Do what is left after loading."""
        prompts = self._write_prompts()
        steering = self._steer(prompts)
        finalists_s = self._reserve_for_the_end(steering, output)
        outcome = self._search(steering)
        ended_by, judgement = self._judge(steering, outcome, finalists_s)
        facts = RunFacts(
            names=self._parts.names,
            judgement=judgement,
            outcome=outcome,
            ended_by=ended_by,
            n_unseen=np.bincount(prompts.unseen.expert, minlength=len(self._parts.names)).tolist(),
            weak=steering.weak,
            back_offs=steering.back_offs,
        )
        return self._deliver(facts, output)

    def _write_prompts(self) -> WrittenPrompts:
        self._line.phase("prompts")
        settings = self._config.prompts
        request = PromptRequest(
            per_adapter=settings.per_adapter + settings.unseen_per_adapter,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            max_slot_tokens=settings.max_slot_tokens,
            seed=self._config.search.seed,
            positions=self._config.objective.positions,
        )
        skeletons = [adapter.skeletons for adapter in self._config.adapters]
        return prepare_prompts(self._parts, skeletons, request, settings.per_adapter, self._trace)

    def _steer(self, prompts: WrittenPrompts) -> Steering:
        self._line.phase("signals")
        objective = self._config.objective
        scoring = Scoring(
            objective=objective.name,
            combine=objective.combine,
            tokens_per_forward=self._config.search.tokens_per_forward,
        )
        return prepare_steering(self._parts, prompts, scoring, objective.weak_signal_nats, self._trace)

    def _reserve_for_the_end(self, steering: Steering, output: Path) -> float:
        """Measure and reserve what finalists, or one candidate in their place, and merge take at most.

        Returns:
            The finalists' seconds.
        """
        self._line.phase("rehearsal")
        uniform = steering.references[1].coefficients
        merge_s = rehearse_merge(self._parts, uniform, self._config.base.name, output)
        finalists_s = CAUTION * estimate_finalists_s(steering, self._config.search.n_finalists)
        self._box.reserve("merge", CAUTION * (merge_s + steering.searched_candidate_s))
        self._box.reserve("finalists", finalists_s)
        return finalists_s

    def _search(self, steering: Steering) -> SearchOutcome:
        self._line.phase("search")
        settings = self._config.search
        start = steering.start(settings.start)
        self._trace.event("search", start=start, left_s=self._box.left_s())

        def show(progress: Progress) -> None:
            self._line.show(progress)
            self._record_back_offs("searched", steering.searched)

        outcome = search_loop(
            _make_optimizer(self._config, start),
            steering.searched,
            trace=self._trace,
            timebox=self._box,
            limits=Limits(settings.max_evaluations, settings.n_finalists),
            on_generation=show,
        )
        self._trace.event(
            "search_ended",
            ended_by=outcome.ended_by,
            generations=outcome.generations,
            evaluations=outcome.evaluations,
            best_loss=outcome.archive_losses.min(initial=np.inf),
            elapsed_s=self._box.elapsed_s(),
        )
        return outcome

    def _judge(
        self, steering: Steering, outcome: SearchOutcome, finalists_s: float
    ) -> tuple[EndedBy, Judgement]:
        """Compare on unseen prompts; on searched ones after Ctrl-C (now or before) or where time is short."""
        self._line.phase("finalists")
        self._box.release("finalists")
        ended_by = outcome.ended_by
        if ended_by != "interrupt":
            try:
                if self._box.fits(finalists_s):
                    judgement = judge_on_unseen(steering, outcome, self._trace)
                    self._record_back_offs("unseen", steering.unseen)
                    return ended_by, judgement
                self._trace.event("finalists_skipped", left_s=self._box.left_s(), needed_s=finalists_s)
            except KeyboardInterrupt:
                ended_by = "interrupt"
        if ended_by == "interrupt":
            phase = "search" if outcome.ended_by == "interrupt" else "finalists"
            self._trace.event("interrupt", phase=phase)
        return ended_by, judge_on_searched(steering, outcome, self._trace)

    def _record_back_offs(self, prompts: str, evaluator: PopulationEvaluator) -> None:
        """Record the times that memory ran out since the last call."""
        for event in evaluator.oom_events[self._n_back_offs[prompts] :]:
            self._trace.event("out_of_memory", prompts=prompts, **event)
        self._n_back_offs[prompts] = len(evaluator.oom_events)

    def _deliver(self, facts: RunFacts, output: Path) -> RunResult:
        """Merge the winner, write everything, and say what happened."""
        self._line.phase("merge")
        judgement, evaluations = facts.judgement, facts.outcome.evaluations
        winner, loss = judgement.winner, float(judgement.losses[judgement.place])
        merged = deliver_merge(
            self._parts,
            winner.coefficients,
            self._config.base.name,
            output,
            objective={
                "name": self._config.objective.name,
                "combine": self._config.objective.combine,
                "loss": loss,
                "per_expert": judgement.per_expert[judgement.place].tolist(),
            },
            provenance={
                "commit": checkout_commit(),
                "versions": library_versions(),
                "seed": self._config.search.seed,
                "trace": TRACE_FILE,
                "winner": winner.name,
                "ended_by": facts.ended_by,
                "evaluations": evaluations,
            },
        )
        self._trace.event(
            "merged", winner=winner.name, ended_by=facts.ended_by, elapsed_s=self._box.elapsed_s()
        )
        return RunResult(
            adapters=self._parts.adapters,
            coefficients=winner.coefficients,
            groups=self._parts.groups,
            merged=merged,
            winner=winner.name,
            loss=loss,
            evaluations=evaluations,
            ended_by=facts.ended_by,
            report=write_summary(facts),
        )
