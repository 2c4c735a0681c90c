"""What a run writes beside its trace."""

import json
import logging

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file

from search import delivery
from search.base import LoadedBase
from search.delivery import deliver_adapter, deliver_merge, rehearse_merge
from search.errors import InputError
from search.merge import pack_adapter
from search.parts import assemble_parts
from tests.toys import BASE_NAME, make_model

COEFFICIENTS = np.array([[0.5, 0.25, 0.0], [1.0, -1.0, 0.125]])


@pytest.fixture
def parts(toy_adapters):
    base = LoadedBase(make_model("llama", dtype=torch.bfloat16), None, "here/base", None, "ab" * 32)
    return assemble_parts(base, toy_adapters("llama"), base_name=BASE_NAME, kind="layer")


def test_adapter_card_and_coefficients_are_written(parts, tmp_path):
    merged = deliver_merge(
        parts,
        COEFFICIENTS,
        BASE_NAME,
        tmp_path,
        objective={"loss": 0.5, "per_expert": [0.25, 0.5, 0.75]},
        provenance={"seed": 3},
    )
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    torch.testing.assert_close(written, merged.state_dict)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_NAME
    document = json.loads((tmp_path / "coefficients.json").read_text())
    assert document["coefficients"] == COEFFICIENTS.tolist()
    assert (document["method"], document["objective"]["loss"]) == ("concord", 0.5)
    assert document["provenance"] == {"seed": 3}
    hashes = {"sha256": "ab" * 32, "text_sha256": None}
    assert document["base"] == {"id": "here/base", "revision": None, "name": BASE_NAME, **hashes}
    copied = (tmp_path / "adapter/coefficients.json").read_bytes()
    assert copied == (tmp_path / "coefficients.json").read_bytes()
    assert metadata_load(tmp_path / "adapter/README.md")["base_model"] == BASE_NAME
    assert "| expert-1 | 0.25 | -1 | 0.5 |" in (tmp_path / "adapter/README.md").read_text()


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


DOCUMENT = {
    "method": "m",
    "base": {"id": BASE_NAME},
    "adapters": [{"name": "a", "id": "a", "revision": None, "sha256": "0" * 64, "rank": [2], "scaling": [1]}],
    "groups": {"model": ["x"]},
    "coefficients": [[1.0]],
    "objective": {},
    "provenance": {},
}


@pytest.mark.parametrize(
    ("rank", "level", "said"),
    [
        (16, None, ""),
        (17, logging.INFO, "rank 17; serve it with vllm serve ... --max-lora-rank 32"),
        (
            520,
            logging.WARNING,
            "rank 520 is more than vLLM takes (512). For vLLM: "
            "python -m search merge {folder}/coefficients.json -o DIR --rank 512",
        ),
    ],
)
def test_what_vllm_needs_is_said_once(rank, level, said, tmp_path, caplog):
    merged = pack_adapter({"x": (torch.zeros(rank, 2), torch.zeros(2, rank))}, BASE_NAME, torch.float32)
    with caplog.at_level(logging.INFO, logger="search.delivery"):
        deliver_adapter(merged, DOCUMENT, tmp_path / "merged")
    assert [record.levelno for record in caplog.records] == ([level] if level else [])
    assert said.format(folder=tmp_path / "merged") in caplog.text
