"""The same job twice: to the last bit on a CPU, in one process or two, and nearly so on a GPU."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.test_layers import ROOT
from tests.test_run import timeless
from tests.verifying import make_work, run_job

OF_THE_CLOCK = {"job_s", "host_peak_bytes"}
"""Of the event `answered`, beside what all lines have of it."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Base, adapters, queries and a configuration that evaluations end."""
    return make_work(tmp_path_factory.mktemp("work"))


def coefficients(output):
    return np.array(json.loads((output / "my_merge/coefficients.json").read_text())["coefficients"])


def lines_of(output):
    """All that the trace has but for the clock, the memory and where the answers lie."""
    lines = timeless(output / "my_merge")
    return [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines]


def assert_same_bits(one, other):
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    different = [str(path) for path in files if (one / path).read_bytes() != (other / path).read_bytes()]
    assert different == ["my_merge/trace.jsonl"]  # which has the clock
    assert lines_of(one) == lines_of(other)


def run_twice(work, *arguments):
    """Run the job twice in this process; the two folders."""
    for name in ("one", "two"):
        assert run_job(work, "--output_folder", name, *arguments) == 0
    return work / "one", work / "two"


def test_the_same_job_in_one_process_writes_the_same_bits_and_another_seed_others(work):
    one, two = run_twice(work)
    assert_same_bits(one, two)
    assert run_job(work, "--output_folder", "three", "--seed", "1") == 0
    first, other = (
        [line for line in lines_of(folder) if "genomes" in line] for folder in (one, work / "three")
    )
    assert first[0]["genomes"] != other[0]["genomes"]


@pytest.mark.slow
def test_the_command_in_two_processes_writes_the_same_bits(work):
    for seed in ("1", "2"):  # of Python's hashes: no order of a set may matter
        command = [sys.executable, str(ROOT / "llm_merging/main.py"), "--config", "config.yaml"]
        command += ["--dataset_filepaths", "queries.csv", "--output_folder", f"process{seed}"]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1].endswith("search ended by evaluations")
    assert_same_bits(work / "process1", work / "process2")


def assert_nearly_the_same(work, device):
    """Run the embedded zoo twice on a device: the same end, and coefficients to 1e-3; return how near."""
    settings = (ROOT / "configs/demo.yaml").read_text().replace("data/zoo", str(ROOT / "data/zoo"))
    for line in ("max_evaluations: 320", "refine_steps: 40", "per_adapter: 8"):
        settings = settings.replace(line, f"{line.split(':')[0]}: {'32' if '320' in line else '2'}")
    (work / "zoo.yaml").write_text(f"device: {device}\n{settings}")
    one, two = run_twice(work, "--config", "zoo.yaml")
    ends = [json.loads((folder / "my_merge/coefficients.json").read_text()) for folder in (one, two)]
    assert [end["provenance"]["ended_by"] for end in ends] == ["evaluations", "evaluations"]
    assert ends[0]["provenance"]["winner"] == ends[1]["provenance"]["winner"]
    np.testing.assert_allclose(coefficients(one), coefficients(two), rtol=0, atol=1e-3)
    return float(np.abs(coefficients(one) - coefficients(two)).max())


@pytest.mark.slow
def test_what_is_compared_on_a_gpu_is_compared_on_a_cpu(tmp_path):
    assert assert_nearly_the_same(make_work(tmp_path), "cpu") == 0


@pytest.mark.gpu
def test_two_runs_on_a_gpu_have_the_same_coefficients_to_a_thousandth(tmp_path):
    assert_nearly_the_same(make_work(tmp_path), "cuda")
