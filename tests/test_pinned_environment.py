"""The oldest libraries of pyproject.toml's range: search/'s own tests, and the bundle's, run with them.

pip makes an environment of its own: minutes, and 5 GB. PINNED_PYTHON names the Python of one that is there.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_layers import ROOT

KIT = ("transformers==4.47.1", "peft==0.10.0", "numpy==1.26.4", "safetensors==0.4.5", "accelerate==1.0.1")
"""What the competition's kit pins."""
WITH_IT = ("torch==2.5.1", "huggingface_hub==0.36.2", "tokenizers==0.21.4", "nevergrad==1.0.12", "cma==4.5.0")
"""torch of the kit's time, and what the resolver chose beside it."""
OTHERS = ("pydantic==2.14.4", "PyYAML==6.0.4", "tqdm==4.70.1", "pandas==3.0.6", "scipy==1.17.1")
TOOLS = ("pytest==9.2.0", "hypothesis==6.170.17", "matplotlib==3.11.2")
ELSEWHERE = {
    *("figures", "finding", "layers", "notebook", "pinned_environment", "report", "tables"),
    *("kill", "search_main"),
}
"""What reads text or draws, whatever the libraries; and what starts processes, of code tested in others."""
NOT_THERE = {
    "bundle.py::test_it_is_formatted_and_clean": "ruff is no library of the range",
    "hub.py::test_a_busy_hub_is_asked_again[tree": "an older client asks for no tree",
    "hub.py::test_a_pinned_adapter_in_the_cache_needs_no_hub": "an older client asks all the same",
    "hub.py::test_offline_with_a_part_in_the_cache_is_refused": "an older client takes what there is",
    "hub.py::test_what_is_no_hub_is_said_to_be_none": "an older client says that nobody answers",
    "population.py::test_generation_with_cache_gives_each_row_its_own_continuation[gemma2]": "a log line of "
    "transformers 4.47 has an argument too many",
    "sampling.py::test_a_row_stops_at_the_models_context": "GPT-2's mask overflows in float64",
}
"""Tests that cannot pass with these versions, and why."""


NEEDS_MORE = re.compile(r"^(from|import) (benchmarks|llm_merging|tests\.verifying)", re.MULTILINE)
"""Than search/: tests.verifying has whole runs of the main job."""


def importing_only_search() -> list[str]:
    """The test files that need neither llm_merging nor benchmarks, and the bundle's and the hub's."""
    found = [
        path
        for path in sorted(Path(ROOT / "tests").glob("test_*.py"))
        if not NEEDS_MORE.search(path.read_text()) or path.stem in ("test_bundle", "test_hub")
    ]
    return [str(path) for path in found if path.stem.removeprefix("test_") not in ELSEWHERE]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """The Python of an environment with these libraries."""
    if given := os.environ.get("PINNED_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("pinned")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    order = [folder / "bin/python", "-m", "pip", "install", "-q", *KIT, *WITH_IT, *OTHERS, *TOOLS]
    if subprocess.run(order).returncode:
        pytest.skip("these libraries cannot be fetched here")
    return str(folder / "bin/python")


@pytest.mark.slow
@pytest.mark.network
def test_the_librarys_tests_and_the_bundles_pass_with_the_oldest_libraries(python):
    left_out = [option for name in NOT_THERE for option in ("--deselect", f"tests/test_{name}")]
    options = ["-o", "addopts=", "-q", "-m", "not gpu and not slow and not network", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [python, "-m", "pytest", *options, *left_out, *importing_only_search()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    sys.stdout.write(done.stdout.splitlines()[-1] + "\n")


@pytest.mark.slow
@pytest.mark.network
def test_these_are_the_libraries_that_ran(python):
    listed = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
    assert set(KIT) <= set(listed.stdout.split())


def test_the_stated_range_begins_with_what_was_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = dict(re.fullmatch(r"([\w-]+)>=([\d.]+),<.*", line).groups() for line in project["dependencies"])
    ran = dict(line.split("==") for line in (*KIT, *WITH_IT, *OTHERS) if "==" in line)
    assert {name: ran[name] for name in stated} == stated


def test_the_stated_range_holds_what_requirements_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    )

    def number(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    for line in project["dependencies"]:
        name, first, end = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", line).groups()
        assert number(first) <= number(pinned[name]) < number(end), line
