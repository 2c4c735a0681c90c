"""Losses of candidates against the slow, obvious way: merge the weights, one prompt at a time."""

import copy
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from search.errors import InputError
from search.evaluate import PopulationEvaluator, Scoring, _assign_blocks
from search.experts import TokenBudget, expert_signals
from search.objective import COMBINATIONS, OBJECTIVES, entropy_excess, smooth_part
from search.stack import delta_weight
from tests.test_experts import logp_alone, make_prompts, stack
from tests.toys import N_VOCAB, make_model


@pytest.fixture(params=["folded", "population"])
def way(request):
    """How candidates are put into the model."""
    return request.param


@pytest.fixture
def make_evaluator(toy_model, toy_adapters):
    def make(architecture="llama", *, way="folded", prompts=None, kind="layer", budget=None, **scoring):
        stacked, groups = stack(toy_adapters(architecture), kind)
        model = toy_model(architecture)
        prompts = prompts or make_prompts()
        signals = expert_signals(model, stacked, groups, prompts)
        chosen = Scoring(**{"objective": "entropy_excess"} | scoring)
        evaluator = PopulationEvaluator(model, stacked, groups, prompts, signals, chosen, budget)
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
    smooth = Scoring(objective="entropy_excess")  # the most likely token may differ by a rounding
    return PopulationEvaluator(model, stacked, groups, prompts, signals, smooth)


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
    gradients = [evaluator.gradient(coefficients[0]).gradient for evaluator in (there, here)]
    np.testing.assert_allclose(*gradients, rtol=1e-2, atol=1e-3)
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


def test_updates_are_scored_like_the_coefficients_that_they_come_from(architecture, make_evaluator):
    evaluator = make_evaluator(architecture)
    coefficients = random_coefficients(evaluator, 1)
    updates = {
        name: delta_weight(module, torch.tensor(coefficients[0, evaluator._groups.group_of[name]]))
        for name, module in evaluator._stacked.modules.items()
    }
    found, expected = evaluator.score_updates(updates), evaluator.score(coefficients)
    np.testing.assert_array_equal(found.losses, expected.losses)
    np.testing.assert_array_equal(found.per_expert, expected.per_expert)
    assert (found.n_tokens, found.peak_bytes) == (expected.n_tokens, expected.peak_bytes)


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


@contextmanager
def memory_for(model, n_tokens):
    """Within it, a forward pass of more tokens, padding included, runs out of memory."""

    def refuse_large(model, args, kwargs):
        if kwargs["input_ids"].numel() > n_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(refuse_large, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_running_out_of_memory_halves_the_budget_and_changes_no_loss(way, toy_model, make_evaluator):
    evaluator = make_evaluator(way=way, tokens_per_forward=60)
    coefficients = random_coefficients(evaluator)
    expected = evaluator.score(coefficients).losses
    with memory_for(toy_model("llama"), 40):
        losses = evaluator.score(coefficients).losses
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert evaluator.oom_events[0]["tokens_per_forward"] <= 30
    assert all(event["tokens"] > 40 for event in evaluator.oom_events)


def test_what_fits_is_learnt_once_by_all_who_share_a_budget(toy_model, toy_adapters):
    (stacked, groups), prompts = stack(toy_adapters("llama")), make_prompts()
    case, budget = (toy_model("llama"), stacked, groups), TokenBudget(60)
    with memory_for(toy_model("llama"), 40):
        signals = expert_signals(*case, prompts, budget)
        n_events = len(budget.oom_events)
        evaluator = PopulationEvaluator(*case, prompts, signals, Scoring(), budget)
        evaluator._folds = False
        evaluator.score(random_coefficients(evaluator))
    assert n_events == 1
    assert evaluator.oom_events is budget.oom_events
    assert len(budget.oom_events) == 1
    assert budget.tokens_per_forward <= 30


def test_one_prompt_that_does_not_fit_is_an_error(way, toy_model, make_evaluator):
    evaluator = make_evaluator(way=way)
    with memory_for(toy_model("llama"), 11), pytest.raises(torch.OutOfMemoryError):  # the longest has 12
        evaluator.score(random_coefficients(evaluator))
    with memory_for(toy_model("llama"), 11), pytest.raises(torch.OutOfMemoryError):
        evaluator.gradient(random_coefficients(evaluator)[0])


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


@given(st.lists(st.integers(0, 2), max_size=12), st.permutations([0, 1, 2]))
def test_every_expert_has_a_prompt_in_every_block_and_in_turn(more, once_each):
    prompts = replace(make_prompts(), expert=np.array([*once_each, *more]), ids=((1, 2),) * (3 + len(more)))
    block_of, n_blocks = _assign_blocks(prompts)
    assert n_blocks == min(np.bincount(prompts.expert))
    for expert in range(3):
        own = block_of[prompts.expert == expert].tolist()
        assert own == [j % n_blocks for j in range(len(own))]
        assert set(own) == set(range(n_blocks))


def test_an_expert_without_prompts_is_refused():
    with pytest.raises(ValueError, match=r"are \[2, 1, 0\], expected at least one for each of 3"):
        _assign_blocks(make_prompts().select([0, 1, 3]))


UNEVEN = (9, 4, 12, 7, 5, 10, 6, 8, 11, 5, 7)  # the third expert has one prompt less: three blocks


def test_blocks_scored_one_after_the_other_add_up_to_all_at_once(way, make_evaluator):
    evaluator = make_evaluator(way=way, prompts=make_prompts(lengths=UNEVEN))
    coefficients = random_coefficients(evaluator)
    whole = evaluator.score(coefficients)
    assert evaluator.n_blocks == 3
    parts = [evaluator.score_blocks(coefficients, blocks) for blocks in ([2], [0, 1])]
    sums, counts = sum(part.sums for part in parts), sum(part.counts for part in parts)
    losses, per_expert = evaluator.combine(sums, counts)
    np.testing.assert_allclose(losses, whole.losses, rtol=1e-9)
    np.testing.assert_allclose(per_expert, whole.per_expert, rtol=1e-9)
    assert sum(part.n_tokens for part in parts) == whole.n_tokens == 4 * sum(UNEVEN)
    assert sorted(np.concatenate([part.prompts for part in parts])) == list(range(len(UNEVEN)))
    assert all((part.counts > 0).all() for part in parts)


def test_a_block_is_scored_as_its_prompts_alone_and_divided_by_the_base_on_all(way, make_evaluator):
    prompts = make_prompts(lengths=UNEVEN)
    evaluator = make_evaluator(way=way, prompts=prompts)
    coefficients = random_coefficients(evaluator)
    block = evaluator.score_blocks(coefficients, [1])
    assert block.prompts.tolist() == [3, 4, 5]
    alone = make_evaluator(way=way, prompts=prompts.select([3, 4, 5])).score_blocks(coefficients, [0])
    np.testing.assert_allclose(block.sums, alone.sums, rtol=1e-9)
    n_scored = np.array([len(prompts.scored[prompt]) for prompt in (3, 4, 5)])
    assert block.counts.tolist() == n_scored.tolist()
    np.testing.assert_allclose(block.prompt_means, block.sums / n_scored, rtol=1e-12)  # one prompt an expert
    _, per_expert = evaluator.combine(block.sums, block.counts)
    base = np.maximum(evaluator.base_per_expert, 0.02)
    np.testing.assert_allclose(per_expert, block.sums / n_scored / base, rtol=1e-12)


def test_a_user_s_own_objective_is_scored_like_a_shipped_one(way, make_evaluator):
    own = make_evaluator(way=way, objective=lambda merged, expert, tokens: entropy_excess(merged, expert))
    coefficients = random_coefficients(own)
    shipped = make_evaluator(way=way).score(coefficients)
    assert np.array_equal(own.score(coefficients).losses, shipped.losses)
    np.testing.assert_allclose(own.base_per_expert, make_evaluator().base_per_expert, rtol=1e-9)


def test_a_user_s_objective_that_sums_over_positions_is_refused_at_once(make_evaluator):
    with pytest.raises(InputError, match=r"objective.name: .*<lambda> returned torch.float64 \(\), expected"):
        make_evaluator(objective=lambda merged, expert, tokens: entropy_excess(merged, expert).sum())


class AbandonError(Exception):
    """What a checkpoint raises."""


def abandon_at(k, evaluator, work):
    """Raise at the k-th checkpoint of `work`; return whether it got that far."""
    calls = iter(range(k))

    def count_down():
        if next(calls, None) is None:
            raise AbandonError

    evaluator.checkpoint = count_down
    try:
        work()
    except AbandonError:
        return True
    finally:
        evaluator.checkpoint = lambda: None
    return False


@pytest.mark.parametrize("task", ["score", "gradient"])
def test_work_abandoned_at_any_checkpoint_leaves_everything_as_it_was(way, task, toy_model, make_evaluator):
    model = toy_model("llama")
    evaluator = make_evaluator(way=way, tokens_per_forward=30)
    coefficients = random_coefficients(evaluator, 2)
    works = {
        "score": lambda: evaluator.score(coefficients),
        "gradient": lambda: evaluator.gradient(coefficients[0]),
    }
    modules = list(model.modules())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses, gradient = evaluator.score(coefficients).losses, evaluator.gradient(coefficients[0]).gradient
    k = 0
    while abandon_at(k, evaluator, works[task]):
        assert list(model.modules()) == modules  # nothing is left wrapped
        assert np.array_equal(evaluator.score(coefficients).losses, losses)
        k += 1
    n_forwards = []
    handle = model.register_forward_pre_hook(lambda *_: n_forwards.append(1))
    works[task]()
    handle.remove()
    assert k >= len(n_forwards) > 2
    assert np.array_equal(evaluator.gradient(coefficients[0]).gradient, gradient)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


DIFFERENTIABLE = [name for name in OBJECTIVES if name != "top1_disagreement"]


def finite_differences(evaluator, coefficients, step=1e-5):
    """(n_groups, n_adapters) central differences of the loss, by the path that scores candidates."""
    nudges = step * np.eye(coefficients.size).reshape(-1, *coefficients.shape)
    losses = evaluator.score(np.concatenate([coefficients + nudges, coefficients - nudges])).losses
    return ((losses[: len(nudges)] - losses[len(nudges) :]) / (2 * step)).reshape(coefficients.shape)


@pytest.mark.parametrize("objective", DIFFERENTIABLE)
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_the_gradient_is_that_of_finite_differences(make_evaluator, objective, combine):
    evaluator = make_evaluator("gpt2", objective=smooth_part(objective), combine=combine)  # in float64
    coefficients = random_coefficients(evaluator)[1]
    scores = make_evaluator("gpt2", objective=objective, combine=combine).gradient(coefficients)
    expected = finite_differences(evaluator, coefficients)
    np.testing.assert_allclose(scores.gradient, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())
    scored = evaluator.score(coefficients[None])
    np.testing.assert_allclose(scores.loss, scored.losses[0], rtol=1e-9)
    np.testing.assert_allclose(scores.per_expert, scored.per_expert[0], rtol=1e-9)
    assert scores.n_tokens == sum(map(len, make_prompts().ids))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma2", "gpt_neox"])
def test_gradients_flow_through_every_architecture(make_evaluator, architecture):
    evaluator = make_evaluator(architecture, kind="model")
    coefficients = random_coefficients(evaluator)[1]
    expected = finite_differences(evaluator, coefficients, step=3e-4)  # wide: norms are in float32
    np.testing.assert_allclose(evaluator.gradient(coefficients).gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens_per_forward", [1, 13, 40])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_a_gradient_in_parts_is_the_whole_one(way, make_evaluator, combine, tokens_per_forward):
    whole = make_evaluator("gpt2", combine=combine)
    parts = make_evaluator("gpt2", way=way, combine=combine, tokens_per_forward=tokens_per_forward)
    coefficients = random_coefficients(whole)[0]
    expected, found = whole.gradient(coefficients), parts.gradient(coefficients)
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-9)
    np.testing.assert_allclose(found.per_expert, expected.per_expert, rtol=1e-9)
    assert found.n_tokens == 2 * expected.n_tokens


def test_a_graph_that_does_not_fit_is_halved_and_the_scores_budget_is_not(way, toy_model, make_evaluator):
    evaluator = make_evaluator("gpt2", way=way, tokens_per_forward=1000)
    coefficients = random_coefficients(evaluator)[0]
    expected = evaluator.gradient(coefficients).gradient
    grad = torch.autograd.grad

    def refuse_large(outputs, *args, **kwargs):
        if outputs.grad_fn.name().startswith("IndexAdd") and len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grad(outputs, *args, **kwargs)

    rows = []
    sums_with_graph = evaluator._sums_with_graph

    def note_rows(objective, mixture, prompts):
        rows[:] = prompts
        return sums_with_graph(objective, mixture, prompts)

    evaluator._sums_with_graph = note_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", refuse_large)
        found = evaluator.gradient(coefficients).gradient
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
    assert evaluator.oom_events[0] == {"tokens": 72, "tokens_per_forward": 36}
    assert evaluator._budget.tokens_per_forward == 1000


def test_the_gradient_is_finite_and_tells_to_stay_where_the_merge_is_an_expert(make_evaluator):
    evaluator = make_evaluator("gpt2")
    one_hot = zeros(evaluator)[0]
    one_hot[:, 1] = 1
    scores = evaluator.gradient(one_hot)
    assert scores.per_expert[1] < 1e-15
    assert np.isfinite(scores.gradient).all()
    others = make_evaluator("gpt2", combine="mean").gradient(one_hot).gradient
    assert np.abs(scores.gradient).max() < 100 * np.abs(others).max()


@pytest.mark.parametrize(
    ("objective", "name"),
    [("top1_disagreement", "top1_disagreement"), (lambda m, e, t: e[:, 0].abs(), "<lambda>")],
)
def test_an_objective_without_a_gradient_says_so(make_evaluator, objective, name):
    evaluator = make_evaluator(objective=objective)
    with pytest.raises(InputError, match=rf"objective.name: .*{name} has no gradient, .*choose another"):
        evaluator.gradient(zeros(evaluator)[0])


def test_gradients_leave_nothing_behind_and_can_be_taken_without_grad_mode(toy_model, make_evaluator):
    evaluator, model = make_evaluator(), toy_model("llama")
    coefficients = random_coefficients(evaluator)[0]
    before = coefficients.copy()
    with torch.no_grad():
        evaluator.gradient(coefficients)
    assert np.array_equal(coefficients, before)
    tensors = [*model.parameters(), *model.buffers(), evaluator._signals.logits]
    tensors += [tensor for module in evaluator._stacked.modules.values() for tensor in (module.A, module.B)]
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)
    assert all(tensor.grad is None and tensor.grad_fn is None for tensor in tensors)


def test_gradients_flow_through_what_a_model_kept_from_being_scored(toy_adapters):
    model, (stacked, groups), prompts = make_model("gpt2"), stack(toy_adapters("gpt2")), make_prompts()
    evaluator = PopulationEvaluator(
        model, stacked, groups, prompts, expert_signals(model, stacked, groups, prompts), Scoring()
    )
    kept = []

    def scale(layer, inputs, output):
        kept.append(2 * layer.weight)
        return output * kept[0]

    model.transformer.ln_f.register_forward_hook(scale)
    coefficients = random_coefficients(evaluator)[0]
    evaluator.score(coefficients[None])
    assert np.isfinite(evaluator.gradient(coefficients).gradient).all()


def test_half_precision_has_a_gradient_close_to_that_of_single(toy_adapters):
    half, single = (make_evaluator_in(dtype, toy_adapters) for dtype in (torch.bfloat16, torch.float32))
    coefficients = random_coefficients(single)[0]
    expected, found = single.gradient(coefficients).gradient, half.gradient(coefficients).gradient
    cosine = (expected * found).sum() / np.linalg.norm(expected) / np.linalg.norm(found)
    assert 0.95 < cosine < 1
