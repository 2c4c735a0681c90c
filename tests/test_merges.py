"""The kit's base class and the methods: loading, averaging, folding and saving, against PEFT."""

import copy
import os
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, load_peft_weights
from safetensors.torch import load_file

from llm_merging.constants import BASE_MODEL_NAME, BASE_MODEL_REVISION_ID, LIST_MODELS
from llm_merging.merging import METHODS, Merges, MyMerge, UniformAverage
from search.adapters import load_adapter
from search.config import load_config
from search.errors import InputError
from search.groups import group_modules
from search.merge import merge_adapters
from tests.test_base import make_toy_model, save_toy_base
from tests.toys import MIXED, save_adapter

ROOT = Path(__file__).parents[1]
MERGES = import_module("llm_merging.merging.Merges")  # the module; the package's name is the class


def save_toy_zoo(folder: Path) -> Path:
    """Save a base, three adapters of mixed kinds and a configuration that names them; return the latter."""
    base = save_toy_base(folder / "base")
    model = make_toy_model()
    model.config.name_or_path = str(base)
    for index, recipe in enumerate(MIXED):
        save_adapter(model, folder / "adapters" / f"expert-{index}", recipe)
    config = folder / "config.yaml"
    config.write_text(f"base: {base}\nadapters: {folder / 'adapters'}\n")
    return config


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def config(zoo):
    return load_config(zoo, ["device=cpu"])


def averaged_by_peft(zoo: Path) -> torch.nn.Module:
    """The uniform average as PEFT computes it: concatenated ranks, weights 1/n."""
    folders = sorted((zoo.parent / "adapters").iterdir())
    model = PeftModel.from_pretrained(make_toy_model(), folders[0], adapter_name="a0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, f"a{index}")
    deltas = {}
    for index in range(len(folders)):
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and f"a{index}" in module.lora_A:
                deltas[name] = deltas.get(name, 0) + module.get_delta_weight(f"a{index}") / len(folders)
    plain = make_toy_model()
    for name, delta in deltas.items():
        plain.get_submodule(name.removeprefix("base_model.model.")).weight.data += delta
    return plain


IDS = torch.tensor([[1, 5, 9, 30, 12, 41]])


def test_the_constructor_sets_what_the_kit_sets(config):
    method = Merges("mine", config)
    assert method.name == "mine"
    assert [Path(source).name for source, _ in method.list_models] == ["expert-0", "expert-1", "expert-2"]
    assert (method.is_peft, method.max_seq_len, method.max_gen_len) == (True, None, 64)
    assert (method.architecture, method.device) == ("decoder", "cpu")
    for nothing in ("base_model", "tokenizer", "input_tokenizer", "target_tokenizer"):
        assert getattr(method, nothing) is None
    for empty in ("loaded_models", "loaded_configs", "merged_model"):
        assert getattr(method, empty) == {}
    with pytest.raises(NotImplementedError):
        method.merge()


def test_the_kits_own_way_of_writing_a_method_works(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(MERGES, "choose_config", lambda: (zoo, "test"))
    monkeypatch.delenv("HF_AUTH_TOKEN", raising=False)

    class Mine(Merges):
        def __init__(self, name):
            super().__init__(name)

        def merge(self):
            self._load_huggingface_models_and_configs()
            self._load_base_model()
            self._load_tokenizer()
            self.merged_model = self.loaded_models[self.list_models[0][0]]
            self.base_model.eval()

    method = Mine("mine")
    method.merge()
    method.save_model(str(tmp_path))
    assert load_file(tmp_path / "safetensor.pt").keys() == method.merged_model.keys()
    assert method.generate({"input": ["a", "bc"]})[1]
    assert method.predict_multiple_choice({"input": ["a"], "answer_choices": [["b", "c"]]})[0].shape == (1,)


def test_loaded_models_are_pefts_state_dicts(config):
    method = Merges("mine", config)
    method._load_huggingface_models_and_configs()
    for source, _ in method.list_models:
        torch.testing.assert_close(method.loaded_models[source], load_peft_weights(source, device="cpu"))
    assert [c.r for c in method.loaded_configs.values()] == [recipe.rank for recipe in MIXED]


def test_the_kits_token_is_used_when_set_and_never_required(config, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_AUTH_TOKEN", "of-the-kit")
    Merges("mine", config)
    assert os.environ.pop("HF_TOKEN") == "of-the-kit"


def test_the_kits_choice_scoring_leaves_out_each_choices_first_token(config):
    method = UniformAverage("uniform_average", config)
    method._load_base_model()
    method._load_tokenizer()
    batch = {"input": ["abc"], "answer_choices": [["b", "cd"]]}
    full = method.predict_multiple_choice(batch)[1]
    method.skip_first_choice_token = True
    assert (method.predict_multiple_choice(batch)[1] - full).min() > 0  # a negative term less in each sum


def test_uniform_average_equals_pefts_deltas(zoo, config, tmp_path):
    method = UniformAverage("uniform_average", config)
    method.output = tmp_path
    method.merge()
    expected = averaged_by_peft(zoo)(IDS).logits
    assert (expected - make_toy_model()(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(method.base_model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    written = PeftModel.from_pretrained(make_toy_model(), tmp_path / "adapter")
    torch.testing.assert_close(written(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_file(tmp_path / "adapter/adapter_model.safetensors"), method.merged_model)
    assert (tmp_path / "coefficients.json").exists()


def test_my_merge_folds_what_the_search_found(config, tmp_path, monkeypatch):
    asked = {}

    def find(config, *, output, base, reserve_s, measure_later_s):
        asked.update(output=output, reserve_s=reserve_s, model=copy.deepcopy(base.model))
        adapters = [load_adapter(a.source, name=a.name) for a in config.adapters]
        groups = group_modules({m for a in adapters for m in a.modules}, "layer")
        coefficients = torch.linspace(-1, 1, len(groups.names) * 3).reshape(-1, 3).numpy()
        merged = merge_adapters(adapters, coefficients, groups, base_name=config.base.source)
        return SimpleNamespace(
            coefficients=coefficients,
            groups=groups,
            adapters=adapters,
            base=base,
            merged=merged,
            ended_by="clock",
            interrupted=False,
            report="found",
        )

    monkeypatch.setattr(import_module("llm_merging.merging.MyMerge"), "run_search", find)
    method = MyMerge("my_merge", config)
    method.output, method.gone_s = tmp_path, lambda: 7.0
    method.merge()
    assert (asked["output"], asked["reserve_s"]) == (tmp_path, 7.0)
    assert (method.ended_by, method.report) == ("clock", "found")
    method.save_model(tmp_path)
    assert load_file(tmp_path / "safetensor.pt").keys() == method.merged_model.keys()
    assert not torch.equal(method.base_model(IDS).logits, asked["model"](IDS).logits)
    assert not method.base_model.training


def test_saving_needs_a_merge_and_replaces_whole_files(config, tmp_path, monkeypatch):
    method = Merges("mine", config)
    with pytest.raises(RuntimeError, match="merged_model is empty"):
        method.save_model(tmp_path)
    method.merged_model = {"w": torch.arange(6.0).reshape(2, 3).T}
    method.save_model(tmp_path / "new")
    written = load_file(tmp_path / "new/safetensor.pt")
    torch.testing.assert_close(written, method.merged_model)

    def fill_up(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(InputError, match=r"cannot write .*safetensor.pt: No space left on device"):
        method.save_model(tmp_path / "new")
    torch.testing.assert_close(load_file(tmp_path / "new/safetensor.pt"), written)


def test_only_decoders_are_supported(config):
    method = Merges("mine", config)
    method.architecture = "encoder_decoder"
    with pytest.raises(InputError, match="'encoder_decoder' is not supported"):
        method._load_base_model()


@pytest.mark.parametrize(
    ("n_bytes", "name"), [(25_393_692_672, "mistral-7b"), (16 * 10**9, "demo"), (None, "demo")]
)
def test_the_default_configuration_follows_the_card(monkeypatch, n_bytes, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_bytes is not None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=n_bytes)
    )
    path, reason = MERGES.choose_config()
    assert path == ROOT / f"configs/{name}.yaml"
    assert "24 GB" in reason


def test_the_competitions_configuration_names_its_adapters():
    config = load_config(ROOT / "configs/mistral-7b.yaml")
    assert [(a.source, a.revision) for a in config.adapters] == LIST_MODELS
    assert len(LIST_MODELS) == 27
    assert (config.base.source, config.base.revision) == (BASE_MODEL_NAME, BASE_MODEL_REVISION_ID)
    assert config.search.time_box_s < 3600
    assert all(a.about and "unverified" in a.about for a in config.adapters)
    assert config.adapters_missing == "error"
    skeletons = [skeleton for a in config.adapters for skeleton in a.skeletons]
    assert all(1 <= len(a.skeletons) <= 3 for a in config.adapters)
    assert len(set(skeletons)) == len(skeletons)
    for skeleton in skeletons:  # an instruction, headed fields, a cue
        instruction, *fields, cue = skeleton.split("\n\n### ")
        assert instruction.endswith((".", "?"))
        assert "{" not in instruction + cue
        assert cue.endswith(":")
        assert all(re.fullmatch(r"[A-Z][\w ]*:\{\w+\}", field) for field in fields)


def test_methods_are_named_as_on_the_command_line():
    assert METHODS["my_merge"] is MyMerge
    assert METHODS["uniform_average"] is UniformAverage
    assert all(issubclass(method, Merges) and method.__doc__ for method in METHODS.values())
    assert len(set(METHODS.values())) == len(METHODS)
    assert len((ROOT / "llm_merging/merging/MyMerge.py").read_text().splitlines()) < 80
