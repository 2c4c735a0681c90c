"""Jobs in processes: results, failures that stop nobody, and an end to new work."""

import os
import time

import pytest

from benchmarks.device_pool import DevicePool


def halve(number):
    """A job, and whose process did it."""
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2, os.getpid()


def test_one_job_at_a_time_is_done_here_and_nothing_after_the_end():
    with DevicePool(1, "cpu") as pool:
        assert list(pool.run(halve, [2, 4])) == [(2, (1, os.getpid())), (4, (2, os.getpid()))]
        assert list(pool.run(halve, [2], stop_at=time.time())) == []


@pytest.mark.slow
def test_processes_go_on_when_a_job_fails(capsys):
    with DevicePool(2, "cpu") as pool:
        found = dict(pool.run(halve, range(6)))
        assert {job: half for job, (half, _) in found.items()} == {0: 0, 2: 1, 4: 2}
        assert os.getpid() not in {pid for _, pid in found.values()}
        assert pool.n_failed == 3
        assert "3 is odd" in capsys.readouterr().err
        assert len(list(pool.run(halve, [2] * 50, stop_at=time.time()))) < 10
