"""Load the base model and its tokenizer from a folder or the Hugging Face hub; say which weights they are.

Knows folders, hub ids, dtypes and devices; not adapters, prompts or the configuration.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from search.dummy import architecture, is_dummy, make_model, make_shapes, make_tokenizer
from search.errors import InputError
from search.hub import TEXT_FILES, WEIGHT_FILES, Fetched, fetch, hash_file, note_unpinned
from search.versions import dtype_option, recorded_dtype

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model ready to be searched on: eval mode, no gradients, tokenizer with a padding token."""

    model: nn.Module
    tokenizer: Any
    source: str
    revision: str | None
    """The resolved commit for a hub id, else None."""
    sha256: str | None
    """Hash of the weight files' hashes; None for a model that was never a file."""
    text_sha256: str | None = None
    """Of `hash_texts`, likewise."""


def load_base(
    source: str, *, revision: str | None = None, device: str = "auto", dtype: str = "auto"
) -> LoadedBase:
    """Load a causal language model and its tokenizer.

    Args:
        source: an existing folder, else a hub id.
        device: `auto` is CUDA where there is a device, else the CPU.
        dtype: `auto` is bfloat16 on CUDA (float16 where it lacks bfloat16) and float32 elsewhere.

    Raises:
        InputError: if the source, its weights, its tokenizer, the device or the dtype is not there.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    if is_dummy(source):
        model = make_model(source, chosen_device, chosen_dtype).eval().requires_grad_(False)
        return LoadedBase(model, make_tokenizer(source), source, None, None)
    text = _fetch(source, revision)
    tokenizer = _read_tokenizer(source, text.folder)
    fetched = _fetch(source, text.commit or revision, weights=True)  # the commit that the tokenizer is of
    if not Path(source).is_dir():
        note_unpinned([(f"base {source!r}", revision, fetched.commit)])
    _check_weights_exist(source, fetched.folder)
    model = _load_model(source, fetched.folder, chosen_device, chosen_dtype).eval().requires_grad_(False)
    folder = fetched.folder
    return LoadedBase(model, tokenizer, source, fetched.commit, hash_weights(folder), hash_texts(folder))


def load_tokenizer(source: str, *, revision: str | None = None) -> Any:
    """Load a base's tokenizer, padding with EOS where it has no padding token.

    Raises:
        InputError: if there is none, or it has no EOS token.
    """
    if is_dummy(source):
        return make_tokenizer(source)
    return _read_tokenizer(source, _fetch(source, revision).folder)


def _read_tokenizer(source: str, folder: Path) -> Any:
    if not any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise InputError(
            f"base {source!r}: no tokenizer in {folder}. Save it there with tokenizer.save_pretrained."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"base {source!r}: its tokenizer cannot be read: {_first_line(error)}. "
            "Save it again with tokenizer.save_pretrained."
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"base {source!r}: its tokenizer has no EOS token. Set eos_token in tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_context(source: str, *, revision: str | None = None) -> int | None:
    """Return how many tokens the base can read, prompt and answer together; None where its config is silent.

    Raises:
        InputError: if there is no readable config.json.
    """
    if is_dummy(source):
        return architecture(source).max_position_embeddings
    config = _read_model_config(source, _fetch(source, revision).folder)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_shapes(source: str, *, revision: str | None = None) -> nn.Module:
    """Build the base without weights, on torch's meta device: to see its modules before any weight is read.

    Raises:
        InputError: if there is no readable config.json of a causal language model, or a folder lacks weights.
    """
    if is_dummy(source):
        return make_shapes(source)
    folder = _fetch(source, revision).folder
    config = _read_model_config(source, folder)
    if Path(source).is_dir():  # the hub's weights are not fetched yet
        _check_weights_exist(source, folder)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False, **recorded_dtype(config)
            )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"base {source!r}: its config.json describes no causal language model: {_first_line(error)}. "
            "Choose another base."
        ) from error
    return model


def choose_device(device: str) -> torch.device:
    """Resolve `auto`, and try the device.

    Raises:
        InputError: if torch cannot use it here.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {device!r} cannot be used here: {_first_line(error).split('. ')[0]}. Choose auto or cpu."
        ) from error
    return torch.device(name)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Resolve `auto` for a device.

    Raises:
        InputError: if the name is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown. Expected one of {', '.join(DTYPES)}.")
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def hash_weights(folder: Path) -> str | None:
    """Hash the sorted SHA-256 of a folder's safetensors files; None where there is none."""
    hashes = sorted(hash_file(path) for path in folder.glob("*.safetensors"))
    return sha256("".join(hashes).encode()).hexdigest() if hashes else None


def hash_texts(folder: Path) -> str | None:
    """Hash names and SHA-256 of a folder's configuration and tokenizer files; None where there is none."""
    found = {path.name: hash_file(path) for pattern in TEXT_FILES for path in folder.glob(pattern)}
    return sha256(json.dumps(sorted(found.items())).encode()).hexdigest() if found else None


def _fetch(source: str, revision: str | None, *, weights: bool = False) -> Fetched:
    return fetch(source, revision, TEXT_FILES + (WEIGHT_FILES if weights else ()), f"base {source!r}")


def _read_model_config(source: str, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise InputError(f"base {source!r}: no config.json in {folder}. Save the model with save_pretrained.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"base {source!r}: its config.json cannot be read: {_first_line(error)}. "
            "Download it again or save it anew."
        ) from error


def _check_weights_exist(source: str, folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"base {source!r}: no *.safetensors in {folder}. Save the model with save_pretrained "
            "(pickled weights are not read)."
        )


def _load_model(source: str, folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load weight by weight from the mapped files to the device: the host never holds the model."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            **dtype_option(dtype),
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"base {source!r}: the model cannot be loaded: {_first_line(error)}. "
            "Download it again or save it anew."
        ) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"base {source!r}: its files lack {len(missing)} of the model's weights, {missing[0]} for one. "
            "Download it again or save it anew."
        )
    return model  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")
