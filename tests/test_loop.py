"""Loop: ends by each of its limits and never late, records what happened, keeps the best."""

import json

import numpy as np
import pytest

from search.loop import Limits, Scores, SearchOutcome, search_loop
from search.optimizer import BatchOptimizer
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

    def ask(self):
        self.asks += 1
        return self.generations[min(self.asks, len(self.generations)) - 1]

    def tell(self, losses):
        self.told.append(losses)

    def mean(self):
        return np.full(self.generations[0].shape[1], 7.0)


class SumEvaluator:
    """The loss is the sum of a genome; generations take the given seconds, the last again and again."""

    def __init__(self, clock=None, seconds=(1.0,), failure_at=None, failure=KeyboardInterrupt):
        self.clock, self.seconds = clock or Clock(), seconds
        self.failure_at, self.failure = failure_at, failure
        self.calls = 0

    def evaluate(self, genomes):
        self.clock.now_s += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1
        if self.calls == self.failure_at:
            raise self.failure
        losses = genomes.sum(-1)
        return Scores(losses, np.stack([losses, losses], -1), n_tokens=10 * len(genomes), peak_bytes=None)


def run(
    tmp_path, optimizer=None, evaluator=None, *, limit_s=1e9, max_evaluations=20, **options
) -> SearchOutcome:
    evaluator = evaluator or SumEvaluator()
    n_finalists = options.pop("n_finalists", 5)
    with TraceWriter(tmp_path / "trace.jsonl") as trace:
        trace.header({})
        return search_loop(
            optimizer or BatchOptimizer(np.zeros(N_PARAMS), 0.1, N_CANDIDATES, 100, seed=0),
            evaluator,
            trace=trace,
            timebox=options.pop("timebox", None) or TimeBox(limit_s, clock=evaluator.clock),
            limits=Limits(max_evaluations, n_finalists),
            **options,
        )


def recorded(tmp_path):
    return Trace.load(tmp_path / "trace.jsonl").generations


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


def test_the_longest_generation_so_far_decides(tmp_path):
    clock = Clock()
    outcome = run(tmp_path, evaluator=SumEvaluator(clock, (1, 5, 1)), limit_s=12, max_evaluations=1000)
    assert (outcome.ended_by, outcome.generations) == ("clock", 3)  # 6 s left, 1.2 x 5 s just fits; then 5 s
    assert clock.now_s <= 12


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


def test_the_first_generation_runs_whatever_the_limits(tmp_path):
    outcome = run(tmp_path, limit_s=0.5, max_evaluations=1)
    assert outcome.generations == 1
    assert len(outcome.archive_losses) == N_CANDIDATES
    late = TimeBox(5, started_s=-10.0, clock=Clock())
    outcome = run(tmp_path, timebox=late, max_evaluations=99)
    assert (outcome.ended_by, outcome.generations) == ("clock", 1)


def test_an_interrupt_drops_the_generation_under_way_and_keeps_the_rest(tmp_path):
    reference = run(tmp_path, max_evaluations=8)
    outcome = run(tmp_path, evaluator=SumEvaluator(failure_at=3))
    assert (outcome.ended_by, outcome.generations, outcome.evaluations) == ("interrupt", 2, 8)
    np.testing.assert_array_equal(outcome.archive_genomes, reference.archive_genomes)
    assert len(recorded(tmp_path)) == 2


def test_an_interrupt_in_the_first_generation_leaves_an_empty_archive(tmp_path):
    outcome = run(tmp_path, ListOptimizer(np.ones((2, 3))), SumEvaluator(failure_at=1))
    assert (outcome.ended_by, outcome.generations) == ("interrupt", 0)
    assert outcome.archive_genomes.shape == (0, 3)
    assert outcome.mean_genome.tolist() == [7, 7, 7]


def test_a_flag_set_between_generations_ends_the_search_before_the_next(tmp_path):
    seen = []
    outcome = run(tmp_path, on_generation=seen.append, interrupted=lambda: len(seen) == 2)
    assert (outcome.ended_by, outcome.generations) == ("interrupt", 2)
    assert run(tmp_path, interrupted=lambda: True).generations == 0


def test_an_interrupt_while_reporting_keeps_the_generation(tmp_path):
    def interrupt(progress):
        raise KeyboardInterrupt

    outcome = run(tmp_path, on_generation=interrupt)
    assert (outcome.ended_by, outcome.generations) == ("interrupt", 1)
    assert len(outcome.archive_losses) == N_CANDIDATES


def test_other_failures_are_not_swallowed_and_the_trace_keeps_what_came_before(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA"):
        run(tmp_path, evaluator=SumEvaluator(failure_at=2, failure=RuntimeError("CUDA")))
    assert len(recorded(tmp_path)) == 1


def test_the_archive_is_the_best_distinct_genomes_best_first(tmp_path):
    a, b, c, d = [0, 3], [0, 1], [0, 2], [0, 0]
    outcome = run(tmp_path, ListOptimizer([a, b, b], [b, c, d]), max_evaluations=6, n_finalists=3)
    np.testing.assert_array_equal(outcome.archive_genomes, [d, b, c])
    np.testing.assert_array_equal(outcome.archive_losses, [0, 1, 2])
    assert outcome.mean_genome.tolist() == [7, 7]


def test_a_genome_scored_twice_keeps_its_lower_loss(tmp_path):
    class Noisy(SumEvaluator):
        def evaluate(self, genomes):
            scores = super().evaluate(genomes)
            return Scores(scores.losses + self.calls % 3, scores.per_expert, scores.n_tokens, None)

    outcome = run(tmp_path, ListOptimizer([[0.0]]), Noisy(), max_evaluations=4)  # +1, +2, +0, +1
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


def test_a_generation_without_finite_losses_is_recorded_and_then_an_error(tmp_path):
    class Broken(SumEvaluator):
        def evaluate(self, genomes):
            scores = super().evaluate(genomes)
            return Scores(scores.losses * np.nan, scores.per_expert, scores.n_tokens, None)

    with pytest.raises(ValueError, match="none of 4 losses is finite"):
        run(tmp_path, evaluator=Broken())
    assert np.isnan(recorded(tmp_path)[0].losses).all()


def test_the_trace_holds_every_generation(tmp_path):
    outcome = run(tmp_path, evaluator=SumEvaluator(seconds=(2.0, 1.0)), max_evaluations=8)
    first, second = recorded(tmp_path)
    assert (first.elapsed_s, first.seconds, second.elapsed_s, second.seconds) == (2, 2, 3, 1)
    assert (first.evaluations, second.evaluations, second.n_tokens) == (4, 8, 40)
    assert first.rungs == [{"prompts": None, "candidates": [0, 1, 2, 3]}]
    np.testing.assert_array_equal(first.genomes.sum(-1), first.losses)
    assert outcome.archive_losses[0] == min(first.losses.min(), second.losses.min())


def test_the_same_seed_gives_the_same_trace_but_for_times(tmp_path):
    lines = []
    for folder, seconds in (("a", 1.0), ("b", 1.5)):
        run(tmp_path / folder, evaluator=SumEvaluator(seconds=(seconds,)))
        text = (tmp_path / folder / "trace.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    assert lines[0] != lines[1]
    for line in lines[0] + lines[1]:
        line.pop("seconds", None)
        line.pop("elapsed_s", None)
    assert lines[0] == lines[1]


def test_a_fresh_optimizer_told_a_recorded_search_goes_on_as_that_search_did(tmp_path):
    run(tmp_path, max_evaluations=40)
    generations = recorded(tmp_path)
    resumed = BatchOptimizer(np.zeros(N_PARAMS), 0.1, N_CANDIDATES, 100, seed=0)
    for generation in generations[:6]:
        np.testing.assert_array_equal(resumed.ask(), generation.genomes)
        resumed.tell(generation.losses)
    np.testing.assert_array_equal(resumed.ask(), generations[6].genomes)


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
