"""Losses of candidates against the slow, obvious way: merge the weights, one prompt at a time."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from search.evaluate import PopulationEvaluator, Scoring
from search.experts import expert_signals
from search.objective import COMBINATIONS, OBJECTIVES
from tests.test_experts import logp_alone, make_prompts, stack
from tests.toys import N_VOCAB, make_model


@pytest.fixture(params=["folded", "population"])
def way(request):
    """How candidates are put into the model."""
    return request.param


@pytest.fixture
def make_evaluator(toy_model, toy_adapters):
    def make(architecture="llama", *, way="folded", prompts=None, kind="layer", **scoring):
        stacked, groups = stack(toy_adapters(architecture), kind)
        model = toy_model(architecture)
        prompts = prompts or make_prompts()
        signals = expert_signals(model, stacked, groups, prompts)
        evaluator = PopulationEvaluator(model, stacked, groups, prompts, signals, Scoring(**scoring))
        evaluator._folds = way == "folded"
        return evaluator

    return make


def zeros(evaluator, n_candidates=1):
    return np.zeros((n_candidates, len(evaluator._groups.names), 3))


def random_coefficients(evaluator, n_candidates=4):
    return np.random.default_rng(5).normal(0.3, 0.5, zeros(evaluator, n_candidates).shape)


def merge_densely(model, adapters, groups, coefficients):
    """A copy of the model with every update added to its weights."""
    merged = copy.deepcopy(model)
    for index, adapter in enumerate(adapters):
        for name, f in adapter.modules.items():
            layer = merged.get_submodule(name)
            delta = coefficients[groups.group_of[name]][index] * f.scaling * (f.B.double() @ f.A.double())
            layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta
    return merged


def js(p, q):
    """Jensen-Shannon divergence of rows of log-probabilities, as two KL divergences to the mixture."""
    mixed = ((p.exp() + q.exp()) / 2).log()
    return ((p.exp() * (p - mixed)).sum(-1) + (q.exp() * (q - mixed)).sum(-1)) / 2


def score_slowly(model, adapters, groups, prompts, coefficients):
    """(n_experts,) mean Jensen-Shannon divergence of one merge from each expert."""
    merged = merge_densely(model, adapters, groups, coefficients)
    per_expert = [[] for _ in adapters]
    for prompt, expert in enumerate(prompts.expert):
        one_hot = np.zeros_like(coefficients)
        one_hot[:, expert] = 1
        alone = merge_densely(model, adapters, groups, one_hot)
        divergence = js(logp_alone(merged, prompts, prompt), logp_alone(alone, prompts, prompt))
        per_expert[expert] += divergence.tolist()
    return np.array([np.mean(own) for own in per_expert])


def test_losses_equal_dense_merges_scored_one_prompt_at_a_time(
    architecture, way, toy_model, toy_adapters, make_evaluator
):
    evaluator = make_evaluator(architecture, way=way)
    coefficients = random_coefficients(evaluator, 2)
    scores = evaluator.score(coefficients)
    case = toy_model(architecture), toy_adapters(architecture), evaluator._groups, make_prompts()
    base = score_slowly(*case, zeros(evaluator)[0])
    np.testing.assert_allclose(evaluator.base_per_expert, base, rtol=1e-6)
    for candidate, mixture in enumerate(coefficients):
        per_expert = score_slowly(*case, mixture) / np.maximum(base, 0.02)
        np.testing.assert_allclose(scores.per_expert[candidate], per_expert, rtol=1e-6)
        np.testing.assert_allclose(scores.losses[candidate], np.mean(np.sqrt(per_expert)), rtol=1e-6)
    assert scores.n_tokens == 2 * sum(map(len, make_prompts().ids))
    assert scores.peak_bytes is None


def make_evaluator_in(dtype, toy_adapters, device="cpu"):
    model, prompts = make_model("mistral", dtype=dtype).to(device), make_prompts()
    stacked, groups = stack(toy_adapters("mistral"), dtype=dtype, device=device)
    signals = expert_signals(model, stacked, groups, prompts)
    return PopulationEvaluator(model, stacked, groups, prompts, signals, Scoring())


def test_both_ways_agree_in_float32(toy_adapters):
    evaluator = make_evaluator_in(torch.float32, toy_adapters)
    assert evaluator._folds
    coefficients = random_coefficients(evaluator)
    folded = evaluator.score(coefficients)
    evaluator._folds = False
    np.testing.assert_allclose(evaluator.score(coefficients).losses, folded.losses, rtol=1e-4)


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_losses(toy_adapters):
    here, there = (make_evaluator_in(torch.float32, toy_adapters, device) for device in ("cpu", "cuda"))
    assert not there._folds
    coefficients = random_coefficients(here)
    scores = there.score(coefficients)
    np.testing.assert_allclose(scores.losses, here.score(coefficients).losses, rtol=1e-2)
    np.testing.assert_allclose(there.agreement(coefficients[0]), here.agreement(coefficients[0]))
    assert scores.peak_bytes > 0


def test_half_precision_is_not_folded(toy_adapters):
    evaluator = make_evaluator_in(torch.bfloat16, toy_adapters)
    assert not evaluator._folds
    assert np.isfinite(evaluator.score(random_coefficients(evaluator)).losses).all()


def test_a_folded_candidate_leaves_no_trace_in_the_weights(toy_model, make_evaluator):
    before = {name: tensor.clone() for name, tensor in toy_model("llama").state_dict().items()}
    evaluator = make_evaluator()
    evaluator.score(random_coefficients(evaluator))
    after = toy_model("llama").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_output_layer_tied_to_the_embeddings_is_folded_alone(toy_adapters):
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    stacked, groups = stack(toy_adapters("llama"))
    module = stacked.modules.pop("model.layers.0.self_attn.q_proj")
    B = torch.randn(N_VOCAB, len(module.owner), dtype=torch.float64)
    stacked.modules["lm_head"] = replace(module, B=B)
    groups.group_of["lm_head"] = 0
    prompts = make_prompts()
    signals = expert_signals(model, stacked, groups, prompts)
    evaluator = PopulationEvaluator(model, stacked, groups, prompts, signals, Scoring())
    coefficients = random_coefficients(evaluator)
    folded = evaluator.score(coefficients)
    evaluator._folds = False
    np.testing.assert_allclose(evaluator.score(coefficients).losses, folded.losses)


def test_permuting_candidates_permutes_losses(way, make_evaluator):
    evaluator = make_evaluator(way=way)
    coefficients = random_coefficients(evaluator)
    order = [2, 0, 3, 1]
    together, permuted = evaluator.score(coefficients), evaluator.score(coefficients[order])
    np.testing.assert_allclose(permuted.losses, together.losses[order], rtol=1e-9)
    np.testing.assert_allclose(permuted.per_expert, together.per_expert[order], rtol=1e-9)


def test_a_population_of_n_is_n_populations_of_one(way, make_evaluator):
    evaluator = make_evaluator(way=way)
    coefficients = random_coefficients(evaluator)
    alone = [evaluator.score(coefficients[i : i + 1]).losses[0] for i in range(len(coefficients))]
    np.testing.assert_allclose(evaluator.score(coefficients).losses, alone, rtol=1e-9)


@pytest.mark.parametrize("tokens_per_forward", [1, 13, 40, 10_000])
def test_the_token_budget_does_not_change_losses(way, make_evaluator, tokens_per_forward):
    evaluator = make_evaluator(way=way, tokens_per_forward=tokens_per_forward)
    coefficients = random_coefficients(evaluator)
    reference = make_evaluator(way=way).score(coefficients)
    np.testing.assert_allclose(evaluator.score(coefficients).losses, reference.losses, rtol=1e-9)


def test_running_out_of_memory_halves_the_budget_and_changes_no_loss(
    way, toy_model, make_evaluator, monkeypatch
):
    evaluator = make_evaluator(way=way, tokens_per_forward=60)
    coefficients = random_coefficients(evaluator)
    expected = evaluator.score(coefficients).losses

    def refuse_large(model, args, kwargs):
        if kwargs["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = toy_model("llama").register_forward_pre_hook(refuse_large, with_kwargs=True)
    try:
        losses = evaluator.score(coefficients).losses
    finally:
        handle.remove()
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert evaluator.oom_events[0]["tokens_per_forward"] <= 30
    assert all(event["tokens"] > 40 for event in evaluator.oom_events)


def test_a_candidate_that_overflows_has_a_loss_of_nan_and_the_others_do_not(way, make_evaluator):
    evaluator = make_evaluator(way=way)
    coefficients = random_coefficients(evaluator)
    expected = evaluator.score(coefficients).losses
    coefficients[1] = 1e300
    losses = evaluator.score(coefficients).losses
    assert math.isnan(losses[1])
    np.testing.assert_allclose(np.delete(losses, 1), np.delete(expected, 1), rtol=1e-9)


@pytest.mark.parametrize("kind", ["layer", "model"])
def test_an_expert_does_not_disagree_with_itself(way, make_evaluator, kind):
    evaluator = make_evaluator(way=way, kind=kind)
    one_hot = zeros(evaluator, 3)
    for expert in range(3):
        one_hot[expert, :, expert] = 1
    per_expert = evaluator.score(one_hot).per_expert
    np.testing.assert_allclose(np.diag(per_expert), 0, atol=1e-12)
    assert per_expert[~np.eye(3, dtype=bool)].min() > 1e-3


def test_the_base_is_at_one_for_every_expert(way, make_evaluator):
    evaluator = make_evaluator(way=way, floor_nats=0.0)
    scores = evaluator.score(zeros(evaluator))
    np.testing.assert_allclose(scores.per_expert, 1)
    np.testing.assert_allclose(scores.losses, 1)


def test_the_floor_keeps_a_base_that_agrees_from_blowing_up(make_evaluator):
    evaluator = make_evaluator(floor_nats=10.0)
    scores = evaluator.score(zeros(evaluator))
    np.testing.assert_allclose(scores.per_expert[0], evaluator.base_per_expert / 10)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_every_objective_and_combination_can_be_scored(make_evaluator, objective, combine):
    evaluator = make_evaluator(objective=objective, combine=combine)
    scores = evaluator.score(random_coefficients(evaluator, 2))
    assert scores.losses.shape == (2,)
    assert scores.per_expert.shape == (2, 3)
    assert np.isfinite(scores.losses).all()
    assert scores.losses.dtype == scores.per_expert.dtype == np.float64


def test_agreement_counts_prompts_with_the_experts_top_token_at_every_scored_position(
    way, toy_model, toy_adapters, make_evaluator
):
    prompts = make_prompts(lengths=(9, 4, 12, 7, 5, 10, 6, 8, 11, 5, 5, 7))
    evaluator = make_evaluator(way=way, prompts=prompts)
    mixture = zeros(evaluator)[0] + [0.02, 0.02, 0.95]
    groups, case = evaluator._groups, (toy_model("llama"), toy_adapters("llama"))
    merged = merge_densely(*case, groups, mixture)
    hits = [[], [], []]
    for prompt, expert in enumerate(prompts.expert):
        one_hot = np.zeros_like(mixture)
        one_hot[:, expert] = 1
        alone = merge_densely(*case, groups, one_hot)
        same = logp_alone(merged, prompts, prompt).argmax(-1) == logp_alone(alone, prompts, prompt).argmax(-1)
        hits[expert].append(bool(same.all()))
    expected = [np.mean(own) for own in hits]
    assert evaluator.agreement(mixture).tolist() == expected
    assert 0 < np.mean(expected) < 1


def test_an_expert_agrees_with_itself_throughout(way, make_evaluator):
    evaluator = make_evaluator(way=way)
    one_hot = zeros(evaluator)[0]
    one_hot[:, 2] = 1
    assert evaluator.agreement(one_hot)[2] == 1
