"""What labels could do: experts are right on their own tasks; scales and searches go where they are led."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.label_search import LabelEvaluator, search_labels
from benchmarks.labelled import (
    best_scale,
    joint_lora,
    plan_rows,
    scalable_methods,
    tune_scale,
)
from benchmarks.labels import TIE_PER_NAT, Labels
from benchmarks.rows import JOINT, ORACLE, SCALED, SINGLE
from benchmarks.zoo.queries import SHIPPED_HELD_OUT
from benchmarks.zoo.tasks import HELD_IN
from search.config import load_config
from search.setup import load_setup

ROOT = Path(__file__).parents[1]
WANTED_SCALE = 0.5


@pytest.fixture(scope="module")
def setup():
    config = load_config(ROOT / "configs/demo.yaml", ["search.max_evaluations=160", "device=cpu"])
    return load_setup(config)


def one_hot(setup, expert):
    table = np.zeros(setup.parts.shape)
    table[:, setup.parts.names.index(expert)] = 1
    return table


def test_an_expert_loses_nothing_on_its_own_task_and_all_on_another(setup):
    labels = Labels("mixed", setup, n_examples=2)
    losses = dict(zip(HELD_IN, labels.losses(labels.weights(one_hot(setup, "sql"))), strict=True))
    assert 0 <= losses["sql"] < TIE_PER_NAT
    assert losses["code"] > 1


def test_right_answers_alone_are_the_experts_level(setup):
    labels = Labels("mixed", setup, n_examples=1)
    found = labels.summarise({**dict.fromkeys(HELD_IN, 1.0), **dict.fromkeys(SHIPPED_HELD_OUT, 0.5)})
    assert (found["held_in_N"], found["held_out"], found["worst_task"]) == (1.0, 0.5, 1.0)


def test_the_joint_lora_is_as_it_was_measured(setup):
    assert joint_lora(Labels("mixed", setup, n_examples=1))["held_in_N"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("wanted", [0.1, 1.0, 9.0])
def test_the_best_scale_is_found_to_a_quarter_step(wanted):
    scale, n_tried = best_scale(lambda scale: abs(np.log2(scale / wanted)))
    assert abs(np.log2(scale / wanted)) <= 0.125 + 1e-9
    assert n_tried == 16


@dataclass(frozen=True, eq=False)
class TowardsOneScale(Labels):
    """Loses by how far weights are from the base plus WANTED_SCALE times all updates."""

    def losses(self, weights):
        names = self.setup.parts.groups.names
        wanted = self.weights(np.full((len(names), len(self.setup.parts.names)), WANTED_SCALE))
        return np.array([sum(float((weights[name] - wanted[name]).norm()) for name in wanted)])

    def measure(self, weights):
        return {"measured": self.losses(weights).item()}


def test_the_tuned_scale_is_of_the_methods_own_update(setup, tmp_path):
    labels = TowardsOneScale("mixed", setup, n_examples=1)
    before = {name: parameter.clone() for name, parameter in setup.parts.model.named_parameters()}
    found = tune_scale(labels, "task_arithmetic", 0, tmp_path)
    assert found["scale"] == WANTED_SCALE
    assert found["measured"] == pytest.approx(0, abs=1e-3)
    for name, parameter in setup.parts.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_method_without_an_update_has_no_scale(setup, tmp_path):
    with pytest.raises(
        ValueError, match=r"my_merge has no update to scale; those that do: .*task_arithmetic"
    ):
        tune_scale(Labels("mixed", setup, 1), "my_merge", 0, tmp_path)


def test_blocks_of_labels_are_losses_a_task():
    evaluator = LabelEvaluator(lambda table: table.sum(axis=0))
    coefficients = np.arange(12.0).reshape(2, 3, 2)
    scored = evaluator.score_blocks(coefficients, [0])
    losses, per_task = evaluator.combine(scored.sums, scored.counts)
    np.testing.assert_array_equal(per_task, coefficients.sum(axis=1))
    np.testing.assert_array_equal(losses, per_task.mean(axis=1))


def test_the_search_goes_where_losses_are_low(setup, tmp_path):
    target = one_hot(setup, "tool")

    def losses_of(table):
        return ((table - target) ** 2).mean(axis=0)

    table, spent = search_labels(setup, losses_of, tmp_path / "trace.jsonl")
    assert spent == {"evaluations": 160, "ended_by": "evaluations"}
    assert losses_of(table).mean() < losses_of(setup.first.start).mean()


def test_every_scalable_method_is_planned_and_chance_runs_once_a_seed():
    planned = [(name, seed) for name, seed, _ in plan_rows([0, 1])]
    assert {name for name, _ in planned} == {JOINT, SINGLE, ORACLE, *(m + SCALED for m in scalable_methods())}
    assert [seed for name, seed in planned if name == f"dare{SCALED}"] == [0, 1]
    assert [seed for name, seed in planned if name == f"ties{SCALED}"] == [0]
    assert not {"cat", "uniform_average", "my_merge"} & set(scalable_methods())
