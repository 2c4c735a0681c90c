"""What experts and base say on prompts, against one prompt at a time; memory budgets."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from search.adapters import Adapter
from search.experts import TokenBudget, expert_signals, scored_logp
from search.groups import Groups, group_modules
from search.population import population
from search.prompts import PromptSet
from search.stack import StackedFactors, stack_adapters
from tests.toys import make_model, random_ids

LENGTHS = (9, 4, 12, 7, 5, 10)


def make_prompts(n_experts: int = 3, lengths=LENGTHS) -> PromptSet:
    """Random tokens, experts in turn; the last few positions of each prompt are scored."""
    ids = tuple(tuple(random_ids(1, n, seed=i)[0].tolist()) for i, n in enumerate(lengths))
    return PromptSet(
        ids=ids,
        expert=np.arange(len(ids)) % n_experts,
        scored=tuple(tuple(range(max(0, len(row) - 3 - i % 4), len(row) - 1)) for i, row in enumerate(ids)),
        texts=tuple(str(row) for row in ids),
        from_skeleton=(True,) * len(ids),
        n_experts=n_experts,
    )


def stack(
    adapters: tuple[Adapter, ...],
    kind: str = "layer",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[StackedFactors, Groups]:
    stacked = stack_adapters(adapters, device=device, dtype=dtype)
    return stacked, group_modules(stacked.modules, kind)


def logp_alone(model: nn.Module, prompts: PromptSet, prompt: int) -> torch.Tensor:
    """One prompt, no padding, all positions through the output layer."""
    logits = model(torch.tensor([prompts.ids[prompt]])).logits[0]
    return torch.log_softmax(logits, -1)[list(prompts.scored[prompt])]


def test_scored_positions_are_as_each_prompt_alone_gives(architecture, toy_model):
    model, prompts = toy_model(architecture), make_prompts()
    rows = [2, 0, 4]
    expected = torch.cat([logp_alone(model, prompts, row) for row in rows])
    torch.testing.assert_close(scored_logp(model, prompts, rows), expected)


def test_given_weights_are_used_and_the_models_own_stay(toy_model):
    model, prompts = toy_model("llama"), make_prompts()
    name = "model.layers.0.mlp.up_proj.weight"
    before = scored_logp(model, prompts, [0, 1])
    changed = scored_logp(model, prompts, [0, 1], {name: torch.zeros_like(model.get_parameter(name))})
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(scored_logp(model, prompts, [0, 1]), before)


def test_half_precision_is_widened_before_the_softmax():
    logp = scored_logp(make_model("llama", dtype=torch.bfloat16), make_prompts(), [0])
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(len(logp)))


@pytest.mark.parametrize("tokens_per_forward", [None, 1, 20])
def test_signals_are_each_prompts_own_experts(toy_model, toy_adapters, tokens_per_forward):
    model, prompts = toy_model("llama"), make_prompts()
    stacked, groups = stack(toy_adapters("llama"))
    budget = tokens_per_forward and TokenBudget(tokens_per_forward)
    signals = expert_signals(model, stacked, groups, prompts, budget)
    kl, entropies = [[], [], []], torch.zeros(3, 2, dtype=torch.float64)  # the expert's, the base's
    expected = []
    for prompt, expert in enumerate(prompts.expert):
        one_hot = torch.zeros(1, len(groups.names), 3)
        one_hot[:, :, expert] = 1
        with population(model, stacked, one_hot, groups):
            logp = logp_alone(model, prompts, prompt)
        expected.append(logp)
        base_logp = logp_alone(model, prompts, prompt)
        own = (logp.exp() * (logp - base_logp)).sum(-1)
        kl[expert].append(own.max().item())
        entropies[expert] -= torch.stack([(p.exp() * p).sum() for p in (logp, base_logp)])
    torch.testing.assert_close(signals.logp(torch.arange(len(torch.cat(expected)))), torch.cat(expected))
    np.testing.assert_allclose(signals.peak_kl, [np.mean(own) for own in kl])
    np.testing.assert_allclose(signals.entropy_ratio, entropies[:, 0] / entropies[:, 1])
    assert signals.next_tokens.tolist() == [
        ids[t + 1] for ids, scored in zip(prompts.ids, prompts.scored, strict=True) for t in scored
    ]


def test_an_expert_that_changes_nothing_is_at_distance_zero(toy_model, toy_adapters):
    stacked, groups = stack(toy_adapters("llama"))
    for module in stacked.modules.values():
        module.B[:, module.owner == 1] = 0
    signals = expert_signals(toy_model("llama"), stacked, groups, make_prompts())
    assert signals.peak_kl[1] == 0
    assert min(signals.peak_kl[[0, 2]]) > 1e-4


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_a_budget_covers_every_row_once_longest_first(lengths, tokens_per_forward):
    chunks = []
    TokenBudget(tokens_per_forward).run(lengths, chunks.append)
    order = [row for rows in chunks for row in rows]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    for rows in chunks:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= tokens_per_forward


def test_out_of_memory_halves_the_budget_and_goes_on(caplog):
    done = []

    def step(rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("no memory")
        done.extend(rows)

    budget = TokenBudget(1000)
    budget.run([10] * 14, step)
    assert done == list(range(14))
    assert budget.oom_events == [
        {"tokens": 140, "tokens_per_forward": 70},
        {"tokens": 70, "tokens_per_forward": 35},
    ]
    assert budget.tokens_per_forward == 35
    assert "out of memory at 140 tokens; going on with 70" in caplog.text


def test_one_row_that_does_not_fit_is_an_error():
    def step(rows):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        TokenBudget(1000).run([10, 10], step)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def step(rows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        TokenBudget(1000).run([10, 10], step)
