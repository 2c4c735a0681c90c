"""Foreseeing a search: costs fitted from timings, and generations that fit, against the loop itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from search.forecast import (
    Cost,
    SearchPlan,
    Timetable,
    Timing,
    fit_cost,
    forecast_search,
    race_seconds,
)
from search.loop import Before, Engine, Limits, SearchTools, search_loop
from search.racing import BlockScores, plan_race
from search.timebox import PROCESS_END_S, SPARE_SHARE, TimeBox

SECONDS = st.floats(0.001, 10)
TIMES = Timetable(
    time_box_s=100,
    caller_s=5,
    load_s=6,
    prompts_s=7,
    signals_s=8,
    rehearsal_s=1,
    generation_s=2,
    finalists_s=4,
    merge_s=1,
)


def plan(n_candidates=4, max_evaluations=10_000, shares=(1.0,)):
    return SearchPlan(n_candidates=n_candidates, max_evaluations=max_evaluations, shares=shares)


@given(SECONDS, SECONDS, st.floats(1e-6, 0.1), st.integers(2, 64), st.integers(1, 500), st.integers(1, 500))
def test_a_cost_that_is_linear_is_found_again(fixed_s, candidate_s, token_s, n, tokens, further):
    true = Cost(fixed_s, candidate_s, token_s)
    one, many, more = (
        Timing(k, size, true.seconds(k, size))
        for k, size in ((1, tokens), (n, tokens), (n, tokens + further))
    )
    found = fit_cost(one, many, more)
    assert found.seconds(n, 10 * tokens) == pytest.approx(true.seconds(n, 10 * tokens), rel=1e-6)
    assert found.seconds(3, tokens) == pytest.approx(true.seconds(3, tokens), rel=1e-6)


@given(
    st.lists(SECONDS, min_size=3, max_size=3), st.integers(2, 64), st.integers(1, 500), st.integers(0, 500)
)
def test_noise_makes_no_cost_negative_and_no_more_than_all_tokens_in_proportion(seconds, n, tokens, further):
    sizes = (1, tokens), (n, tokens), (n, tokens + further)
    one, many, more = (Timing(k, size, s) for (k, size), s in zip(sizes, seconds, strict=True))
    found = fit_cost(one, many, more if further else many)
    assert min(found.fixed_s, found.candidate_s, found.token_s) >= 0
    assert found.token_s * n * more.n_tokens <= (more if further else many).seconds * (1 + 1e-9)


def test_without_a_second_block_all_seconds_are_laid_to_the_tokens():
    many = Timing(4, 100, 8.0)
    assert fit_cost(Timing(1, 100, 2.0), many, many) == Cost(0.0, 0.0, 0.02)


def test_a_race_costs_what_its_rungs_add_up_to():
    cost = Cost(0.5, 0.1, 0.01)
    rungs = plan_race(16, 8, 0.5)  # blocks 1 2 4 8, candidates 16 8 4 2: 40 blocks of 10 tokens
    assert race_seconds(cost, rungs, 10) == pytest.approx(4 * 0.5 + (16 + 8 + 4 + 2) * 0.1 + 40 * 10 * 0.01)
    assert race_seconds(cost, plan_race(16, 8, None), 10) == pytest.approx(cost.seconds(16, 80))


def test_the_search_has_what_the_rest_leaves_less_what_is_spare():
    assert TIMES.fixed_s == pytest.approx(27 + 5 + 0.05 * 100 + 1.5)
    assert TIMES.search_s == pytest.approx(100 - 38.5)


@given(st.integers(1, 50), st.floats(0.1, 20))
def test_the_time_box_that_is_advised_has_room_for_so_many_generations_and_no_smaller_one_has(
    n, generation_s
):
    times = replace(TIMES, generation_s=generation_s)
    box = times.box_for(n)
    enough = forecast_search(replace(times, time_box_s=box + 1e-6), plan())
    assert enough.generations >= n
    if n > 1:
        assert forecast_search(replace(times, time_box_s=box - 1.001), plan()).generations < n


class SteadyEvaluator:
    """Takes the same time for each generation, by a clock of its own."""

    n_blocks = 1

    def __init__(self, generation_s):
        self.generation_s, self.now_s = generation_s, 0.0

    def score_blocks(self, genomes, blocks):
        self.now_s += self.generation_s
        sums = np.ones((len(genomes), 1))
        return BlockScores(sums, np.ones(1), np.array([0]), sums, n_tokens=1, peak_bytes=None)

    def combine(self, sums, counts):
        return sums[:, 0], sums


class StillOptimizer:
    """Always asks for the same."""

    def ask(self):
        return np.zeros((4, 2))

    def tell(self, losses):
        pass

    def mean(self):
        return np.zeros(2)

    def inject(self, genomes):
        pass


class NoTrace:
    """Writes nothing."""

    def generation(self, generation):
        pass


@given(st.floats(0.5, 20), st.floats(-5, 60), st.integers(4, 60))
def test_the_forecast_is_what_the_search_loop_does(generation_s, search_s, max_evaluations):
    assume(abs((search_s / generation_s - 1.2) % 1) > 1e-6)
    evaluator = SteadyEvaluator(generation_s)
    box = TimeBox(max(search_s, 1e-9), clock=lambda: evaluator.now_s)
    tools = SearchTools(trace=NoTrace(), timebox=box)
    limits = Limits(max_evaluations=max_evaluations, n_finalists=1)
    outcome = search_loop(Engine(StillOptimizer(), evaluator), tools, limits, before=Before())
    box_s = (TIMES._phases_s + PROCESS_END_S + search_s) / (1 - SPARE_SHARE)
    times = replace(TIMES, generation_s=generation_s, time_box_s=box_s)
    found = forecast_search(times, plan(max_evaluations=max_evaluations))
    assert (found.generations, found.evaluations) == (outcome.generations, outcome.evaluations)
    assert found.ended_by == outcome.ended_by
    assert found.seconds == pytest.approx(outcome.generations * generation_s)


def test_stages_share_evaluations_and_time_and_a_later_one_may_get_nothing():
    shares = (1.0, 3.0)
    assert forecast_search(TIMES, plan(max_evaluations=80, shares=shares)).generations == 20
    found = forecast_search(TIMES, plan(shares=shares))  # 61.5 s: 15.375 for the first, 2 s a generation
    first = math.floor(15.375 / 2 - 1.2) + 1
    assert found.generations == first + math.floor((61.5 - 2 * first) / 2 - 1.2) + 1
    assert found.ended_by == "clock"
    starved = forecast_search(replace(TIMES, time_box_s=30), plan(shares=shares))
    assert (starved.generations, starved.ended_by) == (1, "clock")
