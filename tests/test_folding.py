"""A merge folded in for a while: the folded model's answers inside, the base bit for bit outside."""

import copy

import numpy as np
import pytest
import torch

from search.adapters import load_adapter
from search.base import load_base
from search.folding import folded
from search.groups import group_modules
from search.merge import fold_adapters
from tests.toys import Recipe, make_model, random_ids, save_adapter

IDS = random_ids(2, 6)
DUMMY, Q_PROJ = "dummy:tiny/q_proj,v_proj/r8#1", "model.layers.0.self_attn.q_proj.weight"


def table_of(groups, adapters):
    return np.random.default_rng(0).normal(size=(len(groups.names), len(adapters)))


def grouped(adapters):
    return group_modules({name for adapter in adapters for name in adapter.modules}, "layer")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inside_it_is_the_folded_model_and_outside_the_base_bit_for_bit(architecture, toy_adapters, dtype):
    model, adapters = make_model(architecture, dtype=dtype), toy_adapters(architecture)
    groups = grouped(adapters)
    before, for_good = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    fold_adapters(for_good, adapters, table_of(groups, adapters), groups)
    with folded(model, adapters, table_of(groups, adapters), groups), torch.no_grad():
        assert torch.equal(model(IDS).logits, for_good(IDS).logits)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_an_error_inside_restores_too_and_the_weights_are_the_same_objects(toy_adapters):
    model, adapters = make_model("llama"), toy_adapters("llama")
    groups = grouped(adapters)
    own = dict(model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), folded(model, adapters, table_of(groups, adapters), groups):
        raise ZeroDivisionError
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:fan_in_fan_out")
def test_a_tied_output_layer_is_tied_again(tmp_path):
    model = make_model("gpt2")
    adapters = [load_adapter(str(save_adapter(model, tmp_path / "head", Recipe(targets=("lm_head",)))))]
    with folded(model, adapters, [[1.0]], grouped(adapters)):
        assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings


def test_coefficients_that_are_refused_leave_the_model_alone(toy_adapters):
    model, adapters = make_model("llama"), toy_adapters("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="coefficients"), folded(model, adapters, [[1.0]], grouped(adapters)):
        pass
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.gpu
def test_on_a_gpu_no_second_copy_is_held_and_the_base_comes_back():
    model, adapters = load_base("dummy:tiny", device="cuda").model, [load_adapter(DUMMY)]
    groups = grouped(adapters)
    before = {name: weight.cpu() for name, weight in model.state_dict().items()}
    with folded(model, adapters, table_of(groups, adapters), groups):
        pass  # libraries take their workspace at the first product
    held = torch.cuda.memory_allocated()
    with folded(model, adapters, table_of(groups, adapters), groups):
        assert torch.cuda.memory_allocated() <= held + 2**20
        assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight.cpu(), before[Q_PROJ])
    assert all(torch.equal(weight.cpu(), before[name]) for name, weight in model.state_dict().items())
