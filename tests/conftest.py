"""Shared fixtures: toy models and adapters; how tests are shared out. The hub is switched off for every test.

It loads no heavy library by itself: a process that only shares tests out, or runs one light file, needs none.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that tests start inherit it

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.zoo.layout import Build
    from search.adapters import Adapter

MOST_WORKERS = 4
"""Each takes about 1.5 GB."""
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share out the default tests among processes; not named files, nor tests of a device or a clock."""
    is_default = "not gpu and not slow" in config.option.markexpr
    is_whole = not any(".py" in argument for argument in config.args)
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS) if is_default and is_whole else 0


@cache
def _shared_model(architecture: str) -> "nn.Module":
    from tests.toys import make_model

    return make_model(architecture)


@pytest.fixture(params=("llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox"))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of the six architectures in turn."""
    return request.param


@pytest.fixture(scope="session")
def toy_model() -> "Callable[[str], nn.Module]":
    """Make a float64 model by architecture; the session shares it, so leave it as it was."""
    return _shared_model


@pytest.fixture(scope="session")
def toy_adapters(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], tuple[Adapter, ...]]":
    """Load three adapters by architecture, of mixed ranks, alphas, rsLoRA, patterns and module sets."""
    from search.adapters import load_adapter

    @cache
    def load(architecture: str) -> "tuple[Adapter, ...]":
        folder = tmp_path_factory.mktemp(f"adapters-{architecture}")
        return tuple(load_adapter(str(path)) for path in _save_all(architecture, folder))

    return load


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> "Build":
    """Build the zoo in its tiny size, in about 8 s; the session shares it, so leave it as it was."""
    import torch

    from benchmarks.zoo.build import build_zoo
    from tests.tiny_zoo import tiny_build

    build = tiny_build(tmp_path_factory.mktemp("tiny"))
    with torch.random.fork_rng():
        build_zoo(build)
    return build


@pytest.fixture(scope="session")
def finished_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of the main job, answers included; the session shares it: copy it."""
    from tests.verifying import make_work, run_job

    folder = make_work(tmp_path_factory.mktemp("work") / "here")
    assert run_job(folder) == 0
    return folder


def _save_all(architecture: str, folder: Path) -> list[Path]:
    from tests.toys import mixed_recipes, save_adapter

    model = _shared_model(architecture)
    return [
        save_adapter(model, folder / f"expert-{index}", recipe)
        for index, recipe in enumerate(mixed_recipes(architecture))
    ]
