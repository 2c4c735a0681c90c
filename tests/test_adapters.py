"""Loading adapters: PEFT's numbers, the hub's cache, and one clear line for each thing that is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import search.hub
from search.adapters import Adapter, check_adapter, linear_widths, load_adapter
from search.errors import InputError
from search.files import sha256_file
from tests.toys import BASE_NAME, MIXED, Recipe, make_model, save_adapter

Tensors = dict[str, torch.Tensor]
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(make_model(), tmp_path_factory.mktemp("saved") / "expert", MIXED[0])


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "expert"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def refusal(source: Path | str, **options: Any) -> str:
    """The one line that refuses an adapter, checked to be one line that names it and says what to do."""
    with pytest.raises(InputError) as caught:
        load_adapter(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"adapter {Path(source).name!r} ({source})")
    return message


def test_factors_are_the_ones_that_peft_saved(folder: Path) -> None:
    adapter = load_adapter(str(folder))
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(adapter.modules) == len(stored) / 2
    factors = adapter.modules["model.layers.1.self_attn.v_proj"]
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    assert torch.equal(factors.A, stored[f"{prefix}.lora_A.weight"])
    assert torch.equal(factors.B, stored[f"{prefix}.lora_B.weight"])
    assert factors.A.shape == (2, 16)
    assert factors.scaling == 8 / 2


def test_an_adapter_says_where_it_is_from(folder: Path) -> None:
    adapter = load_adapter(str(folder), revision="v1")
    assert (adapter.name, adapter.source, adapter.revision) == ("expert", str(folder), "v1")
    assert adapter.sha256 == sha256_file(folder / "adapter_model.safetensors")
    assert adapter.base_name == BASE_NAME
    assert load_adapter(str(folder) + "/").name == "expert"
    assert load_adapter(str(folder), name="maths").name == "maths"


def test_scaling_follows_rslora_and_patterns(tmp_path: Path) -> None:
    recipe = Recipe(
        rank=4,
        alpha=6,
        rslora=True,
        targets=("q_proj", "k_proj", "v_proj"),
        rank_pattern={"layers.1.self_attn.k_proj": 2, "q_proj": 3},
        alpha_pattern={"model.layers.0.self_attn.v_proj": 10, "attn.v_proj": 99},
    )
    modules = load_adapter(str(save_adapter(make_model(), tmp_path / "x", recipe))).modules
    scaling = {name.removeprefix("model.layers."): f.scaling for name, f in modules.items()}
    assert scaling == {
        "0.self_attn.q_proj": 6 / math.sqrt(3),
        "1.self_attn.q_proj": 6 / math.sqrt(3),
        "0.self_attn.k_proj": 6 / math.sqrt(4),
        "1.self_attn.k_proj": 6 / math.sqrt(2),
        "0.self_attn.v_proj": 10 / math.sqrt(4),
        "1.self_attn.v_proj": 6 / math.sqrt(4),  # "attn" is no whole component
    }


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'"),
        ({"use_dora": True}, "DoRA (use_dora)"),
        ({"bias": "all"}, "trained biases (bias: 'all')"),
        ({"lora_bias": True}, "a bias on lora_B (lora_bias)"),
        ({"modules_to_save": ["lm_head"]}, "whole trained modules (modules_to_save)"),
        ({"layer_replication": [[0, 2]]}, "replicated layers (layer_replication)"),
        ({"target_parameters": ["mlp.experts"]}, "LoRA on bare parameters (target_parameters)"),
        ({"trainable_token_indices": [3]}, "trained token embeddings (trainable_token_indices)"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA (aLoRA) (alora_invocation_tokens)"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16' changed the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changed the base"),
        ({"r": "two"}, "r is 'two' in adapter_config.json, expected a whole number above 0"),
        ({"r": 0}, "r is 0 in adapter_config.json"),
        ({"lora_alpha": True}, "lora_alpha is True in adapter_config.json, expected a number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan in adapter_config.json"),
        ({"rank_pattern": {"q_proj": 2.5}}, "q_proj is 2.5 in adapter_config.json"),
        ({"alpha_pattern": {"q_proj(": 2}}, "alpha_pattern has 'q_proj(' in adapter_config.json, no regular"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is ['q_proj'] in adapter_config.json"),
        ({"r": 4}, "model.layers.0.self_attn.q_proj has rank 2, its config says 4"),
    ],
)
def test_a_config_that_is_not_plain_lora_is_refused(
    folder: Path, changes: dict[str, Any], found: str
) -> None:
    edit_config(folder, **changes)
    assert found in refusal(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva"])
def test_initialisations_that_leave_the_base_alone_are_accepted(folder: Path, init: bool | str) -> None:
    edit_config(folder, init_lora_weights=init)
    assert load_adapter(str(folder)).modules


def spoil_value(value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[f"{LAYER}.lora_B.weight"].view(-1)[5:6].fill_(value)


def add(key: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"base_model.model.{key}": torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (spoil_value(math.nan), f"{LAYER}.lora_B.weight holds NaN or infinite values"),
        (spoil_value(-math.inf), f"{LAYER}.lora_B.weight holds NaN or infinite values"),
        (
            lambda tensors: tensors.update({f"{LAYER}.lora_A.weight": torch.ones(3, 16)}),
            "lora_A has rank 3 but lora_B has rank 2 (A (3, 16), B (16, 2))",
        ),
        (lambda tensors: tensors.pop(f"{LAYER}.lora_B.weight"), "q_proj has lora_A but no lora_B"),
        (lambda tensors: tensors.pop(f"{LAYER}.lora_A.weight"), "q_proj has lora_B but no lora_A"),
        (
            lambda tensors: tensors.update({f"{LAYER}.lora_A.weight": torch.ones(2, 16, dtype=torch.int64)}),
            "is of type torch.int64, expected a float tensor",
        ),
        (lambda tensors: tensors.clear(), "no LoRA tensors in its weights file"),
        (add("model.embed_tokens.weight", 50, 16), "embeddings of its own (a resized vocabulary)"),
        (add("lm_head.weight", 50, 16), "an output layer of its own (a resized vocabulary)"),
        (add("lm_head.base_layer.weight", 50, 16), "a copy of the base's own layer (save it with PEFT's"),
        (add("model.embed_tokens.lora_embedding_A", 2, 50), "LoRA on an embedding"),
        (add("model.layers.0.mlp.lora_magnitude_vector", 16), "DoRA"),
        (add("model.layers.0.mlp.lora_B.bias", 16), "a bias on lora_B"),
        (add("model.layers.0.hada_w1_a", 2, 2), "unknown tensor 'base_model.model.model.layers.0.hada_w1_a'"),
    ],
)
def test_weights_that_are_not_whole_low_rank_pairs_are_refused(
    folder: Path, change: Callable[[Tensors], Any], found: str
) -> None:
    edit_tensors(folder, change)
    assert found in refusal(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "there is no such folder, and it is no hub id (org/name)" in refusal(tmp_path / "absent")


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json in it" in refusal(folder)


@pytest.mark.parametrize(("text", "found"), [("{,", "not valid JSON"), ("[1]", "no JSON object")])
def test_a_broken_config_is_refused(folder: Path, text: str, found: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    assert found in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_weights_file_is_refused(folder: Path, keep: int) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "adapter_model.safetensors is truncated, a Git LFS pointer or unsafe" in refusal(folder)


def test_a_pickle_is_read_only_when_asked_for(folder: Path) -> None:
    expected = load_adapter(str(folder)).modules
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    assert "no adapter_model.safetensors in it. A pickle" in refusal(folder)
    adapter = load_adapter(str(folder), allow_pickle=True)
    assert adapter.modules.keys() == expected.keys()
    assert all(torch.equal(adapter.modules[name].B, expected[name].B) for name in expected)


class Bomb:
    """Unpickling it would call print."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("boom",)


def test_a_pickle_that_runs_code_is_refused_unrun(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb()}, folder / "adapter_model.bin")
    assert "unsafe" in refusal(folder, allow_pickle=True)
    assert "boom" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], {"x": 3}])
def test_a_pickle_without_tensors_is_refused(folder: Path, content: object) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    assert "tensor" in refusal(folder, allow_pickle=True)


# ---- the base


def test_an_adapter_fits_its_base_whatever_folder_or_case_the_name_has(folder: Path) -> None:
    adapter = load_adapter(str(folder))
    for name in (BASE_NAME, "/mirror/Toy-Base/", "TOY-BASE"):
        check_adapter(adapter, make_model(), name)


def misfit(adapter: Adapter, model: nn.Module, base_name: str = BASE_NAME) -> str:
    with pytest.raises(InputError) as caught:
        check_adapter(adapter, model, base_name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_adapter_for_another_base_is_refused_by_name(folder: Path) -> None:
    message = misfit(load_adapter(str(folder)), make_model(), "mistralai/Mistral-7B-v0.1")
    assert "made for base 'toys/toy-base', but the base is 'mistralai/Mistral-7B-v0.1'" in message
    assert "`base.name`" in message


def test_an_adapter_that_names_no_base_is_checked_by_its_modules_alone(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path=None)
    check_adapter(load_adapter(str(folder)), make_model(), "anything")
    assert "the base has no module 'model.layers.0" in misfit(
        load_adapter(str(folder)), make_model("gpt2"), "anything"
    )


def test_an_adapter_of_another_width_is_refused(folder: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors[f"{LAYER}.lora_A.weight"] = torch.ones(2, 32)

    edit_tensors(folder, widen)
    message = misfit(load_adapter(str(folder)), make_model())
    assert "model.layers.0.self_attn.q_proj is (d_out, d_in) = (16, 32), the base's is (16, 16)" in message


def test_a_target_that_is_no_linear_layer_is_refused(folder: Path) -> None:
    model = make_model()
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    message = misfit(load_adapter(str(folder)), model)
    assert "model.layers.0.self_attn.q_proj is a Identity, expected a Linear or Conv1D layer" in message


def test_conv1d_widths_read_like_linear_ones() -> None:
    attention = make_model("gpt2").transformer.h[0].attn
    assert linear_widths(attention.c_attn) == (48, 16)
    assert linear_widths(nn.Linear(3, 5)) == (5, 3)
    assert linear_widths(nn.Embedding(3, 5)) is None


# ---- the hub

COMMIT = "58d0eedad92a223cd45e94534450066952c6de25"


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local hub cache that holds org/expert at one commit, its main branch."""
    repo = tmp_path / "hub" / "models--org--expert"
    shutil.copytree(saved, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_an_adapter_comes_from_the_hub_cache_with_its_commit(
    hub: Path, saved: Path, revision: str | None
) -> None:
    adapter = load_adapter("org/expert", revision=revision)
    assert (adapter.name, adapter.source, adapter.revision) == ("expert", "org/expert", COMMIT)
    assert adapter.modules.keys() == load_adapter(str(saved)).modules.keys()


def test_a_local_folder_goes_before_the_hub(hub: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.parent.joinpath("org").mkdir()
    folder.rename("org/expert")
    assert load_adapter("org/expert").revision is None


def test_offline_and_not_cached_is_said_with_the_way_out(hub: Path) -> None:
    assert "not or not wholly in the cache" in refusal("org/other")
    assert "at revision 'v9': no such folder, and not or not" in refusal("org/expert", revision="v9")


def test_only_the_adapters_own_files_are_fetched(
    hub: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fake_download(repo: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        calls.append((repo, revision, allow_patterns))
        return str(saved)

    monkeypatch.setattr(search.hub, "snapshot_download", fake_download)
    load_adapter("org/expert", revision="abc")
    load_adapter("org/expert", allow_pickle=True)
    safe = ["adapter_config.json", "adapter_model.safetensors"]
    assert calls == [("org/expert", "abc", safe), ("org/expert", None, [*safe, "adapter_model.bin"])]


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search.hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert "no space left for" in refusal("org/expert")


def test_a_name_that_the_hub_cannot_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert "download failed: Cannot have -- or .. in repo_id" in refusal("org/a--b")
