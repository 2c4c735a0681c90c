"""Populations against PEFT's own forward and against dense merges, on six architectures."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from search.adapters import Adapter, load_adapter
from search.groups import Groups, group_modules
from search.population import MixedLinear, population
from search.stack import StackedFactors, stack_adapters
from tests.toys import (
    Recipe,
    assert_same,
    coefficient_tables,
    load_with_peft,
    make_model,
    random_ids,
    recipes,
    save_adapter,
)

Adapters = Callable[[str], Sequence[Adapter]]
Models = Callable[[str], nn.Module]
Case = tuple[nn.Module, Sequence[Adapter], StackedFactors, Groups]


def make_case(model: nn.Module, adapters: Sequence[Adapter]) -> Case:
    stacked = stack_adapters(adapters, device="cpu", dtype=next(model.parameters()).dtype)
    return model, adapters, stacked, group_modules(stacked.modules, "layer")


@pytest.fixture
def case(architecture: str, toy_model: Models, toy_adapters: Adapters) -> Case:
    return make_case(toy_model(architecture), toy_adapters(architecture))


@pytest.fixture
def llama(toy_model: Models, toy_adapters: Adapters) -> Case:
    return make_case(toy_model("llama"), toy_adapters("llama"))


@pytest.fixture
def padded_case(case: Case) -> Case:
    """As `case`, but these in float32: in float64 masks overflow on padding (GPT-2's in transformers 4)."""
    model, adapters, _, _ = case
    overflows = model.config.model_type in ("gemma2", "gpt2")
    return make_case(copy.deepcopy(model).float(), adapters) if overflows else case


def random_coefficients(case: Case, n_rows: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, len(case[3].names), len(case[1]), generator=gen, dtype=torch.float64)


@torch.no_grad()
def run(case: Case, coefficients: Tensor, ids: Tensor, **inputs: Tensor) -> Tensor:
    model, _, stacked, groups = case
    with population(model, stacked, coefficients, groups):
        return model(ids, **inputs).logits


def merge_densely(case: Case, coefficients: Tensor) -> nn.Module:
    """The slow, obvious way: a copy of the model with sum_i c_i s_i B_i A_i added to each weight."""
    model, adapters, _, groups = case
    merged = copy.deepcopy(model)
    for index, adapter in enumerate(adapters):
        for name, f in adapter.modules.items():
            delta = coefficients[groups.group_of[name], index] * f.scaling * (f.B @ f.A)
            weight = merged.get_submodule(name).weight
            weight += delta.T if model.config.model_type == "gpt2" else delta  # Conv1D keeps (d_in, d_out)
    return merged


# ---- exactness


def test_a_one_hot_row_is_that_adapter_in_peft(case: Case) -> None:
    model, adapters, _, groups = case
    ids = random_ids(len(adapters), 7)
    one_hot = torch.eye(len(adapters), dtype=torch.float64)[:, None, :].expand(-1, len(groups.names), -1)
    together = run(case, one_hot, ids)
    for row, adapter in enumerate(adapters):
        expert = load_with_peft(model, adapter.source)
        assert_same(together[row], expert(ids[row : row + 1]).logits[0])
        assert (together[row] - model(ids[row : row + 1]).logits[0]).abs().max() > 0.1  # it did something


def test_a_zero_row_is_the_base_bit_for_bit_beside_other_rows(case: Case) -> None:
    ids = random_ids(3, 7)
    coefficients = random_coefficients(case, 3)
    coefficients[1] = 0
    assert torch.equal(run(case, coefficients, ids)[1], case[0](ids).logits[1])


def test_a_population_of_zeros_is_the_base_bit_for_bit(case: Case) -> None:
    ids = random_ids(2, 7)
    assert torch.equal(run(case, random_coefficients(case, 2) * 0, ids), case[0](ids).logits)


def test_each_row_is_its_dense_merge(case: Case) -> None:
    ids = random_ids(3, 7)
    coefficients = random_coefficients(case, 3)
    together = run(case, coefficients, ids)
    for row in range(3):
        assert_same(together[row], merge_densely(case, coefficients[row])(ids[row : row + 1]).logits[0])


def test_a_population_of_n_is_n_populations_of_one(case: Case) -> None:
    ids = random_ids(4, 7)
    coefficients = random_coefficients(case, 4)
    together = run(case, coefficients, ids)
    for row in range(4):
        assert_same(together[row], run(case, coefficients[row : row + 1], ids[row : row + 1])[0])


@pytest.mark.filterwarnings("ignore:The following")  # PEFT, on patterns that match nothing
@settings(max_examples=25)
@given(data=st.data())
def test_any_adapters_mix_exactly(data: st.DataObject) -> None:
    model = make_model("llama")
    drawn = data.draw(st.lists(recipes(), min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        paths = [save_adapter(model, Path(folder) / str(i), recipe) for i, recipe in enumerate(drawn)]
        case = make_case(model, [load_adapter(str(path)) for path in paths])
        first_in_peft = load_with_peft(model, paths[0])
    coefficients = torch.zeros(3, len(case[3].names), len(drawn), dtype=torch.float64)
    coefficients[0] = data.draw(coefficient_tables(*coefficients.shape[1:]))
    coefficients[1, :, 0] = 1
    ids = random_ids(3, 5)
    together = run(case, coefficients, ids)
    assert_same(together[0], merge_densely(case, coefficients[0])(ids[:1]).logits[0])
    assert_same(together[1], first_in_peft(ids[1:2]).logits[0])
    assert torch.equal(together[2], model(ids).logits[2])


def test_permuting_rows_permutes_the_logits(llama: Case) -> None:
    ids, coefficients = random_ids(5, 6), random_coefficients(llama, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_same(run(llama, coefficients[order], ids[order]), run(llama, coefficients, ids)[order])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(padded_case: Case, side: str) -> None:
    case = padded_case
    coefficients = random_coefficients(case, 2)
    short, long = random_ids(1, 4, seed=1), random_ids(1, 7, seed=2)
    pad, here = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)
    parts, marks = ([pad, short], [pad, here]) if side == "left" else ([short, pad], [here, pad])
    ids = torch.cat([torch.cat(parts, dim=1), long])
    mask = torch.cat([torch.cat(marks, dim=1), torch.ones_like(long)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = run(case, coefficients, ids, attention_mask=mask, position_ids=positions)
    kept = padded[0, 3:] if side == "left" else padded[0, :4]
    atol = 1e-6 if kept.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(kept, run(case, coefficients[:1], short)[0], rtol=0, atol=atol)
    torch.testing.assert_close(padded[1], run(case, coefficients[1:], long)[0], rtol=0, atol=atol)


def test_adapters_that_touch_nothing_leave_the_base(llama: Case) -> None:
    model, ids = llama[0], random_ids(2, 5)
    nothing = StackedFactors({}, ("none",))
    with population(model, nothing, torch.ones(2, len(llama[3].names), 1), llama[3]):
        logits = model(ids).logits
    assert torch.equal(logits, model(ids).logits)


def test_groups_decide_which_layers_move(llama: Case) -> None:
    model, adapters, stacked, _ = llama
    one = group_modules(stacked.modules, "model")
    ids, row = random_ids(1, 6), torch.tensor([0.5, -0.3, 1.2], dtype=torch.float64)
    same_everywhere = run((model, adapters, stacked, one), row[None, None], ids)
    assert_same(same_everywhere, run(llama, row.expand(1, 2, -1), ids))
    only_last = run(llama, torch.stack([row * 0, row])[None], ids)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[1]
    with population(model, stacked, torch.stack([row * 0, row])[None], llama[3]), torch.no_grad():
        assert torch.equal(model(ids, output_hidden_states=True).hidden_states[1], hidden)
    assert (only_last - same_everywhere).abs().max() > 0.01


# ---- as a model: generation, gradients, types


def test_generation_with_cache_gives_each_row_its_own_continuation(padded_case: Case) -> None:
    case = padded_case
    model, _, stacked, groups = case
    coefficients = random_coefficients(case, 3)
    ids = random_ids(3, 5)
    ids[0, :2] = 0  # left padding
    mask = (ids != 0).long()
    limits = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with population(model, stacked, coefficients, groups):
        together = model.generate(ids, attention_mask=mask, use_cache=True, **limits)
    for row in range(3):
        merged = merge_densely(case, coefficients[row])
        prompt = ids[row : row + 1, (2 if row == 0 else 0) :]
        alone = merged.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **limits)
        assert together[row, 5:].tolist() == alone[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"], indirect=False)
def test_gradients_of_the_coefficients_are_right(
    architecture: str, toy_model: Models, toy_adapters: Adapters
) -> None:
    case = make_case(toy_model(architecture), toy_adapters(architecture))
    model, _, stacked, groups = case
    ids = random_ids(2, 4)

    def loss(coefficients: Tensor) -> Tensor:
        with population(model, stacked, coefficients, groups):
            return model(ids).logits.log_softmax(-1)[:, :, 5].sum()

    coefficients = random_coefficients(case, 2).requires_grad_()
    assert torch.autograd.gradcheck(loss, (coefficients,), atol=1e-6)


def test_gradients_flow_at_zero_too(case: Case) -> None:
    model, _, stacked, groups = case
    coefficients = (random_coefficients(case, 2) * 0).requires_grad_()
    with population(model, stacked, coefficients, groups):
        model(random_ids(2, 4)).logits.square().sum().backward()
    assert (coefficients.grad != 0).all()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_lower_precision_stays_close(llama: Case, dtype: torch.dtype, atol: float) -> None:
    coefficients = random_coefficients(llama, 3) * 0.3
    ids = random_ids(3, 6)
    lower = make_case(copy.deepcopy(llama[0]).to(dtype), llama[1])
    logits = run(lower, coefficients, ids)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), run(llama, coefficients, ids), rtol=0, atol=atol)
    zeros = coefficients * torch.tensor([0, 1, 1])[:, None, None]
    assert torch.equal(run(lower, zeros, ids)[0], lower[0](ids).logits[0])


def test_candidates_closer_than_bfloat16_still_differ(llama: Case) -> None:
    lower = make_case(copy.deepcopy(llama[0]).bfloat16(), llama[1])
    ids = random_ids(1, 40)
    near = [run(lower, torch.full((1, 2, 3), c, dtype=torch.float64), ids) for c in (0.3, 0.3005)]
    assert torch.tensor(0.3).bfloat16() == torch.tensor(0.3005).bfloat16()
    assert not torch.equal(*near)


@pytest.mark.gpu
def test_a_gpu_in_bfloat16_stays_close(llama: Case) -> None:
    model, adapters, _, groups = llama
    there = copy.deepcopy(model).to("cuda", torch.bfloat16)
    stacked = stack_adapters(adapters, device="cuda", dtype=torch.bfloat16)
    coefficients, ids = (
        random_coefficients(llama, 3) * 0.3,
        random_ids(3, 6),
    )  # coefficients may stay on the CPU
    logits = run((there, adapters, stacked, groups), coefficients, ids.cuda()).double().cpu()
    torch.testing.assert_close(logits, run(llama, coefficients, ids), rtol=0, atol=0.15)


def test_inference_mode_is_fine(llama: Case) -> None:
    model, _, stacked, groups = llama
    ids, coefficients = random_ids(2, 5), random_coefficients(llama, 2)
    with torch.inference_mode(), population(model, stacked, coefficients, groups):
        logits = model(ids).logits
    assert torch.equal(logits, run(llama, coefficients, ids))


def test_the_output_layer_can_be_adapted(tmp_path: Path, toy_model: Models) -> None:
    model = toy_model("llama")
    path = save_adapter(model, tmp_path / "head", Recipe(targets=("lm_head", "o_proj")))
    case = make_case(model, [load_adapter(str(path))])
    assert case[3].names[-1] == "other"
    ids = random_ids(2, 5)
    one_hot = torch.ones(2, len(case[3].names), 1, dtype=torch.float64)
    assert_same(run(case, one_hot, ids), load_with_peft(model, path)(ids).logits)


# ---- undone, and checked


def wrapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MixedLinear)]


def test_the_model_is_restored_also_after_an_exception(llama: Case) -> None:
    model, _, stacked, groups = llama
    ids = random_ids(2, 5)
    before, modules = model(ids).logits, dict(model.named_modules())
    with population(model, stacked, random_coefficients(llama, 2), groups) as inside:
        assert inside is model
        assert sorted(wrapped(model)) == sorted(stacked.modules)
        assert not torch.equal(model(ids).logits, before)
    assert dict(model.named_modules()) == modules
    with pytest.raises(KeyboardInterrupt), population(model, stacked, random_coefficients(llama, 2), groups):
        raise KeyboardInterrupt
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("scale", [1, 0])
def test_another_number_of_rows_is_an_error_with_both_numbers(llama: Case, scale: int) -> None:
    with pytest.raises(ValueError, match=r"input of shape \(4, 5, 16\), expected .* with n_rows = 2"):
        run(llama, random_coefficients(llama, 2) * scale, random_ids(4, 5))


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (2, 2, 4)])
def test_coefficients_of_another_shape_are_an_error(llama: Case, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(n_rows, n_groups, n_adapters\) = \(n_rows, 2, 3\)"):
        run(llama, torch.zeros(shape, dtype=torch.float64), random_ids(2, 5))


def test_a_module_that_the_model_lacks_is_an_error_and_leaves_the_model(
    llama: Case, toy_model: Models
) -> None:
    _, _, stacked, groups = llama
    other = toy_model("gpt2")
    with pytest.raises(ValueError, match=r"module 'model.layers.0.* is missing in the model"):
        run((other, llama[1], stacked, groups), random_coefficients(llama, 2), random_ids(2, 5))
    assert not wrapped(other)
