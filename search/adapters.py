"""Load a LoRA adapter from a PEFT folder or the hub, and refuse by name what cannot be merged exactly.

Knows PEFT's files and a model's linear layers; not coefficients, stacks or merges.
"""

import json
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from search.dummy import SCALING, is_dummy, make_factors
from search.errors import InputError
from search.hub import Fetched, fetch, hash_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_TENSOR_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BASE_EDITING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED_SETTINGS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "whole trained modules",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_REFUSED_TENSORS = {
    ".base_layer.": "a copy of the base's own layer (save it with PEFT's save_embedding_layers=False)",
    "lora_embedding_": "LoRA on an embedding",
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "a bias on lora_B",
    "embed": "embeddings of its own (a resized vocabulary)",
    "lm_head": "an output layer of its own (a resized vocabulary)",
}


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module of one adapter: its update is scaling * B @ A."""

    A: Tensor
    """(rank, d_in), PEFT's lora_A.weight."""
    B: Tensor
    """(d_out, rank), PEFT's lora_B.weight."""
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA, after rank_pattern and alpha_pattern."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One LoRA expert, as stored."""

    name: str
    modules: dict[str, Factors]
    """By the base's own module name, e.g. "model.layers.0.self_attn.q_proj"."""
    source: str
    revision: str | None
    """The commit where the hub served it, else what the caller gave."""
    sha256: str
    """Of the weights file."""
    base_name: str
    """base_model_name_or_path of its config, "" where it names none."""


def load_adapter(
    source: str, *, revision: str | None = None, name: str | None = None, allow_pickle: bool = False
) -> Adapter:
    """Read an adapter from an existing local folder, else from the hub.

    Args:
        source: a folder as PEFT writes it, or a hub id "org/name".
        revision: branch, tag or commit on the hub.
        name: how the run calls it; default: the last path component of `source`.
        allow_pickle: read adapter_model.bin (tensors only) where there is no safetensors file.

    Raises:
        MissingOnHubError: the hub does not have it.
        InputError: the adapter is missing, damaged, or something else than plain LoRA on linear layers.
    """
    name = name or Path(source).name
    where = _name_place(source, name)
    if is_dummy(source):
        drawn = make_factors(source)
        modules = {key: Factors(A, B, SCALING) for key, (A, B) in drawn.factors.items()}
        return Adapter(name, modules, source, None, drawn.sha256, drawn.base)
    fetched = fetch_adapter(source, revision=revision, name=name, allow_pickle=allow_pickle)
    config = _read_config(fetched.folder / CONFIG_FILE, where)
    _check_settings(config, where)
    weights = _find_weights(fetched.folder, where, allow_pickle)
    modules = _pair_factors(_read_tensors(weights, where), config, where)
    named = str(config.get("base_model_name_or_path") or "")
    return Adapter(name, modules, source, fetched.commit or revision, hash_file(weights), named)


def fetch_adapter(
    source: str, *, revision: str | None = None, name: str | None = None, allow_pickle: bool = False
) -> Fetched:
    """Have an adapter's files at hand, unread; arguments and errors are those of `load_adapter`."""
    files = [CONFIG_FILE, WEIGHTS_FILE, *([PICKLE_FILE] if allow_pickle else [])]
    return fetch(source, revision, files, _name_place(source, name or Path(source).name))


def _name_place(source: str, name: str) -> str:
    return f"adapter {name!r} ({source})"


def _read_config(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{where}: no {CONFIG_FILE} in it; expected a folder saved by PEFT. Check `source`.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found = f"{CONFIG_FILE} is unreadable or not valid JSON ({error})"
        raise InputError(f"{where}: {found}. Re-download it.") from error
    if not isinstance(config, dict):
        raise InputError(f"{where}: {CONFIG_FILE} holds no JSON object. Re-download it.")
    return config


def _check_settings(config: dict[str, Any], where: str) -> None:
    """Refuse what is not plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'. Drop it.")
    for setting, meaning in _REFUSED_SETTINGS.items():
        if config.get(setting):
            raise InputError(
                f"{where}: {meaning} ({setting}) cannot be merged, only plain LoRA can. Drop it."
            )
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: trained biases (bias: {config['bias']!r}) cannot be merged. Drop it.")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_BASE_EDITING_INITS):
        cure = "Convert it to plain LoRA (PEFT: path_initial_model_for_weight_conversion) or drop it"
        raise InputError(f"{where}: init_lora_weights {start!r} changed the base it was trained on. {cure}.")
    _check_numbers(config, where)


def _check_numbers(config: dict[str, Any], where: str) -> None:
    """Refuse ranks and alphas that are none."""
    for field, pattern_field, kind in (
        ("r", "rank_pattern", int),
        ("lora_alpha", "alpha_pattern", (int, float)),
    ):
        patterns = config.get(pattern_field) or {}
        if not isinstance(patterns, dict):
            raise InputError(
                f"{where}: {pattern_field} is {patterns!r} in {CONFIG_FILE}, expected an object."
            )
        _check_patterns(patterns, f"{where}: {pattern_field}")
        for name, value in {field: config.get(field, 8), **patterns}.items():
            good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
            if not good or (field == "r" and value < 1):
                expected = "a whole number above 0" if field == "r" else "a number"
                raise InputError(f"{where}: {name} is {value!r} in {CONFIG_FILE}, expected {expected}.")


def _check_patterns(patterns: dict[str, Any], where: str) -> None:
    """Refuse names of modules that PEFT could not have matched either."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError) as error:
            raise InputError(
                f"{where} has {pattern!r} in {CONFIG_FILE}, no regular expression ({error}). Re-download it."
            ) from error


def _find_weights(folder: Path, where: str, allow_pickle: bool) -> Path:
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    if allow_pickle and (folder / PICKLE_FILE).is_file():
        return folder / PICKLE_FILE
    allowed = "`allow_pickle: true` beside its `source`, or --allow-pickle of `search merge`"
    pickled = f"A pickle ({PICKLE_FILE}) is read only with {allowed}; better convert it"
    raise InputError(f"{where}: no {WEIGHTS_FILE} in it. {pickled}.")


def _read_tensors(path: Path, where: str) -> dict[str, Tensor]:
    """Load the weights file on the CPU and check that every value is finite."""
    try:
        if path.name == PICKLE_FILE:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        found = f"{path.name} is truncated, a Git LFS pointer or unsafe ({reason})"
        raise InputError(f"{where}: {found}. Re-download it.") from error
    if not isinstance(tensors, dict):
        raise InputError(f"{where}: {path.name} holds something else than named tensors. Re-download it.")
    for key, value in tensors.items():
        if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{where}: {key} is of type {kind}, expected a float tensor. Drop it.")
        if not torch.isfinite(value).all():
            raise InputError(f"{where}: {key} holds NaN or infinite values. Drop it or train it again.")
    return tensors


def _pair_factors(tensors: dict[str, Tensor], config: dict[str, Any], where: str) -> dict[str, Factors]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR_KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise InputError(f"{where}: {_name_tensor(key)} Only lora_A and lora_B can be merged. Drop it.")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise InputError(f"{where}: no LoRA tensors in its weights file. Re-download it or drop it.")
    return {module: _make_factors(module, pairs[module], config, where) for module in sorted(pairs)}


def _name_tensor(key: str) -> str:
    meaning = next((text for part, text in _REFUSED_TENSORS.items() if part in key), None)
    return f"it holds {meaning}: {key!r}." if meaning else f"unknown tensor {key!r}."


def _make_factors(module: str, pair: dict[str, Tensor], config: dict[str, Any], where: str) -> Factors:
    if len(pair) < 2:
        present, absent = ("A", "B") if "A" in pair else ("B", "A")
        raise InputError(f"{where}: {module} has lora_{present} but no lora_{absent}. Re-download it.")
    A, B = pair["A"], pair["B"]
    if A.shape[0] != B.shape[1]:
        ranks = f"lora_A has rank {A.shape[0]} but lora_B has rank {B.shape[1]}"
        shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
        raise InputError(f"{where}: {module}: {ranks} ({shapes}). Re-download it or drop it.")
    rank = _setting(config, "rank_pattern", module, config.get("r", 8))
    if rank != A.shape[0]:
        raise InputError(f"{where}: {module} has rank {A.shape[0]}, its config says {rank}. Re-download it.")
    alpha = _setting(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    return Factors(A, B, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _setting(config: dict[str, Any], field: str, module: str, default: float) -> float:
    """First pattern of `field` that matches the module's name, or its last components: PEFT's own rule."""
    patterns: dict[str, float] = config.get(field) or {}
    return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), default)


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a Linear or Conv1D layer, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def check_adapter(adapter: Adapter, model: nn.Module, base_name: str) -> None:
    """Check that the adapter fits the base model.

    Args:
        base_name: the base's name; only its last path component counts, in any case.

    Raises:
        InputError: made for another base, or a module that the base lacks or has in another width.
    """
    where = f"adapter {adapter.name!r} ({adapter.source})"
    if adapter.base_name and _last_component(adapter.base_name) != _last_component(base_name):
        raise InputError(
            f"{where}: made for base {adapter.base_name!r}, but the base is {base_name!r}. Drop it, "
            "or set `base.name` in the config if they are the same weights."
        )
    layers = dict(model.named_modules())
    for module, factors in adapter.modules.items():
        if module not in layers:
            raise InputError(f"{where}: the base has no module {module!r}: made for another base. Drop it.")
        widths = linear_widths(layers[module])
        if widths is None:
            kind = type(layers[module]).__name__
            raise InputError(f"{where}: {module} is a {kind}, expected a Linear or Conv1D layer. Drop it.")
        found = (factors.B.shape[0], factors.A.shape[1])
        if found != widths:
            expected = f"the base's is {widths}: made for another base"
            raise InputError(f"{where}: {module} is (d_out, d_in) = {found}, {expected}. Drop it.")


def _last_component(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
