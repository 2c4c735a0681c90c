"""Turn coefficients into one model: an exact PEFT adapter, or the update folded into the dense weights.

Knows adapters, groups and files; not how the coefficients were found.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from search.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, Factors
from search.errors import InputError
from search.files import atomic_write
from search.groups import Groups
from search.stack import StackedModule, at_least_float32, stack_module

COEFFICIENTS_SCHEMA = 1


@dataclass(frozen=True, slots=True, eq=False)
class MergedAdapter:
    """The merge as one LoRA adapter whose scaling is 1 everywhere."""

    state_dict: dict[str, Tensor]
    """PEFT's keys, "base_model.model.<module>.lora_A.weight"."""
    config: dict[str, Any]
    """The content of adapter_config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecord:
    """Where a merge comes from, as coefficients.json records it."""

    method: str
    base: dict[str, Any]
    """id, revision, sha256."""
    objective: dict[str, Any]
    """name, loss, per_expert."""
    provenance: dict[str, Any]
    """commit, versions, seed, trace."""


def merge_adapters(
    adapters: Sequence[Adapter],
    coefficients: ArrayLike,
    groups: Groups,
    *,
    base_name: str,
    dtype: torch.dtype = torch.float32,
) -> MergedAdapter:
    """Merge exactly: ranks side by side, coefficient and scaling multiplied into B, so no cross terms arise.

    An adapter at coefficient zero takes no rank; a module where all are zero is left out. With lora_alpha
    = r, and one pattern for both where ranks differ, scaling is 1 with patterns (PEFT) and without (vLLM).

    Args:
        coefficients: (n_groups, n_adapters).
        dtype: of the written tensors; products are taken in float32 at least.
    """
    table = _check_coefficients(coefficients, groups, len(adapters))
    merged = {}
    for name in _touched_modules(adapters):
        module = _mix_module(name, adapters, table[groups.group_of[name]])
        if module is not None:
            merged[name] = module
    merged = merged or _zero_module(adapters)
    tensors = {}
    for name, module in merged.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.A.to(dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.B.to(dtype).contiguous()
    ranks = {name: module.A.shape[0] for name, module in merged.items()}
    return MergedAdapter(tensors, _peft_config(ranks, base_name))


def _check_coefficients(coefficients: ArrayLike, groups: Groups, n_adapters: int) -> NDArray[np.float64]:
    table = np.asarray(coefficients, dtype=np.float64)
    expected = (len(groups.names), n_adapters)
    if table.shape != expected:
        raise ValueError(
            f"coefficients have shape {table.shape}, expected (n_groups, n_adapters) = {expected}"
        )
    if not np.isfinite(table).all():
        raise ValueError(f"{np.sum(~np.isfinite(table))} of {table.size} coefficients are not finite")
    return table


def _touched_modules(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))


def _mix_module(
    name: str, adapters: Sequence[Adapter], row: NDArray[np.float64], device: torch.device | str = "cpu"
) -> StackedModule | None:
    """Stack a module, coefficients (n_adapters,) folded into B, in float32 at least; None if all are zero."""
    factors: list[Factors | None] = [None] * len(adapters)
    for index, adapter in enumerate(adapters):
        f = adapter.modules.get(name)
        if f is not None and row[index] * f.scaling != 0:
            A, B = (matrix.to(device, at_least_float32(matrix.dtype)) for matrix in (f.A, f.B))
            factors[index] = Factors(A, B, float(row[index]) * f.scaling)
    return stack_module(factors) if any(factors) else None


def _zero_module(adapters: Sequence[Adapter]) -> dict[str, StackedModule]:
    """One module at rank 1, all zeros: the merge that is the base, since PEFT loads no empty adapter."""
    name, f = next(iter(adapters[0].modules.items()))
    nothing = torch.zeros(1, f.A.shape[1]), torch.zeros(f.B.shape[0], 1)
    return {name: StackedModule(*nothing, torch.zeros(1, dtype=torch.int64))}


def _peft_config(ranks: dict[str, int], base_name: str) -> dict[str, Any]:
    largest = max(ranks.values())
    longest_first = sorted(ranks, key=len, reverse=True)  # PEFT takes the first pattern that ends a name
    patterns = {} if set(ranks.values()) == {largest} else {name: ranks[name] for name in longest_first}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def write_adapter(merged: MergedAdapter, folder: Path) -> None:
    """Write a folder that PEFT loads, whole or not at all; an adapter that is there is replaced.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    refuse_strangers(folder)
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        text = json.dumps(merged.config, indent=2, sort_keys=False)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        try:
            save_file(merged.state_dict, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error  # a full disk, for one


def refuse_strangers(folder: Path) -> None:
    """Refuse (InputError) a folder that holds anything but an adapter, which `write_adapter` would delete."""
    ours = {CONFIG_FILE, WEIGHTS_FILE}
    strangers = sorted({path.name for path in folder.iterdir()} - ours) if folder.is_dir() else []
    if strangers:
        raise InputError(
            f"{folder}: holds {strangers[0]!r}, which replacing it would delete. Choose a new folder."
        )


def fold_adapters(
    model: nn.Module, adapters: Sequence[Adapter], coefficients: ArrayLike, groups: Groups
) -> None:
    """Add the merge to the model's own weights in place: W += delta, in float32 at least, rounded once.

    A weight that another module shares (an output layer tied to the embeddings) is given its own copy first.

    Args:
        coefficients: (n_groups, n_adapters).
    """
    table = _check_coefficients(coefficients, groups, len(adapters))
    layers = dict(model.named_modules())
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in _touched_modules(adapters):
        layer = layers[name]
        weight = layer.weight
        module = _mix_module(name, adapters, table[groups.group_of[name]], weight.device)
        if module is None:
            continue
        if uses[id(weight)] > 1:
            weight = layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            config: Any = model.config
            config.tie_word_embeddings = False
        delta = module.B @ module.A  # (d_out, d_in)
        with torch.no_grad():
            weight.copy_(weight.to(delta.dtype) + (delta.T if isinstance(layer, Conv1D) else delta))


def coefficients_document(
    adapters: Sequence[Adapter], coefficients: ArrayLike, groups: Groups, record: MergeRecord
) -> dict[str, Any]:
    """Return the content of coefficients.json: what it takes to redo the merge, and where it is from."""
    table = _check_coefficients(coefficients, groups, len(adapters))
    members: dict[str, list[str]] = {name: [] for name in groups.names}
    for module, index in groups.group_of.items():
        members[groups.names[index]].append(module)
    return {
        "schema": COEFFICIENTS_SCHEMA,
        "method": record.method,
        "base": record.base,
        "adapters": [_describe_adapter(adapter) for adapter in adapters],
        "groups": members,
        "coefficients": table.tolist(),
        "objective": record.objective,
        "provenance": record.provenance,
    }


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Ranks and scalings are lists: the distinct values over its modules."""
    return {
        "name": adapter.name,
        "id": adapter.source,
        "revision": adapter.revision,
        "sha256": adapter.sha256,
        "rank": sorted({f.A.shape[0] for f in adapter.modules.values()}),
        "scaling": sorted({f.scaling for f in adapter.modules.values()}),
    }
