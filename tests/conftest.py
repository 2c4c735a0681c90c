"""Shared fixtures: toy models and adapters. The hub is switched off for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

from benchmarks.zoo.build import build_zoo
from benchmarks.zoo.layout import Build
from search.adapters import Adapter, load_adapter
from tests.tiny_zoo import tiny_build
from tests.toys import ARCHITECTURES, make_model, mixed_recipes, save_adapter

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@cache
def _shared_model(architecture: str) -> nn.Module:
    return make_model(architecture)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of the six architectures in turn."""
    return request.param


@pytest.fixture(scope="session")
def toy_model() -> Callable[[str], nn.Module]:
    """Make a float64 model by architecture; the session shares it, so leave it as it was."""
    return _shared_model


@pytest.fixture(scope="session")
def toy_adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Adapter, ...]]:
    """Load three adapters by architecture, of mixed ranks, alphas, rsLoRA, patterns and module sets."""

    @cache
    def load(architecture: str) -> tuple[Adapter, ...]:
        folder = tmp_path_factory.mktemp(f"adapters-{architecture}")
        return tuple(load_adapter(str(path)) for path in _save_all(architecture, folder))

    return load


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build the zoo in its tiny size, in about 8 s; the session shares it, so leave it as it was."""
    build = tiny_build(tmp_path_factory.mktemp("tiny"))
    with torch.random.fork_rng():
        build_zoo(build)
    return build


def _save_all(architecture: str, folder: Path) -> list[Path]:
    model = _shared_model(architecture)
    return [
        save_adapter(model, folder / f"expert-{index}", recipe)
        for index, recipe in enumerate(mixed_recipes(architecture))
    ]
