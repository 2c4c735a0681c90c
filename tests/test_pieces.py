"""Pieces of an operator: together its own merge, in the adapters' places, weighed by the method's search."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.pieces import (
    ALONE,
    OPERATORS,
    make_pieces,
    measure_permuted,
    measure_pieces,
    run_once,
    weigh_adapters,
    weigh_pieces,
)
from benchmarks.quality_tables import SHARES
from llm_merging.merging import METHODS
from search import run_search
from search.config import load_config
from search.resume import Record
from search.setup import load_setup
from search.stack import delta_weight
from search.trace import TraceWriter
from tests.test_merges import save_toy_zoo

QUICK = (
    *("device=cpu", "search.seed=3", "search.max_evaluations=15", "search.n_candidates=5"),
    *("prompts.per_adapter=3", "prompts.unseen_per_adapter=2", "prompts.max_new_tokens=8"),
)
LONG_S = 1e6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(save_toy_zoo(tmp_path_factory.mktemp("zoo")), QUICK)


@pytest.fixture(scope="module")
def setup(config):
    return load_setup(config)


@pytest.fixture
def trace(tmp_path):
    with TraceWriter(tmp_path / "trace.jsonl") as writer:
        writer.header({})
        yield writer


def own_updates(operator, config, setup, folder):
    """What `-m` merges, before its scale of 1."""
    method = METHODS[operator](operator, config)
    method.output, method.loaded_base, method.base_model = folder, setup.parts.base, setup.parts.model
    return method.merged_updates(setup.parts.adapters)


@pytest.mark.parametrize("operator", OPERATORS)
def test_all_pieces_together_are_what_the_operator_merges(operator, config, setup, trace, tmp_path):
    prompts, parts = setup.write_prompts(trace, Record()), setup.parts
    pieces = make_pieces(parts, OPERATORS[operator](parts, prompts))
    expected = own_updates(operator, config, setup, tmp_path)
    assert set(pieces.stacked.modules) == set(expected)
    for name, module in pieces.stacked.modules.items():
        together = delta_weight(module, torch.ones(3, dtype=parts.model.dtype))
        torch.testing.assert_close(together.float(), expected[name], rtol=1e-4, atol=1e-5)
    for piece, adapter in zip(pieces.adapters, parts.adapters, strict=True):
        assert (piece.name, set(piece.modules)) == (adapter.name, set(adapter.modules))


@pytest.mark.parametrize("operator", OPERATORS)
def test_pieces_are_held_against_the_adapters_themselves(operator, config, setup, trace, tmp_path):
    prompts = setup.write_prompts(trace, Record())
    weighing = weigh_pieces(setup, operator, prompts, trace)
    (alone,) = [f for f in weighing.steering.references if f.name == ALONE]
    assert (alone.coefficients == 1).all()
    assert (weighing.setup.first.start == 1).all()
    assert (weighing.setup.first.spread == 0.5).all()
    experts = weigh_adapters(setup, prompts, trace).steering
    updates = own_updates(operator, config, setup, tmp_path)
    for of_pieces, of_experts in (
        (weighing.steering.searched, experts.searched),
        (weighing.steering.unseen, experts.unseen),
    ):
        found = of_pieces.score(alone.coefficients[None])
        np.testing.assert_allclose(found.per_expert, of_experts.score_updates(updates).per_expert, rtol=1e-3)


def test_a_weak_adapters_piece_stays_near_one(config, trace):
    weak = config.model_copy(
        update={"objective": config.objective.model_copy(update={"weak_signal_nats": 1e6})}
    )
    setup = load_setup(weak)
    weighing = weigh_pieces(setup, "tsv_m", setup.write_prompts(trace, Record()), trace)
    bounds = weighing.steering.bounds
    assert (bounds.low.tolist(), bounds.high.tolist()) == ([0.9] * 3, [1 / 0.9] * 3)


def test_pieces_are_searched_from_the_operator_and_end_no_worse(config, tmp_path):
    weighing, table, facts = run_once(config, "tsv_m", LONG_S, tmp_path)
    assert (facts["evaluations"], facts["ended_by"]) == (15, "evaluations")
    assert table.shape == weighing.setup.parts.shape == (1, 3)
    (alone,) = weighing.steering.unseen.score(np.ones((1, 1, 3))).losses
    assert facts["loss"] <= round(alone, 4)
    assert list(facts["mean_abs_coefficients"]) == [a.name for a in config.adapters]
    assert facts["search_s"] >= 0
    assert facts["prepare_s"] == round(weighing.prepare_s, 2)


def test_seconds_end_it_too(config, tmp_path):
    _, _, facts = run_once(config, "tsv_m", 1e-3, tmp_path)
    assert (facts["evaluations"], facts["ended_by"]) == (5, "clock")


def test_without_an_operator_the_adapters_are_searched_as_the_method_does(config, tmp_path):
    _, table, facts = run_once(config, None, LONG_S, tmp_path / "ours")
    result = run_search(config, output=tmp_path / "run")
    np.testing.assert_array_equal(table, result.coefficients)
    assert (facts["winner"], facts["loss"]) == (result.winner, round(result.loss, 4))


def fake_accuracy():
    """The first adapter's coefficient is the share of everything."""
    return SimpleNamespace(measure=lambda table: {**dict.fromkeys(SHARES, float(table[0, 0])), "tasks": {}})


def test_permuted_coefficients_give_the_mean_of_those_that_others_have():
    table = np.array([[0.9, 0.2, 0.4]])
    found = measure_permuted(fake_accuracy(), table, n=300, seed=1)
    assert found["held_in_N"] == pytest.approx(0.3, abs=0.02)  # never its own 0.9
    assert (found["most_held_in_N"], found["permutations"]) == (0.4, 300)
    assert found["searched"] == dict.fromkeys(SHARES, 0.9)
    assert measure_permuted(fake_accuracy(), table, n=5, seed=1) == measure_permuted(
        fake_accuracy(), table, n=5, seed=1
    )


def test_weighed_pieces_are_told_beside_the_operator_alone():
    found = measure_pieces(fake_accuracy(), np.array([[0.7, 2.0]]))
    assert (found["held_in_N"], found["alone"]) == (0.7, dict.fromkeys(SHARES, 1.0))
