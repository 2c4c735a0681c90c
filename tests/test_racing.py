"""Racing: plans and told losses as pictures, and a slow, obvious race to compare with."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.racing import BlockScores, Race, order_blocks, plan_race, rank_by_rung, select_survivors

TOKENS_PER_BLOCK = 10
PLANS = {
    (16, 8, 0.5): """
        blocks      1  2  4  8
        candidates 16  8  4  2
    """,
    (16, 8, 0.25): """
        blocks      1  4  8
        candidates 16  4  2
    """,
    (16, 4, 0.25): """
        blocks      1  4
        candidates 16  4
    """,
    (5, 3, 0.5): """
        blocks      1  2  3
        candidates  5  3  2
    """,
    (12, 8, 0.75): """
        blocks      1  2  3  4  6  8
        candidates 12  9  7  6  5  4
    """,
    (2, 1, 0.5): """
        blocks      1
        candidates  2
    """,
    (2, 4, 0.5): """
        blocks      1  2  4
        candidates  2  2  2
    """,
    (1, 4, 0.25): """
        blocks      1  4
        candidates  1  1
    """,
    (16, 1, 0.5): """
        blocks      1
        candidates 16
    """,
    (16, 8, None): """
        blocks      8
        candidates 16
    """,
}
TOLD = {  # a column is a candidate; "." is not in the rung, "x" is NaN
    "without a race losses are told as they are": """
        rung  3 1 x 2
        told  3 1 x 2
    """,
    "who dropped out is raised to the worst who went on": """
        rung  1 2 3 4
        rung  5 6 . .
        told  5 6 6 6
    """,
    "who is worse than that already keeps the loss": """
        rung  1 2 9 4
        rung  5 6 . .
        told  5 6 9 6
    """,
    "the worst of all later rungs counts": """
        rung  1 2 3 4 5
        rung  8 7 9 . .
        rung  6 5 . . .
        told  6 5 9 9 9
    """,
    "a raised loss raises those before it": """
        rung  1 2 3 4 5
        rung  1 2 3 . .
        rung  5 6 . . .
        told  5 6 6 6 6
    """,
    "ties are told as ties": """
        rung  2 2 2 2
        rung  2 2 . .
        told  2 2 2 2
    """,
    "NaN stays NaN and raises nobody": """
        rung  1 x 2 3
        rung  4 . 5 .
        told  4 x 5 5
    """,
    "NaN in a later rung is told, the rest goes on": """
        rung  1 2 3 4
        rung  x 6 . .
        told  x 6 6 6
    """,
    "where nobody who went on is finite, the rest stays": """
        rung  1 2 3 4
        rung  x x . .
        told  x x 3 4
    """,
    "infinite losses stay infinite": """
        rung  1 2 inf -inf
        rung  5 6   .    .
        told  5 6 inf -inf
    """,
    "none finite at all": """
        rung  x x
        told  x x
    """,
}


class TableEvaluator:
    """Looks losses up: genome (i,) is candidate i; remembers who was scored on what."""

    def __init__(self, sums, counts):
        self.sums, self.counts = np.array(sums, dtype=float), np.array(counts, dtype=float)
        self.n_blocks = self.sums.shape[1]
        self.calls = []

    def score_blocks(self, genomes, blocks):
        candidates, blocks = genomes[:, 0].astype(int).tolist(), list(blocks)
        self.calls.append((candidates, blocks))
        chosen = self.sums[candidates][:, blocks]
        return BlockScores(
            sums=chosen.sum(1),
            counts=self.counts[blocks].sum(0),
            prompts=np.array(blocks),
            prompt_means=chosen.mean(2),
            n_tokens=TOKENS_PER_BLOCK * len(candidates) * len(blocks),
            peak_bytes=None,
        )

    def combine(self, sums, counts):
        return (sums / counts).mean(-1), sums / counts


def run_race(sums, counts=None, *, keep=0.5, order=None):
    """Race candidates with sums (n_candidates, n_blocks, n_experts)."""
    evaluator = TableEvaluator(sums, np.ones(np.shape(sums)[1:]) if counts is None else counts)
    race = Race(np.arange(len(sums), dtype=float)[:, None], evaluator)
    plan = plan_race(len(sums), evaluator.n_blocks, keep)
    race.run(plan, np.arange(evaluator.n_blocks) if order is None else order)
    return race, evaluator


def race_slowly(sums, counts, plan, order):
    """The same race, a candidate at a time: the rungs as (candidate -> loss), and what is told of each."""

    def loss_of(candidate, blocks):
        n_experts = len(counts[0])
        shares = [
            sum(sums[candidate][b][e] for b in blocks) / sum(counts[b][e] for b in blocks)
            for e in range(n_experts)
        ]
        return sum(shares) / n_experts

    rungs, alive = [], list(range(len(sums)))
    for rung in plan:
        if rungs:
            finite = [candidate for candidate in alive if math.isfinite(rungs[-1][candidate])]
            alive = sorted(sorted(finite, key=rungs[-1].get)[: rung.n_candidates])
        if not alive:
            break
        rungs.append({candidate: loss_of(candidate, order[: rung.n_blocks]) for candidate in alive})
    last = {c: max(place for place, rung in enumerate(rungs) if c in rung) for c in range(len(sums))}
    told = {}
    for candidate in sorted(last, key=last.get, reverse=True):
        further = [told[c] for c in told if last[c] > last[candidate] and math.isfinite(told[c])]
        own = rungs[last[candidate]][candidate]
        told[candidate] = max([own, *further]) if math.isfinite(own) else own
    return rungs, [told[candidate] for candidate in range(len(sums))]


@st.composite
def races(draw):
    """Small whole numbers, so that sums are exact and ties abound, with some NaN; plan and order."""
    n_candidates, n_blocks, n_experts = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 2)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    sums = rng.integers(0, 6, (n_candidates, n_blocks, n_experts)).astype(float)
    sums[rng.random(sums.shape) < draw(st.sampled_from([0, 0.05, 0.5, 1]))] = np.nan
    counts = rng.integers(1, 4, (n_blocks, n_experts)).astype(float)
    plan = plan_race(n_candidates, n_blocks, draw(st.sampled_from([None, 0.25, 0.5, 0.7])))
    return sums, counts, plan, rng.permutation(n_blocks)


def draw_plan(plan):
    return [[rung.n_blocks for rung in plan], [rung.n_candidates for rung in plan]]


def read_picture(picture):
    """Rows of a picture without their names."""
    values = {"x": "nan", ".": "-999"}
    return [[float(values.get(v, v)) for v in line.split()[1:]] for line in picture.strip().splitlines()]


@pytest.mark.parametrize(("arguments", "picture"), PLANS.items(), ids=str)
def test_a_plan_looks_like_its_picture(arguments, picture):
    assert draw_plan(plan_race(*arguments)) == read_picture(picture)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.99))
def test_a_plan_starts_with_all_on_one_block_and_ends_with_a_choice_on_all(n_candidates, n_blocks, keep):
    blocks, candidates = draw_plan(plan_race(n_candidates, n_blocks, keep))
    assert (blocks[0], blocks[-1], candidates[0]) == (1, n_blocks, n_candidates)
    assert min(candidates) >= min(2, n_candidates)
    assert (np.diff(blocks) > 0).all()
    assert (np.diff(candidates) <= 0).all()


@pytest.mark.parametrize("keep", [0, 1, -0.5, 1.5, math.nan])
def test_a_share_outside_0_to_1_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep is .*, expected a share between 0 and 1, or None"):
        plan_race(16, 8, keep)


@pytest.mark.parametrize(
    ("losses", "n_kept", "survivors"),
    [
        ([3, 1, 2, 0], 2, [1, 3]),
        ([0, 1, 2, 3], 4, [0, 1, 2, 3]),
        ([1, 1, 1, 1], 2, [0, 1]),  # ties: in their order
        ([2, 1, 1, 0], 2, [1, 3]),
        ([np.nan, 5, np.nan, 4], 2, [1, 3]),
        ([np.nan, 5, np.inf, -np.inf], 2, [1]),  # fewer are finite
        ([np.nan, np.nan], 2, []),
    ],
)
def test_the_lowest_finite_losses_survive(losses, n_kept, survivors):
    assert select_survivors(np.array(losses, dtype=float), n_kept).tolist() == survivors


@pytest.mark.parametrize(("name", "picture"), TOLD.items(), ids=TOLD)
def test_told_losses_look_like_their_picture(name, picture):
    *rows, told = np.array(read_picture(picture))
    rungs = [(np.flatnonzero(row != -999), row[row != -999]) for row in rows]
    np.testing.assert_array_equal(rank_by_rung(len(told), rungs), told)


@given(races())
def test_a_race_runs_as_the_slow_one(drawn):
    sums, counts, plan, order = drawn
    evaluator = TableEvaluator(sums, counts)
    race = Race(np.arange(len(sums), dtype=float)[:, None], evaluator)
    race.run(plan, order)
    rungs, told = race_slowly(sums.tolist(), counts.tolist(), plan, order.tolist())
    np.testing.assert_array_equal(race.losses(), told)
    assert [rung["candidates"] for rung in race.rungs] == [list(rung) for rung in rungs]
    assert [rung["prompts"] for rung in race.rungs] == [rung.n_blocks for rung in plan[: len(rungs)]]
    for found, expected in zip(race.rungs, rungs, strict=True):
        np.testing.assert_array_equal(found["losses"], list(expected.values()))
    n_blocks = np.diff([0, *(rung["prompts"] for rung in race.rungs)])
    n_scored = sum(n * len(rung) for n, rung in zip(n_blocks, rungs, strict=True))
    assert race.n_tokens == TOKENS_PER_BLOCK * n_scored


@given(races())
def test_told_losses_never_rank_who_dropped_out_before_who_went_further(drawn):
    sums, counts, plan, order = drawn
    evaluator = TableEvaluator(sums, counts)
    race = Race(np.arange(len(sums), dtype=float)[:, None], evaluator)
    race.run(plan, order)
    told = race.losses()
    for earlier, later in zip(race.rungs, race.rungs[1:], strict=False):
        dropped = sorted(set(earlier["candidates"]) - set(later["candidates"]))
        best_dropped = np.nanmin([*told[dropped], np.inf])
        assert best_dropped >= np.nanmax([*told[later["candidates"]], -np.inf])


@given(races())
def test_who_could_not_be_scored_is_told_as_nan_and_is_no_worse_off_elsewhere(drawn):
    sums, counts, plan, order = drawn
    race = Race(np.arange(len(sums), dtype=float)[:, None], TableEvaluator(sums, counts))
    race.run(plan, order)
    n_seen = {c: rung["prompts"] for rung in race.rungs for c in rung["candidates"]}
    failed = [np.isnan(sums[c][order[: n_seen[c]]]).any() for c in range(len(sums))]
    np.testing.assert_array_equal(np.isnan(race.losses()), failed)


@given(races(), st.randoms(use_true_random=False))
def test_permuting_candidates_permutes_everything(drawn, random):
    sums, counts, plan, order = drawn
    sums = sums + np.random.default_rng(0).random(sums.shape)  # ties go by order of candidates: none here
    turn = list(range(len(sums)))
    random.shuffle(turn)
    races = []
    for table in (sums, sums[turn]):
        races.append(Race(np.arange(len(sums), dtype=float)[:, None], TableEvaluator(table, counts)))
        races[-1].run(plan, order)
    plain, permuted = races
    np.testing.assert_array_equal(permuted.losses(), plain.losses()[turn])
    np.testing.assert_array_equal(permuted.per_expert, plain.per_expert[turn])
    assert permuted.n_tokens == plain.n_tokens
    for before, after in zip(plain.rungs, permuted.rungs, strict=True):
        assert {turn[c] for c in after["candidates"]} == set(before["candidates"])


@given(races())
def test_without_a_race_the_told_losses_are_the_plain_ones(drawn):
    sums, counts, _, order = drawn
    evaluator = TableEvaluator(sums, counts)
    race = Race(np.arange(len(sums), dtype=float)[:, None], evaluator)
    race.run(plan_race(len(sums), evaluator.n_blocks, None), order)
    losses, per_expert = evaluator.combine(sums.sum(1), counts.sum(0))
    np.testing.assert_array_equal(race.losses(), losses)
    np.testing.assert_array_equal(race.per_expert, per_expert)
    ((candidates, blocks),) = evaluator.calls
    assert (candidates, sorted(blocks)) == (list(range(len(sums))), list(range(len(counts))))


@given(races())
def test_all_candidates_of_a_rung_have_seen_the_same_blocks_each_once(drawn):
    sums, counts, plan, order = drawn
    evaluator = TableEvaluator(sums, counts)
    race = Race(np.arange(len(sums), dtype=float)[:, None], evaluator)
    race.run(plan, order)
    seen = {candidate: [] for candidate in range(len(sums))}
    for rung, (candidates, blocks) in zip(race.rungs, evaluator.calls, strict=True):
        for candidate in candidates:
            seen[candidate] += blocks
            assert seen[candidate] == order[: rung["prompts"]].tolist()


def test_the_order_of_blocks_is_seeded_and_another_in_each_generation():
    orders = [order_blocks(8, seed=3, generation=generation).tolist() for generation in range(20)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(map(tuple, orders))) == 20
    assert orders[5] == order_blocks(8, seed=3, generation=5).tolist()
    assert orders[5] != order_blocks(8, seed=4, generation=5).tolist()


def test_no_block_is_favoured_as_the_first():
    first = [order_blocks(4, seed=0, generation=generation)[0] for generation in range(800)]
    assert np.bincount(first).min() > 150  # 200 expected, standard deviation 12


def test_where_the_first_rung_is_wholly_nan_the_race_ends():
    sums = np.ones((4, 4, 1))
    sums[:, 0] = np.nan
    race, evaluator = run_race(sums)
    assert evaluator.calls == [([0, 1, 2, 3], [0])]
    assert np.isnan(race.losses()).all()
    assert [rung["prompts"] for rung in race.rungs] == [1]


def test_where_few_are_finite_only_those_go_on():
    sums = np.arange(8.0)[:, None, None].repeat(4, 1)
    sums[[0, 1, 2, 4, 5, 6], 0] = np.nan
    sums[3, 1] = np.nan  # fails in the second rung
    race, evaluator = run_race(sums)
    assert evaluator.calls == [(list(range(8)), [0]), ([3, 7], [1]), ([7], [2, 3])]
    np.testing.assert_array_equal(race.losses(), [np.nan] * 7 + [7])


def test_prompts_spread_by_the_candidates_that_could_be_scored_on_them():
    sums = np.array([[1, 1, 5, 1], [3, 2, 7, 2], [4, 3, 9, 3], [np.nan, 4, 9, 4]], dtype=float)[:, :, None]
    race, _ = run_race(sums)
    # all four on block 0, two on 1, then the same two on 2 and 3
    np.testing.assert_allclose(race.prompt_spread(), [np.std([1, 3, 4]), 0.5, 1, 0.5])
    one, _ = run_race(sums[:1])
    assert np.isnan(one.prompt_spread()).all()


def test_the_most_memory_of_all_rungs_is_told():
    class Measured(TableEvaluator):
        def score_blocks(self, genomes, blocks):
            scores = super().score_blocks(genomes, blocks)
            object.__setattr__(scores, "peak_bytes", [5, 9, 7][len(self.calls) - 1])
            return scores

    race = Race(np.arange(4.0)[:, None], Measured(np.ones((4, 4, 1)), np.ones((4, 1))))
    race.run(plan_race(4, 4, 0.5), np.arange(4))
    assert race.peak_bytes == 9
    assert run_race(np.ones((4, 4, 1)))[0].peak_bytes is None
