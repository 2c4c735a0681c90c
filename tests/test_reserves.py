"""What is kept for the end of a run follows the machine: measured, scaled, measured again, given up."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from search.reserves import OPTIONAL, EndingCosts, Reserves
from search.timebox import OutOfTime, TimeBox

COSTS = EndingCosts(
    candidate_s=0.5, n_finalists=17, n_few=7, gradient_s=1.0, n_gradients=20, merge_s=1.0, later_s=20.0
)


@pytest.fixture
def machine():
    """A clock, how slow it is, and a box and its reserves on it; measuring takes three seconds."""
    machine = SimpleNamespace(now_s=0.0, slower=1.0, measured=0)
    machine.box = TimeBox(200, clock=lambda: machine.now_s)

    def measure():
        machine.now_s += 3 * machine.slower
        machine.measured += 1
        scaled = {name: machine.slower * getattr(COSTS, name) for name in ("candidate_s", "gradient_s")}
        return replace(COSTS, later_s=machine.slower * COSTS.later_s, **scaled)

    machine.reserves = Reserves(machine.box, measure)

    def generation(seconds=2.0):
        machine.now_s += machine.slower * seconds
        machine.reserves.see_generation(machine.slower * seconds, 1000, machine.slower * seconds)

    machine.generation = generation
    return machine


def test_finalists_refinement_merge_and_what_follows_are_kept(machine):
    assert machine.box.reserves == {"merge": 1, "later": 20, "finalists": 10, "refine": 20}
    assert machine.box.left_s() == 200 - 3 - 51
    assert machine.box.left_s(OPTIONAL) == 200 - 3 - 21


def test_a_steady_machine_keeps_its_reserves_and_measures_again_once_near_the_end(machine):
    for seconds in (3.0, *[2.0, 2.1] * 10):  # the first generation may be a slow one
        machine.generation(seconds)
        assert machine.reserves.pace == 1
    assert machine.measured == 1
    while machine.box.fits(2.4):
        machine.generation()
    assert machine.measured == 2
    assert machine.box.left_s() < 2.4


def test_one_slow_generation_is_no_slower_machine_and_two_are(machine):
    for _ in range(5):
        machine.generation()
    machine.generation(4.0)
    assert machine.box.reserves["later"] == 20
    machine.generation(4.0)
    assert machine.reserves.pace == pytest.approx(2)
    assert machine.box.reserves == {"merge": 2, "later": 40, "finalists": 20, "refine": 40}
    for _ in range(2):
        machine.generation()
    assert machine.box.reserves["later"] == 20


def test_on_a_machine_that_gets_slower_all_that_follows_still_fits(machine):
    for _ in range(20):
        machine.generation()
    machine.slower = 2.0
    while machine.box.fits(1.2 * 4):
        machine.generation()
    assert machine.measured == 2  # at the new pace
    reserves, box = machine.reserves, machine.box
    reserves.begin_ending()
    assert reserves.may_compare()
    n_gradients = 0
    while n_gradients < COSTS.n_gradients and reserves.may_refine():
        machine.now_s, n_gradients = machine.now_s + 2.0, n_gradients + 1
    assert n_gradients >= 10
    n_finalists = reserves.n_affordable()
    assert n_finalists >= COSTS.n_finalists
    machine.now_s += (COSTS.n_finalists + 3) * 1.0 + 2.0 + 40.0
    assert 0 <= 200 - box.elapsed_s() < 12


def test_a_search_is_not_ended_by_a_slow_spell_alone(machine):
    for _ in range(3):
        machine.generation()
    machine.slower = 3.0
    for _ in range(3):
        machine.generation()
    assert machine.measured == 2  # before it ends: the scaled reserves would leave nothing
    assert machine.reserves.pace == 1
    assert machine.box.reserves["later"] == 60
    machine.slower = 1.0
    while machine.box.fits(1.2 * 2):
        machine.generation()
    assert machine.box.reserves["later"] == 20  # measured again once it was over
    assert machine.now_s > 130


def test_measuring_has_its_share_of_the_box_and_no_more(machine):
    while machine.box.left_s(OPTIONAL) > 0:
        machine.slower *= 1.3
        machine.generation()
    assert machine.measured < 7


@pytest.mark.parametrize(
    ("left_s", "again"), [(60.5, False), (59.5, True), (31, True), (8.5, True), (7.5, False)]
)
def test_before_the_ending_all_is_measured_again_where_time_is_short_but_not_too_short(
    machine, left_s, again
):
    machine.now_s = 200 - 21 - left_s  # the ending takes 10 and 20, a few finalists 5, and measuring 3
    machine.reserves.begin_ending()
    assert machine.measured == 1 + again


def test_what_was_measured_near_the_end_of_the_search_is_not_measured_before_the_ending(machine):
    while machine.box.fits(2.4):
        machine.generation()
    assert machine.measured == 2
    assert machine.box.left_s(OPTIONAL) < 60
    machine.reserves.begin_ending()
    assert machine.measured == 2


@pytest.mark.parametrize(("left_s", "fits"), [(11.25, True), (11.15, False)])
def test_a_gradient_begins_only_with_some_time_to_spare(machine, left_s, fits):
    machine.now_s = 100.0
    machine.reserves.begin_ending()
    machine.now_s = 200 - 21 - left_s  # finalists take 10, a gradient 1
    assert machine.reserves.may_refine() == fits


def test_gradients_that_turn_slow_give_up_steps_then_finalists(machine):
    machine.now_s = 130.0
    machine.reserves.begin_ending()
    n_gradients = 0
    while n_gradients < COSTS.n_gradients and machine.reserves.may_refine():
        machine.now_s, n_gradients = machine.now_s + 2.0, n_gradients + 1
    assert n_gradients < 10
    assert machine.box.reserves["later"] == 40
    machine.now_s = 150.0
    assert machine.reserves.n_affordable() == int((200 - 150 - 42) / 1.0) - 3
    assert not machine.reserves.may_compare()


def test_a_long_end_leaves_the_search_half_of_the_time():
    box = TimeBox(100, clock=lambda: 0.0)
    long = replace(COSTS, candidate_s=10.0, gradient_s=10.0)
    Reserves(box, lambda: long)
    assert box.reserves == {"merge": 1, "later": 20, "finalists": 0, "refine": 0}  # not even a few fit
    box = TimeBox(1000, clock=lambda: 0.0)
    Reserves(box, lambda: replace(long, n_gradients=100, n_finalists=97))
    assert box.reserves["finalists"] == pytest.approx(979 / 4)
    assert box.reserves["refine"] == pytest.approx(box.left_s())
    assert box.reserves["refine"] == pytest.approx(979 * 3 / 8)


def test_a_box_is_over_when_only_what_is_not_optional_is_left(machine):
    machine.now_s = 160.0
    machine.box.check(OPTIONAL)
    with pytest.raises(OutOfTime):
        machine.box.check()
    machine.now_s = 180.0
    with pytest.raises(OutOfTime):
        machine.box.check(OPTIONAL)
