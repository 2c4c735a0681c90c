"""Random models and adapters have the shapes they are named after, the same numbers each time, and run."""

import json
from pathlib import Path

import pytest
import torch

from search.adapters import check_adapter, load_adapter
from search.base import load_base, load_shapes, load_tokenizer, read_context
from search.config import load_config
from search.dummy import EMBEDDING_DEVIATION, RELATIVE_NORM, make_factors, make_model
from search.errors import InputError
from search.run import run_search

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ADAPTER = "dummy:tiny/q_proj,v_proj/r8#{}"


def test_mistral_7b_has_the_published_shapes_and_number_of_weights():
    model = load_shapes("dummy:mistral-7b")
    assert sum(weight.numel() for weight in model.parameters()) == 7_241_732_096
    assert model.get_submodule("model.layers.31.self_attn.v_proj").weight.shape == (1024, 4096)
    assert model.get_submodule("model.layers.0.mlp.down_proj").weight.shape == (4096, 14336)
    rope = getattr(model.config, "rope_parameters", None) or {"rope_theta": model.config.rope_theta}
    assert rope["rope_theta"] == 10_000
    assert read_context("dummy:mistral-7b") == 32_768


@pytest.mark.parametrize("name", ["dummy-7b", "dummy-7b-all"])
def test_the_shipped_configurations_have_27_adapters_that_fit(name):
    config = load_config(ROOT / f"configs/{name}.yaml")
    assert len({adapter.source for adapter in config.adapters}) == 27
    first = load_adapter(config.adapters[0].source, name="first")
    check_adapter(first, load_shapes(config.base.source), config.base.name)
    rank, n_modules = (8, 2) if name == "dummy-7b" else (16, 7)
    assert len(first.modules) == 32 * n_modules
    assert {factors.A.shape[0] for factors in first.modules.values()} == {rank}


def test_a_source_gives_the_same_numbers_each_time_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    models = [make_model("dummy:tiny", CPU, torch.float32).state_dict() for _ in range(2)]
    drawn = [make_factors(ADAPTER.format(seed)) for seed in (1, 1, 2)]
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    same, again, other = (next(iter(found.factors.values()))[0] for found in drawn)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert drawn[0].sha256 == drawn[1].sha256 != drawn[2].sha256


def test_updates_are_about_a_tenth_of_the_weights():
    model = make_model("dummy:tiny", CPU, torch.float32)
    adapter = load_adapter("dummy:tiny/q_proj,down_proj/r16#5", name="five")
    for name, factors in adapter.modules.items():
        update, weight = factors.scaling * factors.B @ factors.A, model.get_submodule(name).weight.detach()
        assert (update.norm() / weight.norm()).item() == pytest.approx(RELATIVE_NORM, rel=0.15)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)  # in the type asked for, without a wider copy
def test_embeddings_are_loud_enough_that_the_last_token_counts(device):
    model = make_model("dummy:tiny", torch.device(device), torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {weight.device.type for weight in model.parameters()} == {device}
    embeddings = model.get_input_embeddings().weight.float()
    assert embeddings.std().item() == pytest.approx(EMBEDDING_DEVIATION, rel=0.01)


def test_text_survives_the_tokenizer_and_every_id_has_a_text():
    tokenizer = load_tokenizer("dummy:tiny")
    assert len(tokenizer) == 32_000
    text = "What is 12 + 30?\n### Answer: naïve café, 42 {x}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) * 0.8
    pieces = tokenizer.convert_ids_to_tokens(range(3, 32_000))
    assert all(pieces)
    assert len(set(pieces)) == len(pieces)


@pytest.mark.parametrize(
    ("load", "source", "message"),
    [
        (load_base, "dummy:gpt", "base 'dummy:gpt': no such architecture; expected one of dummy:mistral-7b"),
        (load_tokenizer, "dummy:", "base 'dummy:': no such architecture"),
        (make_factors, "dummy:tiny/q_proj", r"expected dummy:ARCHITECTURE/MODULE,MODULE/rRANK#SEED"),
        (make_factors, "dummy:tiny/q_proj/r0#1", r"expected dummy:ARCHITECTURE"),
        (make_factors, "dummy:tiny/q_porj/r8#1", "no module 'q_porj'; known: down_proj, gate_proj"),
        (make_factors, "dummy:tony/q_proj/r8#1", "no such architecture"),
    ],
)
def test_what_there_is_not_is_refused_by_name(load, source, message):
    with pytest.raises(InputError, match=message):
        load(source)


def test_a_search_runs_on_random_weights(tmp_path):
    adapters = [
        {"source": ADAPTER.format(seed), "name": f"random-{seed}", "skeletons": ["### Do:{x}\n### Answer:"]}
        for seed in range(2)
    ]
    path = tmp_path / "tiny.yaml"
    path.write_text(f"base: dummy:tiny\nadapters: {json.dumps(adapters)}\n", encoding="utf-8")
    small = "search.max_evaluations=4", "search.n_candidates=4", "prompts.per_adapter=1", "device=cpu"
    fewer = "prompts.unseen_per_adapter=1", "prompts.max_new_tokens=4", "prompts.max_slot_tokens=4"
    result = run_search(load_config(path, [*small, *fewer]), output=tmp_path / "run")
    assert result.coefficients.shape == (1, 2)
    described = json.loads((tmp_path / "run/coefficients.json").read_text())
    assert described["base"]["id"] == "dummy:tiny"
