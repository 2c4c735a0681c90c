"""Time box: what is left is the limit less what is spent and what is reserved."""

import math
import subprocess
import sys
import time

import pytest

from search.timebox import TimeBox
from tests.test_layers import ROOT


class Clock:
    """Time that passes when told to."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_time_left_is_the_limit_less_elapsed_and_reserved():
    clock = Clock()
    box = TimeBox(60, clock=clock)
    assert (box.elapsed_s(), box.left_s()) == (0, 60)
    clock.now_s += 10
    box.reserve("finalists", 5)
    box.reserve("answers", 15)
    assert (box.elapsed_s(), box.left_s()) == (10, 30)
    box.reserve("answers", 20)
    assert box.left_s() == 25
    box.release("finalists")
    assert box.left_s() == 30


def test_a_step_fits_up_to_the_last_second():
    clock = Clock()
    box = TimeBox(10, clock=clock)
    assert box.fits(10)
    assert not box.fits(10.01)
    clock.now_s += 11
    assert box.left_s() == -1
    assert not box.fits(0)


def test_the_start_may_lie_before_the_box_was_made():
    assert TimeBox(60, started_s=70.0, clock=Clock()).left_s() == 30


def test_the_real_clock_runs():
    box = TimeBox(60, started_s=time.monotonic() - 1)
    assert 1 <= box.elapsed_s() < 30


def test_without_a_limit_everything_fits():
    assert TimeBox(math.inf).fits(1e9)


def test_senseless_numbers_and_names_are_refused():
    for limit_s in (0, -1, math.nan):
        with pytest.raises(ValueError, match="expected more than 0"):
            TimeBox(limit_s)
    box = TimeBox(1)
    for seconds in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="reserve 'merge' of"):
            box.reserve("merge", seconds)
    box.reserve("answers", 0)
    with pytest.raises(ValueError, match=r"no reserve 'merge' to release; reserved: \['answers'\]"):
        box.release("merge")


def test_the_life_of_a_process_is_wall_time_from_its_start():
    code = (
        "import runpy, time; time.sleep(1.0); box = runpy.run_path('search/timebox.py'); "
        "print(box['seconds_of_process'](), time.process_time())"
    )
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lived_s, computed_s = map(float, done.stdout.split())
    assert 1.0 <= lived_s <= time.monotonic() - started_s + 0.05
    assert lived_s >= computed_s
