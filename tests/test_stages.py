"""Stages: coarse to fine on a quadratic in coefficient space, carried along, timed, interrupted, replayed."""

import json

import numpy as np
import pytest

from search.groups import group_modules
from search.interruption import Interrupted
from search.loop import Limits, Past, SearchTools
from search.racing import BlockScores
from search.space import Layout, make_space
from search.stages import LEAST_SPREAD, OptimizerChoice, Stage, StagedSearch, run_stages
from search.timebox import TimeBox
from search.trace import Trace, TraceWriter
from tests.test_loop import Clock

N_GROUPS, N_ADAPTERS, N_CANDIDATES = 6, 2, 8
SHAPE = N_GROUPS, N_ADAPTERS
GROUPS = group_modules([f"model.layers.{layer}.mlp" for layer in range(N_GROUPS)], "layer")
START, SPREAD = np.full(SHAPE, 0.3), np.full(SHAPE, 0.15)
SMOOTH = np.stack([np.linspace(0.2, 1.0, N_GROUPS), np.linspace(0.8, 0.4, N_GROUPS)], -1)
TARGET = SMOOTH + 0.1 * np.random.default_rng(0).normal(size=SHAPE)
"""Best for each group: neither the same for all groups nor smooth over depth."""
KINDS = "adapter", "profile", "full"
FOUND_ARRAYS = "archive", "archive_losses", "archive_per_expert", "mean", "spread"


class QuadraticEvaluator:
    """An expert's loss is the squared distance to its target, a little other in each of four blocks."""

    n_blocks = 4

    def __init__(self, clock=None, seconds=lambda call: 1.0, failure_at=None, penalty=lambda call: 0.0):
        self.clock, self.seconds, self.failure_at = clock or Clock(), seconds, failure_at
        self.penalty = penalty
        self.calls = 0
        self.scored = []

    def score_blocks(self, coefficients, blocks):
        self.calls += 1
        if self.calls == self.failure_at:
            raise Interrupted
        self.clock.now_s += self.seconds(self.calls)
        self.scored.append(coefficients.copy())
        sums = self.penalty(self.calls) + sum(
            ((coefficients - TARGET + 0.02 * (block - 1.5)) ** 2).sum(1) for block in blocks
        )
        return BlockScores(
            sums=sums,
            counts=np.full(N_ADAPTERS, len(blocks)),
            prompts=np.array(blocks),
            prompt_means=np.repeat(sums.mean(-1, keepdims=True), len(blocks), 1),
            n_tokens=10,
            peak_bytes=None,
        )

    def combine(self, sums, counts):
        return (sums / counts).mean(-1), sums / counts

    def loss(self, table):
        blocks = np.arange(4)[:, None, None]
        return ((table - TARGET + 0.02 * (blocks - 1.5)) ** 2).sum(1).mean()


def make_stage(kind, share=1.0, **box):
    space = make_space(GROUPS, N_ADAPTERS, layout=Layout(genome=kind), **box)
    return Stage(space=space, share=share, settings={"genome": kind})


def search(tmp_path, stages=None, *, name="CMA", evaluator=None, past_of=lambda stage: Past(), **options):
    """Run stages from START and SPREAD; options are fields of Limits, StagedSearch and SearchTools."""
    evaluator = evaluator or QuadraticEvaluator()
    box = options.pop("box", None) or TimeBox(1e9, clock=evaluator.clock)
    staged = StagedSearch(
        stages=stages or [make_stage(kind) for kind in KINDS],
        choice=OptimizerChoice(name=name, n_candidates=options.pop("n_candidates", N_CANDIDATES), seed=3),
        limits=Limits(
            max_evaluations=options.pop("max_evaluations", 240),
            n_finalists=options.pop("n_finalists", 5),
            race_keep=options.pop("race_keep", None),
        ),
        evaluator=evaluator,
        search_s=options.pop("search_s", 1e6),
        past_of=past_of,
        inject_every=options.pop("inject_every", 0),
        improve=options.pop("improve", lambda mean: mean),
    )
    with TraceWriter(tmp_path / "trace.jsonl") as trace:
        trace.header({})
        return run_stages(staged, START, SPREAD, SearchTools(trace=trace, timebox=box, **options))


def load(tmp_path):
    return Trace.load(tmp_path / "trace.jsonl")


def events(tmp_path, name):
    return [event for event in load(tmp_path).events if event["event"] == name]


def first_generation(tmp_path, stage):
    return next(generation for generation in load(tmp_path).generations if generation.stage == stage)


def decode(kind, genome):
    return make_stage(kind).space.to_coefficients(genome[None])[0]


def assert_same_found(found, expected):
    for name in FOUND_ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in ("evaluations", "generations", "ended_by"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize("name", ["CMA", "DE"])
def test_each_finer_stage_comes_closer_to_what_only_it_can_reach(tmp_path, name):
    found = search(tmp_path, name=name, max_evaluations=960)
    trace = load(tmp_path)
    best = [
        min(generation.losses.min() for generation in trace.generations if generation.stage == stage)
        for stage in range(3)
    ]
    flat = QuadraticEvaluator().loss(np.broadcast_to(TARGET.mean(0), SHAPE))
    assert best[0] == pytest.approx(flat, rel=0.02)
    assert best[1] < 0.7 * best[0]
    assert best[2] < 0.9 * best[1]
    assert found.archive_losses[0] == best[2]
    assert (found.evaluations, found.ended_by) == (960, "evaluations")


def test_the_mean_and_no_less_than_half_of_the_first_spread_are_carried_along(tmp_path):
    alone = search(tmp_path / "alone", [make_stage("adapter")], max_evaluations=160)
    search(tmp_path / "both", [make_stage("adapter"), make_stage("full")], max_evaluations=320)
    first, second = events(tmp_path / "both", "stage")
    np.testing.assert_array_equal(first["start"], START)
    np.testing.assert_array_equal(first["spread"], SPREAD)
    np.testing.assert_array_equal(second["start"], alone.mean)
    np.testing.assert_array_equal(second["spread"], np.maximum(alone.spread, LEAST_SPREAD * SPREAD))
    asked = first_generation(tmp_path / "both", 1)
    own = [genome for genome in asked.genomes if not (genome == asked.injected).all(1).any()]
    assert np.mean(own) == pytest.approx(alone.mean.mean(), abs=0.05)
    assert np.std(own - alone.mean.ravel()) == pytest.approx(np.mean(second["spread"]), rel=0.3)


def test_a_stages_events_say_what_it_is(tmp_path):
    search(tmp_path)
    begun, ended = events(tmp_path, "stage"), events(tmp_path, "stage_ended")
    assert [event["space"] for event in begun] == [{"genome": kind} for kind in KINDS]
    assert [event["n_params"] for event in begun] == [2, 2 + 4 * 2, 12]
    assert [event["index"] for event in begun + ended] == [0, 1, 2] * 2
    generations = load(tmp_path).generations
    assert [event["first_generation"] for event in begun] == [
        next(generation.index for generation in generations if generation.stage == stage)
        for stage in range(3)
    ]
    assert [event["generations"] for event in ended] == [10, 20, 30]


@pytest.mark.parametrize("name", ["CMA", "DiagonalCMA"])
def test_the_best_so_far_is_put_into_the_next_stages_first_generation(tmp_path, name):
    search(tmp_path, name=name)
    trace = load(tmp_path)
    for stage in (1, 2):
        earlier = [generation for generation in trace.generations if generation.stage < stage]
        best = min(earlier, key=lambda generation: generation.losses.min())
        table = decode(KINDS[best.stage], best.genomes[best.losses.argmin()])
        generation = first_generation(tmp_path, stage)
        (injected,) = generation.injected
        assert np.abs(generation.genomes - injected).max(1).min() < 1e-12
        expected = make_stage(KINDS[stage]).space.encode(table, SPREAD)[0]
        np.testing.assert_allclose(injected, expected, atol=1e-9)
    assert not len(first_generation(tmp_path, 0).injected)
    assert sum(len(generation.injected) for generation in trace.generations) == 2


@pytest.mark.parametrize(("name", "n_candidates"), [("DE", 8), ("OnePlusOne", 8), ("CMA", 4)])
def test_where_nothing_can_be_injected_the_next_stage_starts_from_the_best(tmp_path, name, n_candidates):
    search(tmp_path, name=name, n_candidates=n_candidates)
    for stage in (1, 2):
        earlier = [generation for generation in load(tmp_path).generations if generation.stage < stage]
        best = min(earlier, key=lambda generation: generation.losses.min())
        table = decode(KINDS[best.stage], best.genomes[best.losses.argmin()])
        np.testing.assert_array_equal(events(tmp_path, "stage")[stage]["start"], table)


@pytest.mark.parametrize("name", ["CMA", "DE"])
def test_the_best_of_all_stages_is_carried_not_only_the_last_ones(tmp_path, name):
    worse_after = QuadraticEvaluator(penalty=lambda call: 9.0 if call > 10 else 0.0)  # from stage 1 on
    found = search(tmp_path, name=name, evaluator=worse_after)
    best = found.archive[0]
    assert found.archive_losses[0] < 9
    if name == "DE":
        np.testing.assert_array_equal(events(tmp_path, "stage")[2]["start"], best)
    else:
        (injected,) = first_generation(tmp_path, 2).injected
        np.testing.assert_allclose(decode("full", injected), best, atol=1e-9)


def test_a_nevergrad_optimizer_that_is_cma_by_name_only_runs_through_all_stages(tmp_path):
    assert search(tmp_path, name="MultiCMA", max_evaluations=72).evaluations == 72


def test_stages_get_their_shares_of_evaluations_and_what_is_left_goes_on(tmp_path):
    stages = [make_stage(kind, share) for kind, share in zip(KINDS, (1, 2, 1), strict=True)]
    search(tmp_path, stages, max_evaluations=100)  # 25, 75, 100 in generations of 8
    assert [event["evaluations"] for event in events(tmp_path, "stage_ended")] == [24, 72, 96]


def test_stages_get_their_shares_of_time(tmp_path):
    clock = Clock()
    box = TimeBox(50, clock=clock)
    box.reserve("finalists", 10)
    stages = [make_stage(kind, share) for kind, share in zip(KINDS, (1, 1, 2), strict=True)]
    options = {"search_s": 40, "max_evaluations": 10**6}
    found = search(tmp_path, stages, evaluator=QuadraticEvaluator(clock), box=box, **options)
    ended = events(tmp_path, "stage_ended")
    assert [event["elapsed_s"] for event in ended] == [9, 19, 39]  # of 10, 20, 40: 1 s and a fifth must fit
    assert [event["left_s"] for event in events(tmp_path, "stage")] == [10, 11, 21]
    assert [event["ended_by"] for event in ended] == ["clock"] * 3
    assert found.ended_by == "clock"


def test_time_that_a_stage_leaves_goes_to_the_later_ones(tmp_path):
    clock = Clock()
    stages = [make_stage("adapter", 1), make_stage("full", 9)]
    evaluator = QuadraticEvaluator(clock, seconds=lambda call: 1.0 if call <= 2 else 0.5)
    options = {"search_s": 100, "max_evaluations": 160, "box": TimeBox(100, clock=clock)}
    search(tmp_path, stages, evaluator=evaluator, **options)
    assert [event["left_s"] for event in events(tmp_path, "stage")] == [10, 98]
    assert events(tmp_path, "stage_ended")[-1]["ended_by"] == "evaluations"


@pytest.mark.parametrize("name", ["CMA", "NGOpt"])  # NGOpt chooses by its budget
def test_stages_too_short_for_a_generation_are_passed_through(tmp_path, name):
    found = search(tmp_path, name=name, max_evaluations=N_CANDIDATES)
    assert (found.evaluations, found.generations, found.ended_by) == (8, 1, "evaluations")
    assert len(found.archive) == 5
    np.testing.assert_allclose(found.mean, events(tmp_path, "stage")[-1]["start"], atol=1e-12)


def test_no_stage_begins_what_does_not_fit_the_time_left(tmp_path):
    clock = Clock()
    evaluator = QuadraticEvaluator(clock, seconds=lambda call: 6.0)
    found = search(tmp_path, evaluator=evaluator, search_s=10, box=TimeBox(10, clock=clock))
    assert (clock.now_s, found.generations, found.ended_by) == (6, 1, "clock")
    assert len(events(tmp_path, "stage_ended")) == 3


def test_the_clock_ended_the_search_if_it_ended_any_stage(tmp_path):
    clock = Clock()
    evaluator = QuadraticEvaluator(clock, seconds=lambda call: 10.0 if call <= 3 else 0.1)
    stages = [make_stage("adapter"), make_stage("full")]
    options = {"search_s": 70, "box": TimeBox(70, clock=clock), "max_evaluations": 80}
    found = search(tmp_path, stages, evaluator=evaluator, **options)
    ended = [event["ended_by"] for event in events(tmp_path, "stage_ended")]
    assert (ended, found.ended_by) == (["clock", "evaluations"], "clock")


@pytest.mark.parametrize("race_keep", [None, 0.5])
def test_the_archive_joins_the_best_distinct_of_all_stages(tmp_path, race_keep):
    found = search(tmp_path, max_evaluations=160, n_finalists=40, race_keep=race_keep)
    known = {}
    for generation in load(tmp_path).generations:
        for candidate in generation.rungs[-1]["candidates"]:
            table = decode(KINDS[generation.stage], generation.genomes[candidate])
            known[tuple(np.round(table, 9).ravel())] = generation.losses[candidate]
    assert len(known) > 20
    np.testing.assert_allclose(found.archive_losses, sorted(known.values())[:40])
    assert len({tuple(np.round(table, 9).ravel()) for table in found.archive}) == min(40, len(known))
    for table, loss, per_expert in zip(
        found.archive, found.archive_losses, found.archive_per_expert, strict=True
    ):
        assert loss == pytest.approx(QuadraticEvaluator().loss(table))
        assert loss == pytest.approx(per_expert.mean())


def test_the_archive_holds_no_more_than_the_finalists(tmp_path):
    found = search(tmp_path, n_finalists=3)
    assert found.archive.shape == (3, *SHAPE)
    assert (np.diff(found.archive_losses) > 0).all()


def read_past(path):
    """What a run that goes on from a trace is told of each stage."""
    trace = Trace.load(path)
    ended_by = {e["index"]: e["ended_by"] for e in trace.events if e["event"] == "stage_ended"}
    return lambda stage: Past([g for g in trace.generations if g.stage == stage], ended_by.get(stage))


@pytest.mark.parametrize("name", ["CMA", "DE"])
def test_a_search_stopped_anywhere_goes_on_as_the_uninterrupted_one(tmp_path, name):
    options = {"name": name, "max_evaluations": 72, "race_keep": 0.5, "inject_every": 2 * (name == "CMA")}
    options["improve"] = lambda mean: mean - 0.2 * (mean - TARGET)
    whole = search(tmp_path / "whole", **options)
    lines = (tmp_path / "whole" / "trace.jsonl").read_text().splitlines(keepends=True)
    written = [json.loads(line) for line in lines]
    assert len(written) == 1 + 9 + 2 * 3
    (tmp_path / "cut").mkdir()
    for n_kept in range(1, len(lines) + 1, 2):
        path = tmp_path / "cut" / "trace.jsonl"
        path.write_text("".join(lines[:n_kept]))
        past_of = read_past(path)
        assert_same_found(search(tmp_path / "rest", past_of=past_of, **options), whole)
        rest = [json.loads(line) for line in (tmp_path / "rest" / "trace.jsonl").read_text().splitlines()]
        again = [line for line in rest if line["kind"] == "generation"]
        drop = {"elapsed_s": 0, "seconds": 0}
        expected = [line for line in written[n_kept:] if line["kind"] == "generation"]
        assert [line | drop for line in again] == [line | drop for line in expected]


@pytest.mark.parametrize(("failure_at", "n_stages", "n_archived"), [(1, 1, 0), (5, 1, 5), (11, 2, 5)])
def test_an_interrupt_ends_all_stages_with_what_was_found(tmp_path, failure_at, n_stages, n_archived):
    clock = Clock()
    evaluator, box = QuadraticEvaluator(clock, failure_at=failure_at), TimeBox(1e6, clock=clock)
    found = search(tmp_path, evaluator=evaluator, box=box, search_s=9e5)  # 10 calls a stage
    assert box.left_s() == 1e6 - clock.now_s  # nothing stays reserved for stages that do not come
    assert (found.ended_by, found.generations) == ("interrupt", failure_at - 1)
    assert len(events(tmp_path, "stage")) == n_stages
    assert events(tmp_path, "stage_ended")[-1]["ended_by"] == "interrupt"
    assert found.archive.shape == (n_archived, *SHAPE)
    assert (found.mean.shape, found.spread.shape) == (SHAPE, SHAPE)
    assert np.isfinite(found.mean).all()


def test_a_request_to_end_between_two_stages_is_heard(tmp_path):
    seen = []
    found = search(tmp_path, on_generation=seen.append, interrupted=lambda: len(seen) == 10)
    assert (found.ended_by, found.generations) == ("interrupt", 10)


def test_an_interrupt_is_told_even_where_the_clock_ended_a_stage(tmp_path):
    clock = Clock()
    evaluator = QuadraticEvaluator(clock, seconds=lambda call: 10.0, failure_at=7)
    options = {"search_s": 100, "box": TimeBox(100, clock=clock)}
    found = search(tmp_path, [make_stage("adapter"), make_stage("full")], evaluator=evaluator, **options)
    assert [event["ended_by"] for event in events(tmp_path, "stage_ended")] == ["clock", "interrupt"]
    assert found.ended_by == "interrupt"


@pytest.mark.parametrize("name", ["CMA", "DE"])
def test_nothing_outside_the_bounds_is_scored_or_found(tmp_path, name):
    box = {"low": [0.25, -np.inf], "high": [0.45, np.inf]}  # the first adapter is weak, its target outside
    evaluator = QuadraticEvaluator()
    found = search(tmp_path, [make_stage(kind, **box) for kind in KINDS], name=name, evaluator=evaluator)
    for tables in (*evaluator.scored, found.archive, found.mean[None]):
        assert (tables[..., 0] >= 0.25).all()
        assert (tables[..., 0] <= 0.45).all()
    assert np.concatenate(evaluator.scored)[..., 1].max() > 0.5


def test_improved_means_are_injected_every_so_many_generations(tmp_path):
    asked = []

    def improve(mean):
        asked.append(mean)
        return mean - 0.5 * (mean - TARGET)

    search(tmp_path, [make_stage("full")], max_evaluations=56, inject_every=3, improve=improve)
    generations = load(tmp_path).generations
    assert [len(generation.injected) for generation in generations] == [0, 0, 1, 0, 0, 1, 0]
    for generation, mean in zip((generations[2], generations[5]), asked, strict=True):
        expected = mean - 0.5 * (mean - TARGET)
        np.testing.assert_allclose(generation.injected[0], expected.ravel())
        assert np.abs(generation.genomes - expected.ravel()).max(1).min() < 1e-12


@pytest.mark.parametrize("n_candidates", [5, 8])
def test_an_improved_mean_in_every_generation_leaves_the_best_its_place(tmp_path, n_candidates):
    search(tmp_path, [make_stage("adapter"), make_stage("full")], inject_every=1, n_candidates=n_candidates)
    generations = load(tmp_path).generations
    assert [len(generation.injected) for generation in generations] == [1] * len(generations)
    (injected,) = first_generation(tmp_path, 1).injected
    best = min((g for g in generations if g.stage == 0), key=lambda generation: generation.losses.min())
    table = decode("adapter", best.genomes[best.losses.argmin()])
    np.testing.assert_allclose(decode("full", injected), table, atol=1e-9)


def test_stages_draw_their_own_random_numbers_and_repeat_them():
    choice = OptimizerChoice(name="CMA", n_candidates=8, seed=2**32 - 1)
    asked = [choice.make(np.zeros(3), np.ones(3), 80, stage).ask() for stage in (0, 1, 0)]
    np.testing.assert_array_equal(asked[0], asked[2])
    assert not np.array_equal(asked[0], asked[1])
