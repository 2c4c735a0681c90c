"""The yardstick against the evaluator of the search, and folds against PEFT's own way."""

import numpy as np
import pytest
import torch

from benchmarks.yardstick import DenseFolds, Means, Yardstick
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import expert_signals
from search.objective import OBJECTIVES
from search.population import mixed_weights
from tests.test_experts import make_prompts, stack

ARCHITECTURE = "mistral"


@pytest.fixture(scope="module")
def case(toy_model, toy_adapters):
    stacked, groups = stack(toy_adapters(ARCHITECTURE), "layer")
    prompts = make_prompts()
    model = toy_model(ARCHITECTURE)
    return model, stacked, groups, prompts, expert_signals(model, stacked, groups, prompts)


def random_table(case, seed=0):
    _, stacked, groups, *_ = case
    return np.random.default_rng(seed).normal(0.3, 0.5, (len(groups.names), stacked.n_adapters))


def test_folds_are_those_of_the_search(case):
    model, stacked, groups, *_ = case
    folds, table = DenseFolds(model, stacked, groups), random_table(case)
    found = folds.fold(folds.table(table))
    expected = mixed_weights(model, stacked, torch.tensor(table), groups)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)


@pytest.mark.parametrize("tokens", [1, 10_000])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_means_by_expert_are_the_evaluators_distances(case, objective, tokens):
    model, stacked, groups, prompts, signals = case
    folds, table = DenseFolds(model, stacked, groups), random_table(case)
    values = Yardstick(model, prompts, signals, tokens).measure(
        folds.fold(folds.table(table)), ["nll", objective]
    )
    labels = [e for e, scored in zip(prompts.expert, prompts.scored, strict=True) for _ in scored]
    evaluator = PopulationEvaluator(model, stacked, groups, prompts, signals, Scoring(objective=objective))
    scored = evaluator.score_blocks(table[None], range(evaluator.n_blocks))
    found = Means(labels, prompts.n_experts, model.device)(values)[1]
    np.testing.assert_allclose(found.numpy(), scored.sums[0] / scored.counts, rtol=1e-5, atol=1e-7)


def test_means_are_of_labelled_positions_alone():
    mean = Means([1, -1, 0, 1, 1], 2, torch.device("cpu"))
    values = torch.tensor([[1.0, 50.0, 7.0, 2.0, 6.0], [0.0, torch.nan, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(mean(values), torch.tensor([[7.0, 3.0], [1.0, 0.0]]))


def test_what_is_not_finite_spoils_its_own_label_alone():
    mean = Means([0, 1, 1], 2, torch.device("cpu"))
    found = mean(torch.tensor([[1.0, torch.nan, 2.0]]))[0]
    assert found[0] == 1
    assert found[1].isnan()


def test_a_label_without_a_position_is_refused():
    with pytest.raises(ValueError, match="no mean"):
        Means([0, 0], 2, torch.device("cpu"))
