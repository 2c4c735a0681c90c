"""Updates folded into the base: dense updates, scale and rounding, what is written, what is refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_merging.merging import UniformAverage
from llm_merging.merging.updates import UpdateMerge, dense_updates
from search.adapters import load_adapter
from search.config import load_config
from search.errors import InputError
from search.files import sha256_file
from search.merge import fold_updates, touched_modules
from search.provenance import library_versions
from tests.test_base import make_toy_model
from tests.test_merges import save_toy_zoo
from tests.toys import ARCHITECTURES, make_model


class Checkerboard(UpdateMerge):
    """An update that shows where it went: entry (i, j) is i - j, halved."""

    scale = 0.25

    def settings(self):
        return {"colour": "black"}

    def merge_module(self, adapters, module):
        d_out, d_in = dense_updates(adapters, module)[0].shape
        return (torch.arange(d_out)[:, None] - torch.arange(d_in)) / 2


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


def merged(zoo, output, *settings):
    method = Checkerboard("checkerboard", load_config(zoo, ["device=cpu", *settings]))
    method.output = output
    method.merge()
    return method


def test_dense_updates_are_each_adapters_own_in_order(toy_adapters):
    adapters = toy_adapters("llama")
    for module in touched_modules(adapters):
        updates = dense_updates(adapters, module)
        assert len(updates) == len(adapters)
        for adapter, update in zip(adapters, updates, strict=True):
            assert update.dtype == torch.float64
            f = adapter.modules.get(module)
            expected = f.scaling * f.B @ f.A if f else torch.zeros_like(update)
            torch.testing.assert_close(update, expected)


def test_a_module_that_no_adapter_has_is_a_mistake_of_the_caller(toy_adapters):
    with pytest.raises(ValueError, match="no adapter has 'lm_head'"):
        dense_updates(toy_adapters("llama"), "lm_head")


def test_the_base_gets_scale_times_the_update_and_nothing_else_changes(zoo, tmp_path):
    method = merged(zoo, tmp_path)
    before, after = make_toy_model().state_dict(), method.base_model.state_dict()
    adapters = [load_adapter(a.source) for a in method.config.adapters]
    touched = {f"{module}.weight" for module in touched_modules(adapters)}
    assert touched
    assert touched < before.keys()
    for name, weight in before.items():
        d_out, d_in = weight.shape if weight.ndim == 2 else (1, 1)
        update = (torch.arange(d_out)[:, None] - torch.arange(d_in)) / 8
        torch.testing.assert_close(after[name], weight + update if name in touched else weight)
    method.save_model(tmp_path)
    written = load_file(tmp_path / "safetensor.pt")
    assert written.keys() == touched
    torch.testing.assert_close(written, {name: after[name] for name in touched})


def test_an_instance_has_its_own_scale(zoo, tmp_path):
    method = Checkerboard("checkerboard", load_config(zoo, ["device=cpu"]))
    method.output, method.scale = tmp_path, 0.0
    method.merge()
    torch.testing.assert_close(method.base_model.state_dict(), make_toy_model().state_dict())
    assert json.loads((tmp_path / "merge.json").read_text())["scale"] == 0
    assert Checkerboard.scale == 0.25


def test_a_bfloat16_base_is_rounded_once(zoo, tmp_path):
    method = merged(zoo, tmp_path, "base.dtype=bfloat16")
    name = "model.layers.0.self_attn.q_proj.weight"
    before = make_toy_model().state_dict()[name].to(torch.bfloat16)
    update = (torch.arange(16)[:, None] - torch.arange(16)) / 8
    after = method.base_model.state_dict()[name]
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, (before.float() + update).to(torch.bfloat16))


def test_the_record_says_what_went_in(zoo, tmp_path):
    record = json.loads((merged(zoo, tmp_path).output / "merge.json").read_text())
    assert (record["schema"], record["method"], record["scale"]) == (1, "checkerboard", 0.25)
    assert record["settings"] == {"colour": "black"}
    folders = sorted((zoo.parent / "adapters").iterdir())
    assert [a["name"] for a in record["adapters"]] == [folder.name for folder in folders]
    hashes = [sha256_file(folder / "adapter_model.safetensors") for folder in folders]
    assert [a["sha256"] for a in record["adapters"]] == hashes
    assert record["base"]["id"] == record["base"]["name"] == str(zoo.parent / "base")
    assert record["base"]["sha256"]
    assert record["provenance"]["versions"] == library_versions()
    assert record["provenance"]["device"] == "cpu"


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    zoo = save_toy_zoo(tmp_path / "zoo")
    weights = zoo.parent / "adapters/expert-0/adapter_model.safetensors"
    save_file({key: value[:-1] for key, value in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match="expert-0"):
        merged(zoo, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_an_update_adds_it_to_what_the_layer_computes(architecture, toy_adapters):
    model = make_model(architecture)
    name = touched_modules(toy_adapters(architecture))[0]
    update = sum(dense_updates(toy_adapters(architecture), name))
    layer = model.get_submodule(name)
    x = torch.randn(3, update.shape[1], dtype=torch.float64)
    before = layer(x)
    fold_updates(model, [(name, update)])
    torch.testing.assert_close(layer(x), before + x @ update.T)


def test_a_shared_weight_gets_its_own_copy():
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    embeddings = copy.deepcopy(model.model.embed_tokens.weight.data)
    fold_updates(model, [("lm_head", torch.ones_like(embeddings))])
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    assert torch.equal(model.lm_head.weight, embeddings + 1)
    assert not model.config.tie_word_embeddings


def test_a_wide_base_keeps_its_precision_under_a_narrow_update():
    model = make_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    fold_updates(model, [("model.layers.0.self_attn.q_proj", torch.ones(16, 16))])
    assert torch.equal(layer.weight, before + 1)


def test_the_average_of_however_many_is_one_nth_each(zoo):
    assert UniformAverage("uniform_average", load_config(zoo)).scale == 1 / 3
