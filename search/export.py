"""Redo a recorded merge into a folder that others can load: an adapter, exact or of smaller rank, or a model.

Knows records, weights and folders; not the search that found the coefficients, nor the command line.
"""

import shutil
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from search.adapters import Adapter, check_adapter, load_adapter
from search.base import LoadedBase, choose_dtype, load_base, load_shapes
from search.card import write_card
from search.compress import compress_adapter
from search.delivery import Cut, deliver_adapter
from search.errors import InputError
from search.groups import Groups
from search.merge import Papers, fold_adapters, merge_adapters, refuse_strangers, replace_folder, write_papers
from search.recorded import (
    MergeRecord,
    MergeSource,
    RecordedMerge,
    RecordedWeights,
    coefficients_document,
    read_merge,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written; every field is plain JSON."""

    output: str
    """The folder."""
    rank: int | None
    """The adapter's largest rank; None for a dense model."""
    modules: int
    """That the merge changes."""
    relative_error: float | None
    """Of the cut to a smaller rank, in Frobenius norm; None where nothing was cut."""
    worst_module: str | None
    """That the cut leaves out most of; None where nothing was cut."""
    worst_error: float | None
    """That module's relative error."""
    n_bytes: int
    """Of all files in the folder."""


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """A recorded merge with its adapters."""

    merge: RecordedMerge
    adapters: tuple[Adapter, ...]
    groups: Groups
    document: dict[str, Any]
    """coefficients.json, written anew."""


def export_merge(
    source: Path,
    output: Path,
    *,
    rank: int | None = None,
    dense: bool = False,
    allow_pickle: bool = False,
    dtype: str = "auto",
) -> ExportResult:
    """Merge as recorded, and write the result with model card and coefficients.

    An adapter needs only the adapters' weights; a dense model needs the base's too.

    Args:
        source: coefficients.json, trace.jsonl, or a folder that holds one.
        output: a new folder, or that of an adapter, which is replaced; a dense model wants a new one.
        rank: cut the exact adapter to this rank, by module.
        dense: write the whole model instead.
        allow_pickle: read adapters from adapter_model.bin where they have no safetensors file.
        dtype: of what is written. `auto` is float32 (wider where an adapter is) for an adapter, whose
            coefficients bfloat16 would round, and the base's own type for a dense model.

    Raises:
        InputError: the record, the weights that it names, the options or the output do not fit.
    """
    if dense and rank is not None:
        raise InputError("--rank is of an adapter and --dense writes a whole model. Give one of the two.")
    _check_output(output, dense=dense)
    recorded = read_merge(source)
    loaded = _load(recorded, output, allow_pickle=allow_pickle)
    if dense:
        return _export_dense(loaded, recorded.path, output, dtype)
    return _export_adapter(loaded, output, rank, dtype)


def _check_output(output: Path, *, dense: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file, expected a folder. Choose another -o.")
    if not dense:
        refuse_strangers(output)
    elif output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: holds files already, and --dense wants a new folder. Choose another -o.")


def _load(source: MergeSource, output: Path, *, allow_pickle: bool) -> _Loaded:
    """Load the recorded adapters, and check that they are the ones recorded."""
    merge, adapters = source.merge, []
    for recorded in merge.adapters:
        _check_present(recorded, f"{source.path}: adapter {recorded.name or recorded.id!r}")
        if Path(recorded.id).resolve() == output.resolve():
            raise InputError(f"{output}: is an adapter that is merged here. Choose another -o.")
        adapter = load_adapter(
            recorded.id, revision=recorded.revision, name=recorded.name, allow_pickle=allow_pickle
        )
        _check_hash(f"adapter {adapter.name!r} ({adapter.source})", adapter.sha256, recorded.sha256)
        adapters.append(adapter)
    groups = source.group(module for adapter in adapters for module in adapter.modules)
    base = {**merge.base.model_dump(), "name": merge.base_name}
    record = MergeRecord(
        method=merge.method, base=base, objective=merge.objective, provenance=merge.provenance
    )
    document = coefficients_document(adapters, merge.coefficients, groups, record)
    return _Loaded(merge, tuple(adapters), groups, document)


def _check_present(recorded: RecordedWeights, where: str) -> None:
    """Refuse a folder that is gone: without a revision it was no hub id, which would be asked for in vain."""
    if recorded.revision is None and not Path(recorded.id).is_dir():
        raise InputError(
            f"{where}: found no folder {recorded.id!r}, seen from {Path.cwd()}. "
            "Run this where the search ran, or write the new place as its `id` (a hub id with a `revision`)."
        )


def _check_hash(where: str, found: str | None, recorded: str | None) -> None:
    if recorded is not None and found != recorded:
        raise InputError(
            f"{where}: sha256 of its weights is {str(found)[:12]}, recorded was {recorded[:12]}: "
            "not the weights that were merged. Restore them, or search again."
        )


def _export_adapter(loaded: _Loaded, output: Path, rank: int | None, dtype: str) -> ExportResult:
    target = _adapter_dtype(loaded.adapters, dtype)
    merged = merge_adapters(
        loaded.adapters,
        loaded.merge.coefficients,
        loaded.groups,
        base_name=loaded.merge.base_name,
        dtype=target
        if rank is None
        else torch.promote_types(target, torch.float32),  # rounded once, at the end
    )
    cut = None if rank is None else compress_adapter(merged, rank, dtype=target)
    told = Cut(cut.relative_error, cut.worst) if cut else None
    deliver_adapter(cut.merged if cut else merged, loaded.document, output, told)
    return ExportResult(
        output=str(output),
        rank=(cut.merged if cut else merged).config["r"],
        modules=len(merged.modules),
        relative_error=cut.relative_error if cut else None,
        worst_module=cut.worst[0] if cut else None,
        worst_error=cut.worst[1] if cut else None,
        n_bytes=_count_bytes(output),
    )


def _adapter_dtype(adapters: tuple[Adapter, ...], dtype: str) -> torch.dtype:
    if dtype != "auto":
        return choose_dtype(dtype, torch.device("cpu"))
    stored = (f.A.dtype for adapter in adapters for f in adapter.modules.values())
    return reduce(torch.promote_types, stored, torch.float32)


def _export_dense(loaded: _Loaded, record: Path, output: Path, dtype: str) -> ExportResult:
    merge = loaded.merge
    _check_present(merge.base, f"{record}: base")
    shapes: Any = load_shapes(merge.base.id, revision=merge.base.revision)
    for adapter in loaded.adapters:
        check_adapter(adapter, shapes, merge.base_name)
    own = str(shapes.dtype).removeprefix("torch.")
    base = load_base(
        merge.base.id, revision=merge.base.revision, device="cpu", dtype=own if dtype == "auto" else dtype
    )
    _check_hash(f"base {merge.base.id!r}", base.sha256, merge.base.sha256)
    fold_adapters(base.model, loaded.adapters, merge.coefficients, loaded.groups)
    card = write_card(loaded.document, base_name=merge.base_name, rank=None)
    with replace_folder(output) as temporary:
        _save_model(base, temporary)
        write_papers(Papers(card, loaded.document), temporary)
    return ExportResult(
        output=str(output),
        rank=None,
        modules=len(loaded.groups.group_of),
        relative_error=None,
        worst_module=None,
        worst_error=None,
        n_bytes=_count_bytes(output),
    )


def _save_model(base: LoadedBase, folder: Path) -> None:
    """Save model and tokenizer, the tokenizer and the defaults of generation as the base's folder has them.

    The latter are copied: transformers 5.17 reads some of them but refuses to write them.
    """
    model: Any = base.model
    origin = Path(model.name_or_path)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    if (origin / "generation_config.json").is_file():
        shutil.copyfile(origin / "generation_config.json", folder / "generation_config.json")
    AutoTokenizer.from_pretrained(origin).save_pretrained(folder)


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
