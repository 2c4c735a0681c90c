"""Parts as a bundle has them give what the whole parts give."""

import inspect
from collections import Counter

import numpy as np
import pytest
import torch

from search import plain_parts, population
from search.errors import InputError
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import TokenBudget, expert_signals
from search.plain_parts import PlainEvaluator, PlainLinear, PlainPasses, TerseDesk
from search.prompts import _Desk
from tests.test_experts import make_prompts, stack
from tests.toys import make_model

CLASSES = [part for _, part in inspect.getmembers(plain_parts, inspect.isclass) if "plain_parts" in str(part)]


@pytest.mark.parametrize("part", CLASSES)
def test_a_part_has_no_method_that_the_whole_one_lacks(part):
    whole = part.__mro__[1]
    own = {name for name, value in vars(part).items() if inspect.isfunction(value)}
    assert whole is tuple or own <= set(vars(whole)), "in a bundle it would be left out"


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=["folded", "mixed"])
def case(request, toy_adapters):
    """On a CPU float64 is folded, and bfloat16 is not."""
    dtype = request.param
    model, prompts = make_model("llama", dtype=dtype), make_prompts()
    stacked, groups = stack(toy_adapters("llama"), dtype=dtype)
    return model, stacked, groups, prompts, expert_signals(model, stacked, groups, prompts)


@pytest.fixture
def as_bundled(monkeypatch):
    monkeypatch.setattr(plain_parts, "Passes", PlainPasses)
    monkeypatch.setattr(population, "MixedLinear", PlainLinear)


def ask(evaluator, table):
    block = evaluator.score_blocks(table, [0])
    gradient = evaluator.gradient(table[0])
    scored = evaluator.score(table)
    return {
        "base": evaluator.base_per_expert,
        "sums": block.sums,
        "counts": block.counts,
        "n_tokens": block.n_tokens,
        "losses": scored.losses,
        "per_expert": scored.per_expert,
        "agreement": evaluator.agreement(table[0]),
        "loss": gradient.loss,
        "gradient": gradient.gradient,
    }


def test_a_plain_evaluator_scores_as_the_whole_one(case, as_bundled, monkeypatch):
    table = np.random.default_rng(5).normal(0.3, 0.5, (4, len(case[2].names), 3))
    scoring = Scoring(compiled=False, tokens_per_forward=40)
    plain = ask(PlainEvaluator(*case, scoring, TokenBudget(40)), table)
    monkeypatch.undo()
    whole = ask(PopulationEvaluator(*case, scoring), table)
    for name, value in whole.items():
        np.testing.assert_array_equal(plain[name], value, err_msg=name)


def test_a_plain_evaluator_asks_before_each_pass(case, as_bundled):
    plain = PlainEvaluator(*case, Scoring(), None)
    calls = Counter()
    plain.checkpoint = lambda: calls.update(["asked"])
    plain.score(np.zeros((2, len(case[2].names), 3)))
    assert calls["asked"] > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_plain_layer_mixes_as_the_whole_one(architecture, toy_model, toy_adapters, monkeypatch):
    stacked, groups = stack(toy_adapters(architecture))
    table = torch.randn(3, len(groups.names), 3, dtype=torch.float64)
    table[:, 0] = 0
    ids, found = torch.randint(0, 48, (3, 6)), []
    for layer in (population.MixedLinear, PlainLinear):
        monkeypatch.setattr(population, "MixedLinear", layer)
        with torch.no_grad(), population.population(toy_model(architecture), stacked, table, groups) as model:
            found.append(model(ids).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize(("n_kept", "message"), [(0, "other skeletons"), (1, "other skeletons")])
def test_a_terse_desk_refuses_where_the_whole_one_does(n_kept, message):
    for kind in (_Desk, TerseDesk):
        desk = kind(0, "a", (), 4, kept=[None] * n_kept, problems=Counter(blank=3))
        with pytest.raises(InputError, match=r"adapter 'a'.*3"):
            desk.check_enough()
    with pytest.raises(InputError, match=message):
        TerseDesk(0, "a", (), 4, problems=Counter(blank=3)).check_enough()


def test_a_terse_desk_warns_of_a_shortage(caplog):
    TerseDesk(0, "a", (), 4, kept=[None] * 4).check_enough()
    assert not caplog.text
    TerseDesk(0, "a", (), 4, kept=[None] * 3).check_enough()
    assert "3 usable prompts, expected 4; going on" in caplog.text
