"""What a run writes beside its trace."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from search import delivery
from search.base import LoadedBase
from search.delivery import deliver_merge, rehearse_merge
from search.errors import InputError
from search.parts import assemble_parts
from tests.toys import BASE_NAME, make_model

COEFFICIENTS = np.array([[0.5, 0.25, 0.0], [1.0, -1.0, 0.125]])


@pytest.fixture
def parts(toy_adapters):
    base = LoadedBase(make_model("llama", dtype=torch.bfloat16), None, BASE_NAME, None, "ab" * 32)
    return assemble_parts(base, toy_adapters("llama"), base_name=BASE_NAME, kind="layer")


def test_adapter_and_coefficients_are_written(parts, tmp_path):
    merged = deliver_merge(
        parts, COEFFICIENTS, BASE_NAME, tmp_path, objective={"loss": 0.5}, provenance={"seed": 3}
    )
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    torch.testing.assert_close(written, merged.state_dict)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_NAME
    document = json.loads((tmp_path / "coefficients.json").read_text())
    assert document["coefficients"] == COEFFICIENTS.tolist()
    assert (document["method"], document["objective"]) == ("concord", {"loss": 0.5})
    assert document["provenance"] == {"seed": 3}
    assert document["base"] == {"id": BASE_NAME, "revision": None, "sha256": "ab" * 32}


def test_a_rehearsal_takes_time_and_leaves_nothing(parts, tmp_path):
    assert rehearse_merge(parts, COEFFICIENTS, BASE_NAME, tmp_path) > 0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_shows_at_the_rehearsal(parts, tmp_path, monkeypatch):
    def fill_up(merged, folder):
        (folder.parent / "half").write_text("written")
        raise InputError("cannot write: No space left on device.")

    monkeypatch.setattr(delivery, "write_adapter", fill_up)
    with pytest.raises(InputError, match="No space left"):
        rehearse_merge(parts, COEFFICIENTS, BASE_NAME, tmp_path)
    assert not list(tmp_path.iterdir())
