"""Turn coefficients into one model: an exact PEFT adapter, or the update folded into the dense weights.

Knows adapters, groups and files; not how the coefficients were found.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
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
from search.card import CARD_FILE, is_our_card
from search.errors import InputError
from search.files import atomic_write, write_json
from search.groups import Groups
from search.provenance import library_versions
from search.recorded import COEFFICIENTS_FILE, check_coefficients
from search.stack import StackedModule, at_least_float32, stack_module

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True, eq=False)
class MergedAdapter:
    """The merge as one LoRA adapter whose scaling is 1 everywhere."""

    state_dict: dict[str, Tensor]
    """PEFT's keys, "base_model.model.<module>.lora_A.weight"."""
    config: dict[str, Any]
    """The content of adapter_config.json."""

    @property
    def modules(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> its A (rank, d_in) and B (d_out, rank)."""
        names = [key[len(_PREFIX) : -len(_A)] for key in self.state_dict if key.endswith(_A)]
        return {name: tuple(self.state_dict[_PREFIX + name + end] for end in (_A, _B)) for name in names}  # type: ignore[misc]


@dataclass(frozen=True, slots=True, eq=False)
class Papers:
    """What goes with an adapter for people and programs."""

    card: str
    """README.md, from `write_card`."""
    document: dict[str, Any]
    """The content of coefficients.json."""


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
    table = check_coefficients(coefficients, groups, len(adapters))
    merged = {}
    for name in touched_modules(adapters):
        module = _mix_module(name, adapters, table[groups.group_of[name]])
        if module is not None:
            merged[name] = module.A, module.B
    return pack_adapter(merged or _zero_module(adapters), base_name, dtype)


def pack_adapter(
    modules: Mapping[str, tuple[Tensor, Tensor]], base_name: str, dtype: torch.dtype
) -> MergedAdapter:
    """Give factors, A (rank, d_in) and B (d_out, rank) by module, PEFT's names, config and a type."""
    tensors = {}
    for name, (A, B) in modules.items():
        tensors[_PREFIX + name + _A] = A.to(dtype).contiguous()
        tensors[_PREFIX + name + _B] = B.to(dtype).contiguous()
    ranks = {name: A.shape[0] for name, (A, _) in modules.items()}
    return MergedAdapter(tensors, _peft_config(ranks, base_name))


def touched_modules(adapters: Sequence[Adapter]) -> list[str]:
    """Return the modules that any adapter changes, in the order in which they are first met."""
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


def _zero_module(adapters: Sequence[Adapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """One module at rank 1, all zeros: the merge that is the base, since PEFT loads no empty adapter."""
    name, f = next(iter(adapters[0].modules.items()))
    return {name: (torch.zeros(1, f.A.shape[1]), torch.zeros(f.B.shape[0], 1))}


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


def write_adapter(merged: MergedAdapter, folder: Path, papers: Papers | None = None) -> None:
    """Write a folder that PEFT and vLLM load, whole or not at all; an adapter that is there is replaced.

    The safetensors metadata names the base and, with papers, the winner and the SHA-256 of
    json.dumps(document["coefficients"]).

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    refuse_strangers(folder)
    with replace_folder(folder) as temporary:
        text = json.dumps(merged.config, indent=2, sort_keys=False)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        save_file(merged.state_dict, temporary / WEIGHTS_FILE, _metadata(merged, papers))
        _sort_header(temporary / WEIGHTS_FILE)
        if papers:
            write_papers(papers, temporary)


def write_papers(papers: Papers, folder: Path) -> None:
    """Write README.md and coefficients.json into a folder."""
    (folder / CARD_FILE).write_text(papers.card, encoding="utf-8", errors="replace")
    write_json(folder / COEFFICIENTS_FILE, papers.document)


def _metadata(merged: MergedAdapter, papers: Papers | None) -> dict[str, str]:
    facts = {
        "format": "pt",
        "concord": library_versions()["concord"],
        "base_model": merged.config["base_model_name_or_path"],
    }
    if papers:
        facts["winner"] = papers.document["provenance"].get("winner")
        table = json.dumps(papers.document["coefficients"])
        facts["coefficients_sha256"] = sha256(table.encode()).hexdigest()
    return {key: str(value) for key, value in facts.items() if value is not None}


def _sort_header(path: Path) -> None:
    """Put the header of a safetensors file in order, so that equal merges are equal files.

    Its writer keeps metadata in a hash map, whose order changes from call to call.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place on success, and is removed otherwise.

    What was there is moved aside first and deleted last, so that a failure leaves one of the two whole.

    Raises:
        InputError: if it cannot be written, or the disk is full.
    """
    folder = folder.resolve()
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    try:
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            try:
                yield temporary
            except SafetensorError as error:
                raise OSError(str(error)) from error  # a full disk, for one
            if folder.is_dir():
                folder.rename(aside)
    except BaseException:
        if aside.is_dir():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def refuse_strangers(folder: Path) -> None:
    """Refuse (InputError) a folder that holds anything but an adapter, which `write_adapter` would delete.

    README.md and coefficients.json belong to the adapter only where the card is one of ours.
    """
    ours = {CONFIG_FILE, WEIGHTS_FILE}
    if is_our_card(folder / CARD_FILE):
        ours |= {CARD_FILE, COEFFICIENTS_FILE}
    strangers = sorted({path.name for path in folder.iterdir()} - ours) if folder.is_dir() else []
    if strangers:
        raise InputError(
            f"{folder}: holds {strangers[0]!r}, which replacing it would delete. Choose a new folder."
        )


def fold_adapters(
    model: nn.Module, adapters: Sequence[Adapter], coefficients: ArrayLike, groups: Groups
) -> None:
    """Add the merge to the model's own weights in place, exactly, as `fold_updates` does; for good.

    `search.folding` has the same for a while.

    Args:
        coefficients: (n_groups, n_adapters).
    """
    table = check_coefficients(coefficients, groups, len(adapters))
    layers = dict(model.named_modules())

    def mix() -> Iterator[tuple[str, Tensor]]:
        for name in touched_modules(adapters):
            device = layers[name].weight.device
            module = _mix_module(name, adapters, table[groups.group_of[name]], device)
            if module is not None:
                yield name, module.B @ module.A

    fold_updates(model, mix())


def fold_updates(model: nn.Module, updates: Iterable[tuple[str, Tensor]]) -> None:
    """Add an update to each named module's weight in place: W += update, in float32 at least, rounded once.

    No second copy of the model: beside it are one module's update and one module's weight in the wide type.

    A weight that another module shares (an output layer tied to the embeddings) is given its own copy first.

    Args:
        updates: module name and its update (d_out, d_in), each used before the next is asked for.
    """
    layers = dict(model.named_modules())
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, update in updates:
        layer = layers[name]
        weight = layer.weight
        if uses[id(weight)] > 1:
            weight = layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            config: Any = model.config
            config.tie_word_embeddings = False
        wide = at_least_float32(torch.promote_types(weight.dtype, update.dtype))
        delta = update.to(weight.device, wide)
        with torch.no_grad():
            weight.copy_(weight.to(wide).add_(delta.T if isinstance(layer, Conv1D) else delta))
