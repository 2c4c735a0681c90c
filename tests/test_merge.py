"""Merged adapters, read back by PEFT, and folded models, against the population that found them."""

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import search.merge
from search.adapters import Adapter, Factors, check_adapter, load_adapter
from search.card import write_card
from search.errors import InputError
from search.groups import Groups, group_modules
from search.merge import (
    MergedAdapter,
    Papers,
    fold_adapters,
    merge_adapters,
    refuse_strangers,
    replace_folder,
    write_adapter,
)
from search.population import population
from search.provenance import library_versions
from search.stack import stack_adapters
from search.versions import dtype_option
from tests.toys import (
    AS_IT_IS,
    BASE_NAME,
    MIXED,
    Recipe,
    assert_same,
    coefficient_tables,
    load_with_peft,
    make_model,
    random_ids,
    recipes,
    save_adapter,
)

IDS = random_ids(2, 6)


@dataclass(frozen=True)
class Case:
    """A model, its adapters and their groups by layer."""

    model: nn.Module
    adapters: Sequence[Adapter]
    groups: Groups

    @torch.no_grad()
    def run(self, coefficients: Tensor) -> Tensor:
        """The logits that the search saw, both rows under the same coefficients (n_groups, n_adapters)."""
        stacked = stack_adapters(self.adapters, device="cpu", dtype=torch.float64)
        with population(self.model, stacked, coefficients.expand(2, -1, -1), self.groups):
            return self.model(IDS).logits

    def merge(self, coefficients: Tensor, dtype: torch.dtype = torch.float64) -> MergedAdapter:
        return merge_adapters(
            self.adapters, coefficients.numpy(), self.groups, base_name=BASE_NAME, dtype=dtype
        )

    def fold(self, coefficients: Tensor) -> nn.Module:
        folded = copy.deepcopy(self.model)
        fold_adapters(folded, self.adapters, coefficients.numpy(), self.groups)
        return folded

    def random_coefficients(self) -> Tensor:
        gen = torch.Generator().manual_seed(0)
        return torch.randn(len(self.groups.names), len(self.adapters), generator=gen, dtype=torch.float64)


def make_case(model: nn.Module, adapters: Sequence[Adapter]) -> Case:
    modules = [name for adapter in adapters for name in adapter.modules]
    return Case(model, adapters, group_modules(modules, "layer"))


Models = Callable[[str], nn.Module]
Adapters = Callable[[str], Sequence[Adapter]]


@pytest.fixture
def case(architecture: str, toy_model: Models, toy_adapters: Adapters) -> Case:
    return make_case(toy_model(architecture), toy_adapters(architecture))


@pytest.fixture
def llama(toy_model: Models, toy_adapters: Adapters) -> Case:
    return make_case(toy_model("llama"), toy_adapters("llama"))


# ---- exactness


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT sets it itself on Conv1D
def test_the_written_adapter_in_peft_gives_the_logits_of_the_search(case: Case, tmp_path: Path) -> None:
    coefficients = case.random_coefficients()
    write_adapter(case.merge(coefficients), tmp_path / "merged")
    assert_same(load_with_peft(case.model, tmp_path / "merged")(IDS).logits, case.run(coefficients))


def test_the_folded_model_gives_the_logits_of_the_search(case: Case) -> None:
    coefficients = case.random_coefficients()
    assert_same(case.fold(coefficients)(IDS).logits, case.run(coefficients))


@pytest.mark.filterwarnings("ignore:The following")  # PEFT, on patterns that match nothing
@settings(max_examples=15)
@given(data=st.data())
def test_any_merge_survives_writing_and_folding(data: st.DataObject) -> None:
    model = make_model("llama")
    drawn = data.draw(st.lists(recipes(), min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [save_adapter(model, folder / str(i), recipe) for i, recipe in enumerate(drawn)]
        case = make_case(model, [load_adapter(str(path)) for path in paths])
        coefficients = data.draw(coefficient_tables(len(case.groups.names), len(drawn)))
        write_adapter(case.merge(coefficients), folder / "merged")
        logits = load_with_peft(model, folder / "merged")(IDS).logits
    expected = case.run(coefficients)
    assert_same(logits, expected)
    assert_same(case.fold(coefficients)(IDS).logits, expected)


def test_a_merge_agrees_with_peft_cat(tmp_path: Path, toy_model: Models) -> None:
    model = toy_model("llama")
    paths = [save_adapter(model, tmp_path / str(i), Recipe(rank=2 + i, alpha=6, seed=i)) for i in range(2)]
    oracle = load_with_peft(model, paths[0])
    oracle.load_adapter(str(paths[1]), "second", **AS_IT_IS)
    oracle.add_weighted_adapter(["default", "second"], [0.7, 0.4], "cat", "cat")
    oracle.set_adapter("cat")
    case = make_case(model, [load_adapter(str(path)) for path in paths])
    coefficients = torch.tensor([[0.7, 0.4]], dtype=torch.float64).expand(
        2, -1
    )  # per layer, the same in both
    torch.testing.assert_close(case.fold(coefficients)(IDS).logits, oracle(IDS).logits, rtol=0, atol=1e-5)


def test_scaling_is_one_for_every_reader(llama: Case, tmp_path: Path) -> None:
    merged = llama.merge(llama.random_coefficients())
    ranks = {
        key.removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in merged.state_dict.items()
        if key.endswith(".lora_A.weight")
    }
    assert len(set(ranks.values())) > 1  # the case has unequal ranks
    assert merged.config["r"] == merged.config["lora_alpha"] == max(ranks.values())
    assert merged.config["rank_pattern"] == merged.config["alpha_pattern"]
    write_adapter(merged, tmp_path / "merged")
    again = load_adapter(str(tmp_path / "merged"))
    assert {f.scaling for f in again.modules.values()} == {1.0}
    check_adapter(again, llama.model, BASE_NAME)


def test_adapters_at_zero_take_no_rank(llama: Case) -> None:
    coefficients = llama.random_coefficients()
    coefficients[0, 1] = 0  # rank 4 on all modules
    coefficients[1] = torch.tensor([0.0, 0.0, 1.0])  # only k_proj, v_proj, down_proj
    state = llama.merge(coefficients).state_dict
    ranks = {
        key.removeprefix("base_model.model.model.layers.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in state.items()
        if "lora_A" in key
    }
    assert ranks == {
        "0.self_attn.q_proj": 2,
        "0.self_attn.k_proj": 1,
        "0.self_attn.v_proj": 2 + 3,
        "0.mlp.down_proj": 3,
        "1.self_attn.k_proj": 1,
        "1.self_attn.v_proj": 3,
        "1.mlp.down_proj": 6,
    }


def test_a_merge_of_zeros_is_the_base_bit_for_bit(llama: Case, tmp_path: Path) -> None:
    zeros = llama.random_coefficients() * 0
    write_adapter(llama.merge(zeros), tmp_path / "merged")
    base = llama.model(IDS).logits
    assert torch.equal(load_with_peft(llama.model, tmp_path / "merged")(IDS).logits, base)
    assert torch.equal(llama.fold(zeros)(IDS).logits, base)


def test_equal_ranks_need_no_patterns(tmp_path: Path, toy_model: Models) -> None:
    path = save_adapter(toy_model("llama"), tmp_path / "x", Recipe(rank=3))
    case = make_case(toy_model("llama"), [load_adapter(str(path))])
    merged = case.merge(torch.ones(2, 1, dtype=torch.float64))
    assert (merged.config["r"], merged.config["rank_pattern"]) == (3, {})


def test_patterns_keep_apart_modules_whose_names_end_alike(tmp_path: Path) -> None:
    modules = {
        name: Factors(torch.ones(rank, 4), torch.ones(5, rank), 0.5)
        for name, rank in (("proj", 3), ("x.proj", 2), ("y.x.proj", 1))
    }
    merged = merge_adapters(
        [Adapter("a", modules, "", None, "", "")],
        [[1.0]],
        Groups(("model",), dict.fromkeys(modules, 0)),
        base_name="b",
    )
    write_adapter(merged, tmp_path / "merged")
    again = load_adapter(str(tmp_path / "merged")).modules
    assert {name: (f.A.shape[0], f.scaling) for name, f in again.items()} == {
        "proj": (3, 1.0),
        "x.proj": (2, 1.0),
        "y.x.proj": (1, 1.0),
    }


# ---- types and weights


def test_products_are_taken_in_float32_and_rounded_once(tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    paths = [save_adapter(model, tmp_path / str(i), recipe) for i, recipe in enumerate(MIXED[:2])]
    case = make_case(model, [load_adapter(str(path)) for path in paths])
    coefficients = case.random_coefficients()
    name, key = (
        "model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    )
    parts = [
        (
            adapter.modules[name].B.float() * (float(c) * adapter.modules[name].scaling),
            adapter.modules[name].A.float(),
        )
        for c, adapter in zip(coefficients[0], case.adapters, strict=True)
    ]
    B, A = torch.cat([B for B, _ in parts], dim=1), torch.cat([A for _, A in parts])
    assert torch.equal(case.merge(coefficients, torch.bfloat16).state_dict[key], B.bfloat16())
    assert torch.equal(case.merge(coefficients, torch.float32).state_dict[key], B)
    weight = model.get_submodule(name).weight
    assert torch.equal(
        case.fold(coefficients).get_submodule(name).weight, (weight.float() + B @ A).bfloat16()
    )


def test_folding_changes_only_touched_weights_and_keeps_them_in_place(llama: Case) -> None:
    folded = copy.deepcopy(llama.model)
    pointers = {name: parameter.data_ptr() for name, parameter in folded.named_parameters()}
    fold_adapters(folded, llama.adapters, llama.random_coefficients().numpy(), llama.groups)
    changed = {
        name.removesuffix(".weight")
        for name, parameter in folded.named_parameters()
        if not torch.equal(parameter, llama.model.get_parameter(name))
    }
    assert changed == set(llama.groups.group_of)
    assert pointers == {name: parameter.data_ptr() for name, parameter in folded.named_parameters()}


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:fan_in_fan_out")
def test_folding_into_a_tied_output_layer_leaves_the_embeddings(tmp_path: Path, toy_model: Models) -> None:
    model = toy_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    path = save_adapter(model, tmp_path / "head", Recipe(targets=("lm_head",)))
    case = make_case(model, [load_adapter(str(path))])
    one = torch.ones(1, 1, dtype=torch.float64)
    folded = case.fold(one)
    assert torch.equal(folded.transformer.wte.weight, model.transformer.wte.weight)
    assert_same(folded(IDS).logits, case.run(one))
    assert not folded.config.tie_word_embeddings
    folded.save_pretrained(tmp_path / "folded")
    again = type(model).from_pretrained(tmp_path / "folded", **dtype_option(torch.float64))
    assert_same(again(IDS).logits, case.run(one))


# ---- files


def test_an_adapter_that_is_there_is_replaced(llama: Case, tmp_path: Path) -> None:
    for factor in (1, 2):
        coefficients = llama.random_coefficients() * factor
        write_adapter(llama.merge(coefficients), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    assert_same(load_with_peft(llama.model, tmp_path / "merged")(IDS).logits, llama.run(coefficients))


def test_a_folder_that_holds_something_else_is_left_alone(llama: Case, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"holds 'thesis.txt', which replacing it would delete"):
        write_adapter(llama.merge(llama.random_coefficients()), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_one_clear_line_and_stays(llama: Case, tmp_path: Path) -> None:
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write .*merged: Not a directory"):
        write_adapter(llama.merge(llama.random_coefficients()), tmp_path / "merged")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing_half_written(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(search.merge, "save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*merged: I/O error: No space left on device"):
        write_adapter(llama.merge(llama.random_coefficients()), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


DOCUMENT = {
    "method": "m",
    "base": {"id": BASE_NAME},
    "adapters": [
        {"name": name, "id": name, "revision": None, "sha256": "ab" * 32, "rank": [2], "scaling": [1.0]}
        for name in ("a", "b")
    ],
    "groups": {"model": ["x"]},
    "coefficients": [[0.1, 0.25]],
    "objective": {},
    "provenance": {"winner": 'archive "1"'},
}
PAPERS = Papers(write_card(DOCUMENT, base_name=BASE_NAME, rank=4), DOCUMENT)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def test_card_and_coefficients_go_with_the_adapter_and_are_replaced_with_it(
    llama: Case, tmp_path: Path
) -> None:
    for _ in range(2):
        write_adapter(llama.merge(llama.random_coefficients()), tmp_path / "merged", PAPERS)
    expected = ["README.md", "adapter_config.json", "adapter_model.safetensors", "coefficients.json"]
    assert names_in(tmp_path / "merged") == expected
    assert names_in(tmp_path) == ["merged"]
    assert json.loads((tmp_path / "merged/coefficients.json").read_text()) == DOCUMENT
    load_with_peft(llama.model, tmp_path / "merged")


@pytest.mark.parametrize("name", ["README.md", "coefficients.json"])
def test_a_file_of_somebody_else_under_a_name_of_ours_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).write_text("years of work")
    with pytest.raises(InputError, match=f"holds '{name}', which replacing it would delete"):
        refuse_strangers(tmp_path)


def test_metadata_names_base_winner_version_and_coefficients(llama: Case, tmp_path: Path) -> None:
    write_adapter(llama.merge(llama.random_coefficients()), tmp_path / "merged", PAPERS)
    assert metadata_of(tmp_path / "merged") == {
        "format": "pt",
        "concord": library_versions()["concord"],
        "base_model": BASE_NAME,
        "winner": 'archive "1"',
        "coefficients_sha256": sha256(b"[[0.1, 0.25]]").hexdigest(),
    }
    write_adapter(llama.merge(llama.random_coefficients()), tmp_path / "plain")
    assert metadata_of(tmp_path / "plain").keys() == {"format", "concord", "base_model"}


def test_equal_merges_are_equal_files(llama: Case, tmp_path: Path) -> None:
    merged = llama.merge(llama.random_coefficients())
    for index in range(8):  # the writer's own order of five keys differs from call to call
        write_adapter(merged, tmp_path / str(index), PAPERS)
    files = {path.read_bytes() for path in tmp_path.glob("*/adapter_model.safetensors")}
    assert len(files) == 1
    written = load_file(tmp_path / "0/adapter_model.safetensors")
    assert all(torch.equal(written[key], merged.state_dict[key]) for key in written)


def test_what_was_there_stays_when_the_new_folder_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/old").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("search.files.os.replace", fail)
    with (
        pytest.raises(InputError, match=r"cannot write .*merged: Input/output error"),
        replace_folder(tmp_path / "merged") as folder,
    ):
        (folder / "new").write_text("new")
    assert names_in(tmp_path) == ["merged"]
    assert names_in(tmp_path / "merged") == ["old"]


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with replace_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("new")
    assert names_in(tmp_path) == ["disk", "link"]
    assert names_in(tmp_path / "disk") == ["new"]


# ---- checked


def test_coefficients_of_another_shape_are_an_error_with_both(llama: Case) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected \(n_groups, n_adapters\) = \(2, 3\)"):
        merge_adapters(llama.adapters, np.ones((3, 2)), llama.groups, base_name=BASE_NAME)


def test_coefficients_that_are_not_finite_are_an_error_before_any_weight_changes(llama: Case) -> None:
    folded = copy.deepcopy(llama.model)
    with pytest.raises(ValueError, match="1 of 6 coefficients are not finite"):
        fold_adapters(folded, llama.adapters, [[1, 1, 1], [1, 1, np.nan]], llama.groups)
    assert torch.equal(folded(IDS).logits, llama.model(IDS).logits)
