"""Weigh what an operator adds up: the search on its updates, one an adapter, in place of the adapters' own.

TSV-M and RegMean of LoRA experts are sums of low-rank updates, the pieces. A piece takes its adapter's place,
with 1 for all as the start, and is searched with the same prompts, experts to agree with, objective and
limits. `python -m benchmarks.pieces CONFIG --operator tsv_m --out measures.json` does that once, and measures
it with labels; without --operator it searches the adapters as they are, and permutes what it found among
them. Knows one run, not what it is compared with.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.arm import Accuracy
from benchmarks.controls import permuted_coefficients
from benchmarks.quality_tables import SHARES
from llm_merging.merging.regmean import rows_by_expert, solve_updates
from llm_merging.merging.subspaces import LowRank, low_rank_updates
from llm_merging.merging.tsv import decorrelate
from search.adapters import Adapter, Factors
from search.config import SearchConfig, load_config
from search.ending import Pace, descend, judge_on_unseen, refine_best
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import expert_signals
from search.finalists import BASE, UNIFORM, Finalist
from search.loop import SearchTools
from search.parts import Parts
from search.planning import choose_optimizer, set_limits
from search.priors import PriorStart
from search.prompts import PromptSet
from search.recorded import TRACE_FILE
from search.resume import Record
from search.setup import Setup, load_setup
from search.space import FloatArray
from search.stack import stack_adapters
from search.stages import StagedSearch, run_stages
from search.steering import Steering, WrittenPrompts
from search.timebox import TimeBox
from search.trace import Trace, TraceWriter

START, SPREAD = 1.0, 0.5
"""First coefficient of every piece: the operator's own merge; and its first spread."""
ALONE = "operator alone"
"""The finalist with 1 everywhere."""

Updates = dict[str, list[LowRank]]
"""Module -> the pieces of those adapters that touch it, in their order."""


def tsv_updates(parts: Parts, prompts: WrittenPrompts) -> Updates:
    """Return what TSV-M adds up; it needs no prompts."""
    device = parts.model.device
    by_module = {module: low_rank_updates(parts.adapters, module, device) for module in parts.stacked.modules}
    return {module: decorrelate(updates, min(updates[0].shape)) for module, updates in by_module.items()}


def regmean_updates(parts: Parts, prompts: WrittenPrompts) -> Updates:
    """Return what RegMean adds up."""
    return solve_updates(parts, rows_by_expert(prompts))


OPERATORS: Mapping[str, Callable[[Parts, WrittenPrompts], Updates]] = {
    "tsv_m": tsv_updates,
    "regmean": regmean_updates,
}


def make_pieces(parts: Parts, updates: Updates) -> Parts:
    """Return the parts with pieces, as LoRA factors of scaling 1, where the adapters were."""
    modules: list[dict[str, Factors]] = [{} for _ in parts.adapters]
    for module, pieces in updates.items():
        touching = [index for index, adapter in enumerate(parts.adapters) if module in adapter.modules]
        for index, piece in zip(touching, pieces, strict=True):
            modules[index][module] = Factors(piece.A, piece.B, 1.0)
    named = zip(parts.adapters, modules, strict=True)
    pieces_of: tuple[Adapter, ...] = tuple(replace(adapter, modules=own) for adapter, own in named)
    stacked = stack_adapters(pieces_of, device=parts.model.device, dtype=parts.model.dtype)
    return replace(parts, adapters=pieces_of, stacked=stacked)


@dataclass(frozen=True, slots=True, eq=False)
class Weighing:
    """What is weighed, and what mixtures of it are measured by."""

    setup: Setup
    """Its parts are the pieces, or the adapters as they are."""
    steering: Steering
    prepare_s: float
    """Seconds that the operator took."""


def weigh_adapters(setup: Setup, prompts: WrittenPrompts, trace: TraceWriter) -> Weighing:
    """Return what a run of the method has."""
    return Weighing(setup, setup.steer(prompts, trace, Record()), 0.0)


def weigh_pieces(setup: Setup, operator: str, prompts: WrittenPrompts, trace: TraceWriter) -> Weighing:
    """Return the same with an operator's pieces mixed, and the experts themselves to agree with.

    A weak adapter's piece stays near 1, as its coefficient does near the balanced merge. References are the
    base, the mean of the pieces and the operator alone: a single expert is no mixture of pieces.
    """
    parts, ones = setup.parts, np.ones(setup.parts.shape)
    started_s = time.monotonic()
    pieces = make_pieces(parts, OPERATORS[operator](parts, prompts))
    prepare_s = time.monotonic() - started_s
    own = replace(setup, prior=None, balanced=ones[0])
    steering = own.steer(prompts, trace, Record())
    scoring = Scoring(
        objective=setup.objective,
        combine=setup.config.objective.combine,
        tokens_per_forward=setup.config.search.tokens_per_forward,
    )

    def evaluator(part: PromptSet) -> PopulationEvaluator:
        signals = expert_signals(parts.model, parts.stacked, parts.groups, part, steering.budget)
        return PopulationEvaluator(
            parts.model, pieces.stacked, parts.groups, part, signals, scoring, steering.budget
        )

    tables = {BASE: 0 * ones, UNIFORM: ones / len(parts.names), ALONE: ones}
    first = PriorStart(START * ones, SPREAD * ones, ())
    return Weighing(
        replace(own, parts=pieces, first=first),
        replace(
            steering,
            searched=evaluator(prompts.searched),
            unseen=evaluator(prompts.unseen),
            references=tuple(Finalist(name, table, True) for name, table in tables.items()),
        ),
        prepare_s,
    )


def search_weights(
    weighing: Weighing, search_s: float, trace: TraceWriter
) -> tuple[FloatArray, dict[str, Any]]:
    """Search as configured, for so many seconds at most; compare finalists on the unseen prompts.

    Returns:
        The winner's coefficients (n_groups, n_adapters), and what the search came to.
    """
    setup, steering = weighing.setup, weighing.steering
    settings, gradient = setup.config.search, setup.config.search.gradient
    stages = setup.plan(steering)
    search = StagedSearch(
        stages=stages,
        choice=choose_optimizer(settings),
        limits=set_limits(settings),
        evaluator=steering.searched,
        search_s=search_s,
        past_of=Record().past,
        inject_every=gradient.inject_every,
        improve=lambda mean: descend(steering, mean, gradient.inject_steps, gradient.learning_rate)[0].best,
    )
    tools = SearchTools(trace=trace, timebox=TimeBox(search_s))
    found = run_stages(search, steering.confine(setup.first.start), setup.first.spread, tools)
    pace = Pace(gradient.refine_steps, gradient.learning_rate, lambda: gradient.refine_steps > 0)
    refined = refine_best(steering, found, stages[-1].space, pace, trace)
    judgement = judge_on_unseen(steering, found, refined, trace)
    return judgement.winner.coefficients, {
        "evaluations": found.evaluations,
        "ended_by": found.ended_by,
        "winner": judgement.winner.name,
        "loss": round(float(judgement.losses[judgement.place]), 4),
    }


def run_once(
    config: SearchConfig, operator: str | None, search_s: float, folder: Path
) -> tuple[Weighing, FloatArray, dict[str, Any]]:
    """Write prompts, weigh the operator's pieces, or the adapters if None, and search.

    Returns:
        What was weighed, the winner (n_groups, n_adapters), and what it took.
    """
    setup = load_setup(config)
    with TraceWriter(folder / TRACE_FILE) as trace:
        trace.header(setup.describe())
        prompts = setup.write_prompts(trace, Record())
        if operator is None:
            weighing = weigh_adapters(setup, prompts, trace)
        else:
            weighing = weigh_pieces(setup, operator, prompts, trace)
        table, facts = search_weights(weighing, search_s, trace)
    seconds = sum(generation.seconds for generation in Trace.load(folder / TRACE_FILE).generations)
    facts |= {"search_s": round(seconds, 1), "prepare_s": round(weighing.prepare_s, 2)}
    means = np.abs(table).mean(axis=0).round(4).tolist()
    facts["mean_abs_coefficients"] = dict(zip(setup.parts.names, means, strict=True))
    return weighing, table, facts


def measure_pieces(accuracy: Accuracy, table: FloatArray) -> dict[str, Any]:
    """Return the measures of weighed pieces, and under "alone" those of the operator by itself."""
    return {**accuracy.measure(table), "alone": _shares(accuracy, np.ones_like(table))}


def measure_permuted(accuracy: Accuracy, table: FloatArray, n: int, seed: int) -> dict[str, Any]:
    """Return mean shares over `n` permutations of a merge's adapters, and "searched": the merge's own."""
    rng = np.random.default_rng(seed)
    drawn = [_shares(accuracy, permuted_coefficients(table, rng)[0]) for _ in range(n)]
    means = {name: round(float(np.mean([shares[name] for shares in drawn])), 4) for name in SHARES}
    most = max(shares["held_in_N"] for shares in drawn)
    return {**means, "most_held_in_N": most, "permutations": n, "searched": _shares(accuracy, table)}


def _shares(accuracy: Accuracy, table: FloatArray) -> dict[str, float]:
    measures = accuracy.measure(table)
    return {name: measures[name] for name in SHARES}


def main(argv: Sequence[str] | None = None) -> None:
    """Run once and write the measures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--operator", choices=OPERATORS, help="without it, permuted coefficients")
    parser.add_argument("--experts", default="mixed", help="whose expert set the configuration lists")
    parser.add_argument("--seconds", type=float, default=60.0, help="of search (default %(default)s)")
    parser.add_argument("--permutations", type=int, default=20, help="(default %(default)s)")
    parser.add_argument("--queries", type=int, help="at most so many a task (all shipped ones)")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    with TemporaryDirectory() as folder:
        weighing, table, facts = run_once(config, arguments.operator, arguments.seconds, Path(folder))
    accuracy = Accuracy(arguments.experts, weighing.setup, arguments.queries)
    if arguments.operator:
        measures = {**measure_pieces(accuracy, table), **facts}
    else:
        permuted = measure_permuted(accuracy, table, arguments.permutations, config.search.seed)
        measures = {**permuted, "search": facts}
    arguments.out.write_text(json.dumps(measures), encoding="utf-8")


if __name__ == "__main__":
    main()
