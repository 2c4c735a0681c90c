"""Accuracy by teacher forcing against generating answers and choosing them."""

import copy
from pathlib import Path

import pytest
import torch

from benchmarks.truth import Truth
from benchmarks.zoo.measure import accuracies, load, measured_examples
from search.config import load_config
from search.population import mixed_weights
from search.setup import load_setup

ROOT = Path(__file__).parents[1]
TASKS = ("maths", "sentiment", "chat")
"""Free answers, and a choice."""


@pytest.fixture(scope="module")
def parts():
    return load_setup(load_config(ROOT / "configs/demo.yaml", ["device=cpu", "base.dtype=float32"])).parts


def test_accuracies_are_those_of_generated_and_chosen_answers(parts):
    examples = {task: measured_examples(8, "validation", 3)[task] for task in TASKS}
    weights = mixed_weights(parts.model, parts.stacked, torch.full(parts.shape, 0.3), parts.groups)
    merged = copy.deepcopy(parts.model)
    merged.load_state_dict(weights, strict=False)
    tokenizer = load(ROOT / "data/zoo/base", "cpu")[1]
    truth = Truth(parts.base.tokenizer, examples, tokens_per_forward=500)
    marks = truth.marks(parts.model, weights)
    assert marks.accuracy == pytest.approx(accuracies(merged, tokenizer, examples, 40))
    assert truth.marks(merged).accuracy == marks.accuracy
    assert all(nll > 0 for nll in marks.nll.values())
    assert 0 < sum(marks.accuracy.values()) < 3
