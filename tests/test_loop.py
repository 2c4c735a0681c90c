"""Loop: ends by each of its limits and never late, records what happened, keeps the best, can be replayed."""

import json

import numpy as np
import pytest

from search.errors import InputError
from search.interruption import Interrupted
from search.loop import Before, Engine, Limits, Past, SearchOutcome, SearchTools, search_loop
from search.optimizer import BatchOptimizer
from search.racing import BlockScores, order_blocks, rank_by_rung
from search.timebox import TimeBox
from search.trace import Trace, TraceWriter

N_CANDIDATES, N_PARAMS = 4, 3


class Clock:
    """Time that passes when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class ListOptimizer:
    """Asks for given generations, the last one again and again, and remembers what it is told."""

    def __init__(self, *generations):
        self.generations = [np.array(generation, dtype=float) for generation in generations]
        self.asks = 0
        self.told = []
        self.injected = []

    def inject(self, genomes):
        self.injected.append(genomes)

    def ask(self):
        self.asks += 1
        return self.generations[min(self.asks, len(self.generations)) - 1]

    def tell(self, losses):
        self.told.append(losses)

    def mean(self):
        return np.full(self.generations[0].shape[1], 7.0)


class SumEvaluator:
    """The loss is the sum of a genome; a call takes the given seconds, the last again and again."""

    n_blocks = 1

    def __init__(self, clock=None, seconds=(1.0,), failure_at=None, failure=Interrupted):
        self.clock, self.seconds = clock or Clock(), seconds
        self.failure_at, self.failure = failure_at, failure
        self.calls = 0

    def sums(self, genomes, blocks):
        return genomes.sum(-1) * len(blocks)

    def score_blocks(self, genomes, blocks):
        self.clock.now_s += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1
        if self.calls == self.failure_at:
            raise self.failure
        sums = self.sums(genomes, blocks)
        return BlockScores(
            sums=np.stack([sums, sums], -1),
            counts=np.full(2, len(blocks)),
            prompts=np.array(blocks),
            prompt_means=np.repeat(sums[:, None] / len(blocks), len(blocks), 1),
            n_tokens=10 * len(genomes) * len(blocks),
            peak_bytes=None,
        )

    def combine(self, sums, counts):
        return (sums / counts).mean(-1), sums / counts


class BlockEvaluator(SumEvaluator):
    """The loss is the distance to a point, another in each of four blocks."""

    n_blocks = 4

    def sums(self, genomes, blocks):
        return sum(((genomes - 0.5 - 0.1 * block) ** 2).mean(-1) for block in blocks)


class FailingEvaluator(BlockEvaluator):
    """Fails on a seventh of all genomes in two of the blocks."""

    def sums(self, genomes, blocks):
        fails = (genomes[:, 0] * 1e6).astype(int) % 7 == 3
        return np.where(fails & (max(blocks) > 1), np.nan, super().sums(genomes, blocks))


class LossEvaluator(SumEvaluator):
    """Gives the losses of a list, a generation at a time."""

    def __init__(self, *losses):
        super().__init__()
        self.losses = losses

    def sums(self, genomes, blocks):
        return np.array(self.losses[self.calls - 1], dtype=float)


def make_optimizer(name="CMA", n_params=N_PARAMS, n_candidates=N_CANDIDATES):
    return BatchOptimizer(np.full(n_params, 0.3), 0.1, n_candidates, 100, seed=0, name=name)


def run(
    tmp_path,
    optimizer=None,
    evaluator=None,
    *,
    limit_s=1e9,
    timebox=None,
    propose=None,
    past=None,
    before=None,
    **options,
) -> SearchOutcome:
    """Search, with a trace in tmp_path; options are fields of Limits and SearchTools."""
    evaluator = evaluator or SumEvaluator()
    limits = {"max_evaluations": 20, "n_finalists": 5, **options}
    tools = {key: limits.pop(key) for key in ("on_generation", "interrupted") if key in limits}
    parts = (optimizer or make_optimizer(), evaluator, *([propose] if propose else []))
    with TraceWriter(tmp_path / "trace.jsonl") as trace:
        trace.header({})
        timebox = timebox or TimeBox(limit_s, clock=evaluator.clock)
        return search_loop(
            Engine(*parts),
            SearchTools(trace=trace, timebox=timebox, **tools),
            Limits(**limits),
            before=before or Before(),
            past=past or Past(),
        )


def recorded(tmp_path):
    return Trace.load(tmp_path / "trace.jsonl").generations


def assert_same_outcome(found, expected):
    for name in ("archive_genomes", "archive_losses", "archive_per_expert", "mean_genome"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("evaluations", "generations", "ended_by"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize(
    ("max_evaluations", "generations"), [(20, 5), (21, 5), (23, 5), (24, 6), (4, 1), (1, 1)]
)
def test_ends_by_evaluations_without_exceeding_them(tmp_path, max_evaluations, generations):
    outcome = run(tmp_path, max_evaluations=max_evaluations)
    assert outcome.ended_by == "evaluations"
    assert (outcome.generations, outcome.evaluations) == (generations, generations * N_CANDIDATES)
    assert len(recorded(tmp_path)) == generations


def test_ends_by_the_clock_before_a_generation_that_may_not_fit(tmp_path):
    # 1 s each: after the 9th 1 s is left, less than 1.2 x 1 s
    outcome = run(tmp_path, limit_s=10, max_evaluations=1000)
    assert (outcome.ended_by, outcome.generations) == ("clock", 9)


def test_the_longest_recent_generation_decides(tmp_path):
    clock = Clock()
    outcome = run(tmp_path, evaluator=SumEvaluator(clock, (1, 5, 1)), limit_s=12, max_evaluations=1000)
    assert (outcome.ended_by, outcome.generations) == ("clock", 3)  # 6 s left, 1.2 x 5 s just fits; then 5 s
    assert clock.now_s <= 12
    assert outcome.longest_s == 5


def test_a_first_generation_that_was_long_is_forgotten(tmp_path):
    clock = Clock()
    seconds = (20, *[1] * 50)
    outcome = run(tmp_path, evaluator=SumEvaluator(clock, seconds), limit_s=60, max_evaluations=1000)
    assert (outcome.ended_by, clock.now_s) == ("clock", 59)


@pytest.mark.parametrize("limit_s", [3.0, 7.7, 20.0, 100.0])
def test_no_generation_ends_late_while_each_takes_up_to_a_fifth_more_than_those_before(tmp_path, limit_s):
    clock = Clock()
    seconds = tuple(1.19**index for index in range(40))
    run(tmp_path, evaluator=SumEvaluator(clock, seconds), limit_s=limit_s, max_evaluations=1000)
    assert clock.now_s <= limit_s


def test_reserved_time_is_not_searched_in(tmp_path):
    clock = Clock()
    box = TimeBox(10, clock=clock)
    box.reserve("finalists", 4)
    run(tmp_path, evaluator=SumEvaluator(clock), timebox=box, max_evaluations=1000)
    assert clock.now_s == 5


def test_the_time_to_tell_counts_too(tmp_path):
    clock = Clock()
    optimizer = ListOptimizer(np.zeros((1, 1)))
    optimizer.tell = lambda losses: setattr(clock, "now_s", clock.now_s + 2)
    outcome = run(tmp_path, optimizer, SumEvaluator(clock), limit_s=10, max_evaluations=1000)
    assert outcome.generations == 3  # 9 s spent, 1 s left
    assert [generation.seconds for generation in recorded(tmp_path)] == [1, 1, 1]


def test_the_very_first_generation_runs_whatever_the_limits(tmp_path):
    outcome = run(tmp_path, limit_s=0.5, max_evaluations=1)
    assert outcome.generations == 1
    assert len(outcome.archive_losses) == N_CANDIDATES
    late = TimeBox(5, started_s=-10.0, clock=Clock())
    outcome = run(tmp_path, timebox=late, max_evaluations=99)
    assert (outcome.ended_by, outcome.generations) == ("clock", 1)


@pytest.mark.parametrize(
    ("max_evaluations", "limit_s", "ended_by"), [(3, 99, "evaluations"), (99, 5, "clock")]
)
def test_after_earlier_stages_even_the_first_generation_must_fit(
    tmp_path, max_evaluations, limit_s, ended_by
):
    before = Before(1, generations=3, evaluations=12, n_candidates=4, longest_s=5)
    outcome = run(tmp_path, before=before, max_evaluations=max_evaluations, limit_s=limit_s)
    assert (outcome.ended_by, outcome.generations, outcome.evaluations) == (ended_by, 0, 0)
    np.testing.assert_array_equal(outcome.mean_genome, np.full(N_PARAMS, 0.3))


def test_the_limit_on_evaluations_is_this_stages_and_the_trace_counts_all(tmp_path):
    before = Before(2, generations=3, evaluations=12, n_candidates=4)
    seen = []
    outcome = run(tmp_path, before=before, max_evaluations=8, on_generation=seen.append)
    assert (outcome.generations, outcome.evaluations) == (2, 8)
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()[1:]]
    counts = [(line["stage"], line["index"], line["evaluations"]) for line in lines]
    assert counts == [(2, 3, 16), (2, 4, 20)]
    assert [(p.generations, p.evaluations) for p in seen] == [(4, 16), (5, 20)]


def test_an_interrupt_drops_the_generation_under_way_and_keeps_the_rest(tmp_path):
    reference = run(tmp_path, max_evaluations=8)
    outcome = run(tmp_path, evaluator=SumEvaluator(failure_at=3))
    assert (outcome.ended_by, outcome.generations, outcome.evaluations) == ("interrupt", 2, 8)
    np.testing.assert_array_equal(outcome.archive_genomes, reference.archive_genomes)
    assert len(recorded(tmp_path)) == 2


def test_an_interrupt_between_two_rungs_drops_the_generation(tmp_path):
    evaluator = BlockEvaluator(failure_at=5)  # three rungs a generation
    outcome = run(tmp_path, evaluator=evaluator, race_keep=0.5)
    assert (outcome.ended_by, outcome.generations) == ("interrupt", 1)
    assert len(recorded(tmp_path)) == 1


def test_an_interrupt_in_the_first_generation_leaves_an_empty_archive(tmp_path):
    outcome = run(tmp_path, ListOptimizer(np.ones((2, 3))), SumEvaluator(failure_at=1))
    assert (outcome.ended_by, outcome.generations) == ("interrupt", 0)
    assert outcome.archive_genomes.shape == (0, 3)
    assert outcome.mean_genome.tolist() == [7, 7, 7]


def test_an_interrupt_while_a_gradient_is_taken_ends_the_search(tmp_path):
    def propose(generation, mean):
        if generation == 1:
            raise Interrupted
        return np.empty((0, len(mean)))

    outcome = run(tmp_path, propose=propose)
    assert (outcome.ended_by, outcome.generations) == ("interrupt", 1)


def test_a_flag_set_between_generations_ends_the_search_before_the_next(tmp_path):
    seen = []
    outcome = run(tmp_path, on_generation=seen.append, interrupted=lambda: len(seen) == 2)
    assert (outcome.ended_by, outcome.generations) == ("interrupt", 2)
    assert run(tmp_path, interrupted=lambda: True).generations == 0


def test_an_interrupt_while_reporting_keeps_the_generation(tmp_path):
    def interrupt(progress):
        raise Interrupted

    outcome = run(tmp_path, on_generation=interrupt)
    assert (outcome.ended_by, outcome.generations) == ("interrupt", 1)
    assert len(outcome.archive_losses) == N_CANDIDATES


@pytest.mark.parametrize("failure", [RuntimeError("CUDA"), KeyboardInterrupt("CUDA")])
def test_other_failures_are_not_swallowed_and_the_trace_keeps_what_came_before(tmp_path, failure):
    with pytest.raises(type(failure), match="CUDA"):
        run(tmp_path, evaluator=SumEvaluator(failure_at=2, failure=failure))
    assert len(recorded(tmp_path)) == 1


def test_the_archive_is_the_best_distinct_genomes_best_first(tmp_path):
    a, b, c, d = [0, 3], [0, 1], [0, 2], [0, 0]
    outcome = run(tmp_path, ListOptimizer([a, b, b], [b, c, d]), max_evaluations=6, n_finalists=3)
    np.testing.assert_array_equal(outcome.archive_genomes, [d, b, c])
    np.testing.assert_array_equal(outcome.archive_losses, [0, 1, 2])
    np.testing.assert_array_equal(outcome.archive_per_expert, [[0, 0], [1, 1], [2, 2]])
    assert outcome.mean_genome.tolist() == [7, 7]


def test_only_candidates_scored_on_all_prompts_are_archived(tmp_path):
    genomes = np.array([[0.1], [0.2], [0.3], [0.4]])
    outcome = run(
        tmp_path, ListOptimizer(genomes), BlockEvaluator(), max_evaluations=4, race_keep=0.5, n_finalists=9
    )
    (generation,) = recorded(tmp_path)
    assert [len(rung["candidates"]) for rung in generation.rungs] == [4, 2, 2]
    np.testing.assert_array_equal(outcome.archive_genomes[:, 0], [0.4, 0.3])
    expected = [np.mean((genome - 0.5 - 0.1 * np.arange(4)) ** 2) for genome in (0.4, 0.3)]
    np.testing.assert_allclose(outcome.archive_losses, expected)


def test_the_losses_told_are_the_raced_ones_that_the_trace_holds(tmp_path):
    optimizer = ListOptimizer(np.linspace(0.1, 0.9, 8)[:, None])
    run(tmp_path, optimizer, BlockEvaluator(), max_evaluations=8, race_keep=0.5)
    (generation,) = recorded(tmp_path)
    rungs = [(np.array(rung["candidates"]), np.array(rung["losses"])) for rung in generation.rungs]
    np.testing.assert_array_equal(optimizer.told[0], generation.losses)
    np.testing.assert_array_equal(generation.losses, rank_by_rung(8, rungs))
    assert generation.n_tokens == 10 * (8 * 1 + 4 * 1 + 2 * 2)


def test_generations_meet_the_blocks_in_the_order_of_their_index_over_all_stages(tmp_path):
    met = []

    class Noting(BlockEvaluator):
        def score_blocks(self, genomes, blocks):
            met.extend(blocks)
            return super().score_blocks(genomes, blocks)

    before = Before(1, generations=3, evaluations=12, n_candidates=4)
    run(tmp_path, evaluator=Noting(), before=before, race_keep=0.5, max_evaluations=40, seed=1)
    assert met == np.concatenate([order_blocks(4, 1, generation) for generation in range(3, 13)]).tolist()


def test_a_genome_scored_twice_keeps_its_lower_loss(tmp_path):
    evaluator = LossEvaluator([1], [2], [0], [1])
    outcome = run(tmp_path, ListOptimizer([[0.0]]), evaluator, max_evaluations=4)
    np.testing.assert_array_equal(outcome.archive_losses, [0])


def test_of_equal_losses_the_first_comes_first(tmp_path):
    outcome = run(tmp_path, ListOptimizer([[1, 0], [0, 1]], [[0.5, 0.5], [2, 0]]), max_evaluations=4)
    np.testing.assert_array_equal(outcome.archive_genomes, [[1, 0], [0, 1], [0.5, 0.5], [2, 0]])


def test_losses_that_are_not_finite_are_recorded_as_null_told_as_they_are_and_not_archived(tmp_path):
    optimizer = ListOptimizer([[1.0], [np.inf], [2.0]])
    outcome = run(tmp_path, optimizer, max_evaluations=3)
    np.testing.assert_array_equal(outcome.archive_losses, [1, 2])
    assert np.isinf(optimizer.told[0][1])
    line = json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[1])
    assert line["losses"] == [1.0, None, 2.0]


def test_a_first_generation_without_finite_losses_is_recorded_and_then_an_error(tmp_path):
    with pytest.raises(InputError, match="none of 4 candidates has a finite loss"):
        run(tmp_path, evaluator=LossEvaluator([np.nan] * 4))
    assert np.isnan(recorded(tmp_path)[0].losses).all()


def test_a_later_generation_without_finite_losses_is_survived(tmp_path):
    nan = [np.nan] * 4
    outcome = run(tmp_path, evaluator=LossEvaluator([1, 2, 3, 4], nan, nan, [0, 2, 3, 4]), max_evaluations=16)
    np.testing.assert_array_equal(outcome.archive_losses, [0, 1, 2, 2, 3])


def test_the_trace_holds_every_generation(tmp_path):
    outcome = run(tmp_path, evaluator=SumEvaluator(seconds=(2.0, 1.0)), max_evaluations=8)
    first, second = recorded(tmp_path)
    assert (first.elapsed_s, first.seconds, second.elapsed_s, second.seconds) == (2, 2, 3, 1)
    assert (first.evaluations, second.evaluations, second.n_tokens) == (4, 8, 40)
    assert first.rungs == [{"prompts": 1, "candidates": [0, 1, 2, 3], "losses": first.losses.tolist()}]
    np.testing.assert_allclose(first.genomes.sum(-1), first.losses)
    np.testing.assert_allclose(first.prompt_spread, [first.losses.std()])
    assert outcome.archive_losses[0] == min(first.losses.min(), second.losses.min())


def test_the_same_seed_gives_the_same_trace_but_for_times(tmp_path):
    lines = []
    for folder, seconds in (("a", 1.0), ("b", 1.5)):
        run(tmp_path / folder, evaluator=BlockEvaluator(seconds=(seconds,)), race_keep=0.5)
        text = (tmp_path / folder / "trace.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    assert lines[0] != lines[1]
    for line in lines[0] + lines[1]:
        line.pop("seconds", None)
        line.pop("elapsed_s", None)
    assert lines[0] == lines[1]


def test_proposals_are_injected_and_recorded(tmp_path):
    asked_with = []

    def propose(generation, mean):
        asked_with.append((generation, mean.tolist()))
        return np.full((generation % 2, 1), 0.25)

    optimizer = ListOptimizer([[1.0]])
    run(tmp_path, optimizer, propose=propose, max_evaluations=3)
    assert asked_with == [(0, [7]), (1, [7]), (2, [7])]
    assert [genomes.tolist() for genomes in optimizer.injected] == [[[0.25]]]
    assert [len(generation.injected) for generation in recorded(tmp_path)] == [0, 1, 0]


REPLAYED = [
    (name, n_params, n_done)
    for name in ("CMA", "DiagonalCMA", "OnePlusOne", "DE", "TBPSA")
    for n_params in (10, 60)
    for n_done in (1, 4)
] + [("CMA", 864, 3), ("CMA", 6048, 4)]


@pytest.mark.parametrize(("name", "n_params", "n_done"), REPLAYED)
def test_a_replayed_search_goes_on_as_if_it_had_never_stopped(tmp_path, name, n_params, n_done):
    def propose(generation, mean):
        return 0.9 * mean[None] + 0.05 if "CMA" in name and generation in (2, 5) else np.empty((0, n_params))

    def go_on(folder, past, evaluator):
        optimizer = make_optimizer(name, n_params, n_candidates=8)
        return run(
            folder, optimizer, evaluator, propose=propose, past=past, max_evaluations=56, race_keep=0.5
        )

    whole = go_on(tmp_path / "whole", Past(), FailingEvaluator())
    generations = recorded(tmp_path / "whole")
    evaluator = FailingEvaluator()
    resumed = go_on(tmp_path / "rest", Past(generations[:n_done]), evaluator)
    assert_same_outcome(resumed, whole)
    assert evaluator.calls == sum(len(generation.rungs) for generation in generations[n_done:])
    lines = [(tmp_path / folder / "trace.jsonl").read_text().splitlines()[1:] for folder in ("whole", "rest")]
    for before, after in zip(lines[0][n_done:], lines[1], strict=True):
        drop = {"elapsed_s": 0, "seconds": 0}
        assert json.loads(before) | drop == json.loads(after) | drop
    assert any(np.isnan(generation.losses).any() for generation in generations)  # a case that is worth it


def test_a_past_that_this_optimizer_would_not_have_asked_for_is_refused(tmp_path):
    run(tmp_path / "a", max_evaluations=12)
    generations = recorded(tmp_path / "a")
    generations[1].genomes[2, 0] += 1e-15
    with pytest.raises(InputError, match=r"generation 1 of the trace cannot be repeated.*--out") as failure:
        run(tmp_path / "b", past=Past(generations))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("ended_by", ["evaluations", "clock"])
def test_a_search_that_was_over_stays_over(tmp_path, ended_by):
    whole = run(tmp_path / "a", max_evaluations=12)
    evaluator = SumEvaluator()
    past = Past(recorded(tmp_path / "a"), ended_by)
    again = run(tmp_path / "b", evaluator=evaluator, past=past, max_evaluations=99)
    assert (again.ended_by, again.generations, evaluator.calls) == (ended_by, 3, 0)
    np.testing.assert_array_equal(again.archive_genomes, whole.archive_genomes)


def test_the_longest_replayed_generation_counts_for_the_clock(tmp_path):
    run(tmp_path / "a", evaluator=SumEvaluator(seconds=(5.0,)), max_evaluations=4)
    outcome = run(tmp_path / "b", past=Past(recorded(tmp_path / "a")), limit_s=5.9)
    assert (outcome.ended_by, outcome.generations) == ("clock", 1)


def test_progress_is_reported_after_each_generation(tmp_path):
    seen = []
    run(
        tmp_path,
        ListOptimizer([[2.0]], [[1.0]], [[5.0]]),
        limit_s=60,
        max_evaluations=3,
        on_generation=seen.append,
    )
    assert [(p.generations, p.evaluations, p.best_loss, p.left_s) for p in seen] == [
        (1, 1, 2, 59),
        (2, 2, 1, 58),
        (3, 3, 1, 57),
    ]
