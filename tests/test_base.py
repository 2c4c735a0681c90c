"""Loading a base model: what is loaded, and what is said when something is not there."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from search import base, hub
from search.base import (
    choose_device,
    choose_dtype,
    hash_texts,
    hash_weights,
    load_base,
    load_tokenizer,
    read_context,
)
from search.errors import InputError
from search.versions import dtype_option
from tests.toys import N_VOCAB

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.:?',()"  # 45, after <unk>, <s> and </s>


def make_toy_tokenizer(*, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character; unknown characters become <unk>."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_toy_model(*, context: int = 4096, seed: int = 0) -> MistralForCausalLM:
    """A random Mistral, loud enough that its greedy text is not one repeated token."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=N_VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=context,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return MistralForCausalLM(config).eval()


def save_toy_base(folder: Path, *, context: int = 4096, seed: int = 0) -> Path:
    """Save a toy model and tokenizer the way any user would."""
    make_toy_model(context=context, seed=seed).save_pretrained(folder)
    make_toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return save_toy_base(tmp_path_factory.mktemp("base"), context=128)


def test_a_saved_base_comes_back_ready_to_be_searched_on(toy_folder):
    loaded = load_base(str(toy_folder), device="cpu")
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    torch.testing.assert_close(loaded.model.state_dict(), make_toy_model(context=128).state_dict())
    assert loaded.tokenizer("ab:").input_ids == [1, 3, 4, 42]
    assert loaded.tokenizer.decode([3, 4, 42, 2], skip_special_tokens=True) == "ab:"
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 2
    assert (loaded.source, loaded.revision) == (str(toy_folder), None)
    assert loaded.sha256 == hash_weights(toy_folder)
    assert loaded.text_sha256 == hash_texts(toy_folder)
    assert read_context(str(toy_folder)) == 128


@pytest.mark.parametrize(("name", "dtype"), [("float64", torch.float64), ("bfloat16", torch.bfloat16)])
def test_the_dtype_asked_for_is_the_one_loaded(toy_folder, name, dtype):
    assert load_base(str(toy_folder), device="cpu", dtype=name).model.dtype == dtype


def test_other_architectures_load_too(tmp_path):
    GPT2LMHeadModel(
        GPT2Config(vocab_size=N_VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ).save_pretrained(tmp_path)
    make_toy_tokenizer().save_pretrained(tmp_path)
    assert (
        type(load_base(str(tmp_path)).model).__name__ == "GPT2LMHeadModel"
    )  # its output layer is tied, not missing
    assert read_context(str(tmp_path)) == 64


def test_the_hash_follows_the_weights_and_not_the_folder(toy_folder, tmp_path):
    again = save_toy_base(tmp_path / "again", context=128)
    other = save_toy_base(tmp_path / "other", context=128, seed=1)
    assert hash_weights(again) == hash_weights(toy_folder) != hash_weights(other)
    assert hash_weights(tmp_path) is None


def refusal(source, **options):
    with pytest.raises(InputError) as caught:
        load_base(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_refused():
    assert "there is no such folder" in refusal("none/such/folder")


def test_a_hub_error_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("Cannot find the requested files.\nMore about it.")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    message = refusal("org/name")
    assert "not or not wholly in the cache" in message
    assert "Unset HF_HUB_OFFLINE" in message


def test_the_commit_of_a_hub_download_is_kept(monkeypatch, tmp_path):
    folder = save_toy_base(tmp_path / "models--org--name" / "snapshots" / "c0ffee", context=128)
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda source, **kw: asked.append((source, kw)) or folder)
    assert load_base("org/name", revision="main").revision == "c0ffee"
    assert {(source, kw["revision"]) for source, kw in asked} == {
        ("org/name", "main"),
        ("org/name", "c0ffee"),
    }


def test_missing_parts_are_named(tmp_path):
    folder = save_toy_base(tmp_path / "base")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    removed = tensors.pop("model.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lack 1 of the model's weights, model.norm.weight" in refusal(folder)
    save_file({**tensors, "model.norm.weight": removed[:3].clone()}, weights, metadata={"format": "pt"})
    assert "the model cannot be loaded" in refusal(folder)
    weights.write_bytes(weights.read_bytes()[:900])
    assert "the model cannot be loaded" in refusal(folder)
    weights.unlink()
    assert "no *.safetensors" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer in" in refusal(folder)


def test_a_broken_config_is_named(tmp_path):
    folder = save_toy_base(tmp_path / "base")
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "cannot be loaded" in refusal(folder)
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        read_context(str(folder))


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = make_toy_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no EOS token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "mps", "tpu", "gpu0"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(InputError, match=f"device '{device}' cannot be used here") as refused:
        choose_device(device)
    assert "http" not in str(refused.value)  # torch tells its developers more


def test_a_dtype_that_is_not_there_is_refused_and_auto_follows_the_device():
    with pytest.raises(InputError, match=r"dtype 'int3' is unknown. Expected one of auto"):
        choose_dtype("int3", torch.device("cpu"))
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_weights_are_read_straight_onto_the_device_that_is_asked_for(toy_folder, monkeypatch):
    real, asked = base.AutoModelForCausalLM.from_pretrained, []

    def spy(*args, **options):
        asked.append(options)
        return real(*args, **options)

    monkeypatch.setattr(base.AutoModelForCausalLM, "from_pretrained", spy)
    load_base(str(toy_folder), device="cpu", dtype="bfloat16")
    assert asked[0]["device_map"] == {"": torch.device("cpu")}
    assert asked[0].items() >= dtype_option(torch.bfloat16).items()


@pytest.mark.gpu
def test_the_host_never_holds_the_model_nor_the_gpu_two(tmp_path):
    config = MistralConfig(
        vocab_size=N_VOCAB,
        hidden_size=2048,
        num_hidden_layers=12,
        intermediate_size=7168,
        num_attention_heads=16,
    )
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    make_toy_tokenizer().save_pretrained(tmp_path)
    n_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    torch.empty(1, device="cuda")
    host, gpu = own_host_bytes(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    load_base(str(tmp_path), device="cuda", dtype="bfloat16")
    assert own_host_bytes() - host < n_bytes / 2
    assert torch.cuda.max_memory_allocated() - gpu < 1.2 * n_bytes


def own_host_bytes() -> int:
    """Memory of this process's own now; mapped files left out."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def test_the_hash_of_texts_follows_names_and_contents_of_configuration_and_tokenizer(tmp_path):
    assert hash_texts(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("[]")
    first = hash_texts(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert hash_texts(tmp_path) == first
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hash_texts(tmp_path) not in (None, first)
