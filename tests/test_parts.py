"""Assembling base and adapters."""

import json
from dataclasses import replace

import pytest
import torch

from search.base import LoadedBase
from search.errors import InputError
from search.parts import assemble_parts, identify_parts
from search.provenance import cpu_model
from tests.toys import BASE_NAME, make_model


@pytest.fixture
def base(toy_model):
    return LoadedBase(toy_model("llama"), None, BASE_NAME, "c0ffee", "ab" * 32)


def test_adapters_are_stacked_in_the_models_type_and_grouped(base, toy_adapters):
    parts = assemble_parts(base, toy_adapters("llama"), base_name=BASE_NAME, kind="layer")
    assert parts.names == ("expert-0", "expert-1", "expert-2")
    assert parts.shape == (2, 3)
    assert parts.stacked.modules.keys() == parts.groups.group_of.keys()
    assert {module.A.dtype for module in parts.stacked.modules.values()} == {torch.float64}
    narrow = LoadedBase(make_model("llama", dtype=torch.bfloat16), None, BASE_NAME, None, None)
    parts = assemble_parts(narrow, toy_adapters("llama"), base_name=BASE_NAME, kind="model")
    assert parts.shape == (1, 3)
    assert {module.B.dtype for module in parts.stacked.modules.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "layers_per_block", "n_groups"),
    [("model", 4, 1), ("block", 4, 1), ("block", 1, 2), ("layer", 4, 2), ("part", 4, 4), ("module", 4, 14)],
)
def test_modules_are_grouped_as_asked(base, toy_adapters, kind, layers_per_block, n_groups):
    parts = assemble_parts(
        base, toy_adapters("llama"), base_name=BASE_NAME, kind=kind, layers_per_block=layers_per_block
    )
    assert parts.shape == (n_groups, 3)
    assert len(identify_parts(parts)["groups"]) == n_groups


def test_an_adapter_of_another_base_is_refused(base, toy_adapters):
    adapters = toy_adapters("llama")
    stranger = replace(adapters[1], base_name="other/model")
    with pytest.raises(InputError, match=r"adapter 'expert-1'.*made for base 'other/model'"):
        assemble_parts(base, [adapters[0], stranger], base_name=BASE_NAME, kind="layer")


def test_their_identity_is_plain_json(base, toy_adapters):
    adapters = toy_adapters("llama")
    identity = identify_parts(assemble_parts(base, adapters, base_name=BASE_NAME, kind="layer"))
    assert json.loads(json.dumps(identity)) == {
        "base": {"id": BASE_NAME, "revision": "c0ffee", "sha256": "ab" * 32, "text_sha256": None},
        "adapters": [
            {
                "name": a.name,
                "id": a.source,
                "revision": None,
                "sha256": a.sha256,
                "scalings_sha256": identity["adapters"][place]["scalings_sha256"],
            }
            for place, a in enumerate(adapters)
        ],
        "groups": ["layer.0", "layer.1"],
        "device": "cpu",
        "device_name": None,
        "dtype": "float64",
        "cpu": {
            "name": cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }


def test_another_scaling_of_one_module_is_another_identity(base, toy_adapters):
    adapters = toy_adapters("llama")
    module, factors = next(iter(adapters[0].modules.items()))
    scaled = {**adapters[0].modules, module: replace(factors, scaling=factors.scaling * 2)}
    changed = (replace(adapters[0], modules=scaled), *adapters[1:])
    before, after = (
        [row["scalings_sha256"] for row in identify_parts(parts)["adapters"]]
        for parts in (
            assemble_parts(base, experts, base_name=BASE_NAME, kind="layer")
            for experts in (adapters, changed)
        )
    )
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True]
