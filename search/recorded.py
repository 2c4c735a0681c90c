"""Write coefficients.json, and read a merge back from it or from a trace: what was merged, and how.

Knows both files; not weights, nor what is made of them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.adapters import Adapter
from search.errors import InputError
from search.groups import GroupKind, Groups, group_modules
from search.trace import Trace

COEFFICIENTS_FILE, TRACE_FILE = "coefficients.json", "trace.jsonl"
COEFFICIENTS_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecord:
    """Where a merge comes from, as coefficients.json records it."""

    method: str
    base: dict[str, Any]
    """id, revision, sha256, name (what the adapters call it)."""
    objective: dict[str, Any]
    """name, loss, per_expert."""
    provenance: dict[str, Any]
    """commit, versions, seed, trace."""


class _Recorded(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


Text = Annotated[str, Field(min_length=1)]


class RecordedWeights(_Recorded):
    """An adapter, or the base, as recorded."""

    id: Text
    """Folder or hub id."""
    name: Text | None = None
    revision: str | None = None
    sha256: str | None = None
    """None where it was not recorded: any weights will do."""


class RecordedMerge(_Recorded):
    """The content of coefficients.json, checked."""

    schema_number: int = Field(alias="schema", ge=1)
    method: str
    base: RecordedWeights
    adapters: Annotated[list[RecordedWeights], Field(min_length=1)]
    groups: Annotated[dict[str, list[str]], Field(min_length=1)]
    """Group -> its modules."""
    coefficients: list[list[float]]
    """(n_groups, n_adapters)."""
    objective: dict[str, Any] = {}
    provenance: dict[str, Any] = {}

    @property
    def base_name(self) -> str:
        """What the adapters call the base."""
        return self.base.name or self.base.id


@dataclass(frozen=True, slots=True)
class MergeSource:
    """A merge that was read back."""

    path: Path
    """The file that it was read from."""
    merge: RecordedMerge
    layers_per_block: int | None
    """None for coefficients.json, which lists the modules of groups; a trace only names groups."""

    def group(self, modules: Iterable[str]) -> Groups:
        """Group the adapters' modules as they were grouped.

        Raises:
            InputError: the recorded groups are not those of these modules.
        """
        found = sorted(set(modules))
        if self.layers_per_block is not None:
            return self._regroup(found, self.layers_per_block)
        names = tuple(self.merge.groups)
        group_of = {m: i for i, members in enumerate(self.merge.groups.values()) for m in members}
        if missing := set(found) - group_of.keys():
            raise InputError(
                f"{self.path}: groups hold no {min(missing)!r}, which an adapter changes. "
                "Add it to a group, or leave that adapter out of adapters and coefficients."
            )
        return Groups(names, group_of)

    def _regroup(self, modules: Sequence[str], layers_per_block: int) -> Groups:
        names = tuple(self.merge.groups)
        for kind in get_args(GroupKind):  # a run's groups are those of its finest stage
            groups = group_modules(modules, kind, layers_per_block)
            if groups.names == names:
                return groups
        raise InputError(
            f"{self.path}: its groups ({names[0]}, ...) are not those of its adapters' modules. "
            "Merge from the run's coefficients.json, which lists them."
        )


def coefficients_document(
    adapters: Sequence[Adapter], coefficients: ArrayLike, groups: Groups, record: MergeRecord
) -> dict[str, Any]:
    """Return the content of coefficients.json: what it takes to redo the merge, and where it is from."""
    table = check_coefficients(coefficients, groups, len(adapters))
    members: dict[str, list[str]] = {name: [] for name in groups.names}
    for module, index in groups.group_of.items():
        members[groups.names[index]].append(module)
    return {
        "schema": COEFFICIENTS_SCHEMA,
        "method": record.method,
        "base": record.base,
        "adapters": [describe_adapter(adapter) for adapter in adapters],
        "groups": members,
        "coefficients": table.tolist(),
        "objective": record.objective,
        "provenance": record.provenance,
    }


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Say which weights an adapter is; rank and scaling list the distinct values over its modules."""
    return {
        "name": adapter.name,
        "id": adapter.source,
        "revision": adapter.revision,
        "sha256": adapter.sha256,
        "rank": sorted({f.A.shape[0] for f in adapter.modules.values()}),
        "scaling": sorted({f.scaling for f in adapter.modules.values()}),
    }


def check_coefficients(coefficients: ArrayLike, groups: Groups, n_adapters: int) -> NDArray[np.float64]:
    """Return the coefficients as an array.

    Raises:
        ValueError: not (n_groups, n_adapters), or not finite.
    """
    table = np.asarray(coefficients, dtype=np.float64)
    expected = (len(groups.names), n_adapters)
    if table.shape != expected:
        raise ValueError(
            f"coefficients have shape {table.shape}, expected (n_groups, n_adapters) = {expected}"
        )
    if not np.isfinite(table).all():
        raise ValueError(f"{np.sum(~np.isfinite(table))} of {table.size} coefficients are not finite")
    return table


def read_merge(source: Path) -> MergeSource:
    """Read what was merged from a coefficients.json, a trace.jsonl, or a folder that holds one.

    Raises:
        InputError: there is none, it is damaged, of a newer schema, or its numbers do not fit together.
    """
    path = _find_source(source)
    if path.suffix == ".jsonl":
        document, layers_per_block = _document_of_trace(path)
        return MergeSource(path, _check_document(document, path), layers_per_block)
    return MergeSource(path, _check_document(_read_document(path), path), None)


def _find_source(source: Path) -> Path:
    if source.is_file():
        return source
    for name in (COEFFICIENTS_FILE, TRACE_FILE):
        if (source / name).is_file():
            return source / name
    found = f"holds neither {COEFFICIENTS_FILE} nor {TRACE_FILE}" if source.is_dir() else "no such file"
    raise InputError(f"{source}: {found}. Give one of these, or the folder of a run.")


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Choose another file.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON ({error}). Give a {COEFFICIENTS_FILE} or .jsonl trace.") from error
    if not isinstance(document, dict):
        raise InputError(
            f"{path}: found a {type(document).__name__}, expected the JSON object of a {COEFFICIENTS_FILE}."
        )
    return document


def _document_of_trace(path: Path) -> tuple[dict[str, Any], int]:
    """Return a trace's winner in the form of coefficients.json, groups without members; layers in a block."""
    trace = Trace.load(path)
    finalists = trace.ending("finalists")
    if finalists is None:
        raise InputError(
            f"{path}: unfinished: found no `finalists` event that stands, expected the search's winner; "
            f"resume it first: python -m search resume {path.parent}"
        )
    try:
        space = trace.header["config"]["search"]["space"]
        layers_per_block = space["layers_per_block"] if isinstance(space, dict) else 1
        return _winner_document(path.name, trace.header, finalists), layers_per_block
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}: its header or `finalists` event lacks what a merge needs ({error!r}). "
            f"Merge from the run's {COEFFICIENTS_FILE}."
        ) from error


def _winner_document(trace_name: str, header: dict[str, Any], finalists: dict[str, Any]) -> dict[str, Any]:
    place = finalists["names"].index(finalists["winner"])
    objective = header["config"]["objective"]
    return {
        "schema": COEFFICIENTS_SCHEMA,
        "method": "concord",
        "base": {**header["base"], "name": header["config"]["base"]["name"]},
        "adapters": header["adapters"],
        "groups": {name: [] for name in header["groups"]},
        "coefficients": finalists["winner_coefficients"],
        "objective": {
            "name": objective["name"],
            "combine": objective["combine"],
            "loss": finalists["losses"][place],
            "per_expert": finalists["per_expert"][place],
        },
        "provenance": {
            "commit": header["commit"],
            "versions": header["versions"],
            "seed": header["seed"],
            "trace": trace_name,
            "winner": finalists["winner"],
        },
    }


def _check_document(document: dict[str, Any], path: Path) -> RecordedMerge:
    schema = document.get("schema")
    if isinstance(schema, int) and schema > COEFFICIENTS_SCHEMA:
        raise InputError(
            f"{path}: found schema {schema}, this version reads up to {COEFFICIENTS_SCHEMA}; "
            "upgrade concord-merge, or use the version that wrote it"
        )
    try:
        merge = RecordedMerge.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_mistake(error)}. Restore it, or merge from the trace.") from None
    shape = len(merge.groups), len(merge.adapters)
    lengths = {len(row) for row in merge.coefficients}
    if len(merge.coefficients) != shape[0] or lengths != {shape[1]}:
        raise InputError(
            f"{path}: coefficients are {len(merge.coefficients)} rows of {sorted(lengths)} numbers, expected "
            f"{shape[0]} rows (groups) of {shape[1]} (adapters). Restore it, or merge from the trace."
        )
    modules = [module for members in merge.groups.values() for module in members]
    if twice := sorted(module for module in set(modules) if modules.count(module) > 1):
        raise InputError(f"{path}: groups hold {twice[0]!r} twice, expected once. Remove one.")
    return merge


def _first_mistake(error: ValidationError) -> str:
    mistake = error.errors()[0]
    first, *rest = mistake["loc"]
    field = str(first) + "".join(f"[{part!r}]" for part in rest)
    if mistake["type"] == "missing":
        return f"{field} is missing"
    found = repr(mistake["input"])[:60]
    return f"{field}: found {found}, expected: {mistake['msg'].removeprefix('Input should be ')}"
