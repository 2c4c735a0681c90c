"""Adapters of smaller rank, against the singular values of the dense update."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from search.compress import compress_adapter
from search.errors import InputError
from search.groups import group_modules
from search.merge import MergedAdapter, merge_adapters, pack_adapter, write_adapter
from tests.toys import BASE_NAME, load_with_peft, random_ids


def random_factors(d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=gen, dtype=torch.float64)
    return A, torch.randn(d_out, rank, generator=gen, dtype=torch.float64)


def make_adapter(**modules: tuple[Tensor, Tensor]) -> MergedAdapter:
    return pack_adapter(modules, BASE_NAME, torch.float64)


def dense(merged: MergedAdapter, name: str = "x") -> np.ndarray:
    A, B = merged.modules[name]
    return (B @ A).numpy()


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eckart and Young's, by numpy on the dense matrix."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


sizes = st.integers(1, 9)


@given(d_out=sizes, d_in=sizes, total=sizes, rank=sizes, seed=st.integers(0, 99))
def test_it_is_the_nearest_update_of_its_rank_and_says_how_far(d_out, d_in, total, rank, seed):
    merged = make_adapter(x=random_factors(d_out, d_in, total, seed))
    compressed = compress_adapter(merged, rank)
    before, after = dense(merged), dense(compressed.merged)
    np.testing.assert_allclose(after, nearest(before, rank), rtol=0, atol=1e-10)
    left_out = np.linalg.norm(before - after) / np.linalg.norm(before)
    assert compressed.errors["x"] == pytest.approx(left_out, abs=1e-10)
    assert compressed.relative_error == pytest.approx(left_out, abs=1e-10)
    assert compressed.merged.modules["x"][0].shape[0] <= rank


def test_the_error_of_all_modules_is_that_of_all_updates_together():
    merged = make_adapter(x=random_factors(7, 5, 4), y=random_factors(6, 6, 6, 1), z=random_factors(5, 5, 2))
    compressed = compress_adapter(merged, 3)
    pairs = [(dense(merged, name), dense(compressed.merged, name)) for name in "xyz"]
    lost = sum(np.sum((before - after) ** 2) for before, after in pairs)
    whole = sum(np.sum(before**2) for before, _ in pairs)
    assert compressed.relative_error == pytest.approx(np.sqrt(lost / whole))
    assert compressed.errors["z"] == 0 < compressed.errors["x"]


def test_a_module_that_is_small_already_is_left_as_it_is():
    merged = make_adapter(small=random_factors(8, 8, 3), wide=random_factors(8, 8, 6))
    compressed = compress_adapter(merged, 3)
    for before, after in zip(merged.modules["small"], compressed.merged.modules["small"], strict=True):
        assert torch.equal(before, after)
    assert compressed.merged.config["r"] == compressed.merged.config["lora_alpha"] == 3
    assert compressed.merged.config["rank_pattern"] == {}
    assert compressed.merged.config["base_model_name_or_path"] == BASE_NAME


def test_both_factors_carry_the_root_of_the_singular_values():
    merged = make_adapter(x=random_factors(9, 7, 6))
    A, B = compress_adapter(merged, 4).merged.modules["x"]
    singular = torch.diag(torch.linalg.svdvals(torch.from_numpy(dense(merged)))[:4])
    torch.testing.assert_close(A @ A.T, singular)
    torch.testing.assert_close(B.T @ B, singular)


@given(seed=st.integers(0, 99))
def test_equal_updates_give_equal_factors_however_they_were_written(seed):
    A, B = random_factors(9, 7, 5, seed)
    turn = torch.linalg.qr(random_factors(5, 5, 5, seed + 1)[0])[0]
    one = compress_adapter(make_adapter(x=(A, B)), 3).merged.modules["x"]
    other = compress_adapter(make_adapter(x=(-turn @ A, -B @ turn.T)), 3).merged.modules["x"]
    torch.testing.assert_close(one, other)


def test_what_is_left_where_adapters_cancel_is_not_rounded_away():
    A, B = (matrix.float() for matrix in random_factors(9, 7, 2))
    tiny = torch.full((1, 7), 1e-5), torch.ones(9, 1)
    merged = pack_adapter(
        {"x": (torch.cat([A, A, tiny[0]]), torch.cat([1e3 * B, -1e3 * B, tiny[1]], dim=1))},
        "b",
        torch.float32,
    )
    compressed = compress_adapter(merged, 1, dtype=torch.float64)
    np.testing.assert_allclose(dense(compressed.merged), (tiny[1] @ tiny[0]).numpy(), rtol=1e-4)


def test_the_result_has_the_type_that_was_asked_for_and_is_rounded_once():
    merged = make_adapter(x=random_factors(9, 7, 5), y=random_factors(9, 7, 2))
    wide = compress_adapter(merged, 3).merged.state_dict
    narrow = compress_adapter(merged, 3, dtype=torch.bfloat16).merged.state_dict
    assert all(torch.equal(narrow[key], wide[key].bfloat16()) for key in wide)


def test_an_update_of_zeros_has_no_error():
    merged = make_adapter(x=(torch.zeros(4, 5), torch.zeros(6, 4)))
    compressed = compress_adapter(merged, 2)
    assert (compressed.relative_error, compressed.errors) == (0.0, {"x": 0.0})
    assert compressed.worst == ("x", 0.0)
    assert not dense(compressed.merged).any()


def test_a_rank_below_one_is_one_clear_line():
    with pytest.raises(InputError, match="--rank: found 0, expected a whole number from 1"):
        compress_adapter(make_adapter(x=random_factors(2, 2, 1)), 0)


def test_peft_runs_it_as_the_dense_updates_that_it_stands_for(toy_model, toy_adapters, tmp_path: Path):
    model, adapters = toy_model("llama"), toy_adapters("llama")
    groups = group_modules({module for adapter in adapters for module in adapter.modules}, "model")
    merged = merge_adapters(adapters, [[0.5, -0.7, 1.1]], groups, base_name=BASE_NAME, dtype=torch.float64)
    write_adapter(compress_adapter(merged, 2).merged, tmp_path / "cut")
    with_peft = load_with_peft(model, tmp_path / "cut").merge_and_unload()
    for name in merged.modules:
        weight = with_peft.get_submodule(name).weight - model.get_submodule(name).weight
        np.testing.assert_allclose(weight.numpy(), nearest(dense(merged, name), 2), rtol=0, atol=1e-8)
    assert with_peft(random_ids(1, 4)).logits.isfinite().all()
