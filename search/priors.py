"""A prior: first value and spread of each coefficient, its file, and the start that a search takes from it.

Knows names, hashes and coefficients; not traces (prior_learning.py reads them), models or optimisers.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.errors import InputError
from search.files import write_json
from search.space import FloatArray

PRIOR_SCHEMA = 1
"""Of the file; raised when an old reader would misread a new file."""

_LEARN_AGAIN = "learn it again with `python -m search priors`"
_NAMES_OF_KINDS = (
    (r"model", "model"),
    (r"layers\.\d+-\d+", "block"),
    (r"layer\.\d+", "layer"),
    (r"layer\.\d+\.\w+", "part"),
)
"""How groups of each kind are called; all others are modules."""

_Text = Annotated[str, Field(min_length=1)]
_Counted = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class PriorBase:
    """Which base weights the runs had."""

    id: _Text
    sha256: _Text | None


@dataclass(frozen=True, slots=True)
class PriorObjective:
    """What a run minimised."""

    name: _Text
    combine: _Text


@dataclass(frozen=True, slots=True)
class PriorProvenance:
    """Which code learnt the prior."""

    commit: str | None
    versions: dict[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorRun:
    """One run that a prior was learnt from."""

    trace: _Text
    """Its folder and file name."""
    sha256: _Text
    """Of the trace."""
    seed: _Counted
    evaluations: _Counted
    ended_by: _Text
    objective: PriorObjective
    winner: _Text
    """The finalist's name."""
    loss: float
    """The winner's."""
    adapters: tuple[_Text, ...]
    """Names in the prior, in the run's order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prior:
    """What earlier runs say of coefficients."""

    names: tuple[str, ...]
    """(n_adapters,)."""
    hashes: tuple[str, ...]
    """(n_adapters,) SHA-256 of the adapters' weights."""
    runs_of: tuple[int, ...]
    """(n_adapters,) how many runs had this adapter."""
    groups: tuple[str, ...]
    """(n_groups,)."""
    start: FloatArray
    """(n_groups, n_adapters) first coefficients."""
    spread: FloatArray
    """(n_groups, n_adapters) standard deviation of the first generation, in coefficients."""
    runs: tuple[PriorRun, ...]
    base: PriorBase
    provenance: PriorProvenance


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeutralStart:
    """What a search would start from without a prior."""

    names: Sequence[str]
    """(n_adapters,)."""
    hashes: Sequence[str | None]
    """(n_adapters,) SHA-256 of the adapters' weights; None is like no other."""
    base_sha256: str | None
    """None where it is not known: any base will do."""
    groups: Sequence[str]
    """(n_groups,)."""
    start: FloatArray
    """(n_groups, n_adapters)."""
    spread: FloatArray
    """(n_groups, n_adapters)."""


@dataclass(frozen=True, slots=True, eq=False)
class PriorStart:
    """What a search starts from with a prior."""

    start: FloatArray
    """(n_groups, n_adapters)."""
    spread: FloatArray
    """(n_groups, n_adapters)."""
    missing: tuple[str, ...]
    """Adapters that the prior does not know; they stay neutral."""


def start_from_prior(prior: Prior, neutral: NeutralStart, *, allow_changed: bool) -> PriorStart:
    """Replace the neutral start by the prior's for the adapters that the prior knows, in any order.

    An adapter is known by its hash, whatever its name.

    Args:
        allow_changed: of adapters known by name alone and of another base the start is taken, not refused.

    Raises:
        InputError: for other groups than the prior's, another base, or other weights under a name it knows.
    """
    _check_groups_of_prior(prior.groups, neutral.groups)
    start, spread = neutral.start.copy(), neutral.spread.copy()
    missing, changed = [], dict[str, InputError]()
    if prior.base.sha256 and neutral.base_sha256 not in (None, prior.base.sha256):
        changed["base"] = _refuse_changed("base", neutral.base_sha256, prior.base.sha256)
    for column, (name, sha256) in enumerate(zip(neutral.names, neutral.hashes, strict=True)):
        if sha256 in prior.hashes:
            known = prior.hashes.index(sha256)
        elif name in prior.names:
            known = prior.names.index(name)
            changed[name] = _refuse_changed(f"adapter {name!r}", sha256, prior.hashes[known])
        else:
            missing.append(name)
            continue
        start[:, column], spread[:, column] = prior.start[:, known], prior.spread[:, known]
    if changed and not allow_changed:
        raise next(iter(changed.values()))
    warn = logging.getLogger(__name__).warning
    if missing:
        warn("the prior does not know %s: neutral start there", ", ".join(missing))
    if changed:
        warn("the prior was learnt on other weights of %s; used all the same", ", ".join(changed))
    return PriorStart(start, spread, tuple(missing))


def save_prior(prior: Prior, path: Path) -> None:
    """Write a prior as JSON, whole or not at all.

    Raises:
        InputError: if the file cannot be written.
    """
    adapters = zip(prior.names, prior.hashes, prior.runs_of, strict=True)
    document = {
        "schema": PRIOR_SCHEMA,
        "base": asdict(prior.base),
        "adapters": [{"name": name, "sha256": sha256, "runs": runs} for name, sha256, runs in adapters],
        "groups": prior.groups,
        "start": prior.start.tolist(),
        "spread": prior.spread.tolist(),
        "runs": [asdict(run) for run in prior.runs],
        "provenance": asdict(prior.provenance),
    }
    write_json(path, document)


def load_prior(path: Path) -> Prior:
    """Read what `save_prior` wrote; fields that later versions add are left aside.

    Raises:
        InputError: for a file that cannot be read, is no prior, or has a newer schema.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot read the prior: {reason}. Check `search.prior`.") from error
    try:
        schema = _PriorSchema.model_validate_json(raw).number
        if schema > PRIOR_SCHEMA:
            raise InputError(
                f"{path}: schema: found {schema}, this version reads up to {PRIOR_SCHEMA}; upgrade "
                f"concord-merge, or {_LEARN_AGAIN}"
            )
        content = _PriorFile.model_validate_json(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {describe_flaw(error)}; mend it, or {_LEARN_AGAIN}") from None
    return _build_prior(path, content)


def describe_flaw(error: ValidationError) -> str:
    """Say in a few words on one line where the first flaw is, what was found and what was expected."""
    flaw = error.errors()[0]
    dotted = ".".join(str(part) for part in flaw["loc"])
    expected = flaw["msg"].replace("Input should", "it should")
    if flaw["type"] == "json_invalid":
        return f"not valid JSON ({expected.removeprefix('Invalid JSON: ')})"
    if flaw["type"] == "missing":
        return f"{dotted}: missing"
    return f"{dotted or 'the whole'}: found {repr(flaw['input'])[:80]}; {expected}"


class _PriorSection(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _PriorSchema(_PriorSection):
    number: Annotated[int, Field(alias="schema", ge=1)]


class _PriorAdapter(_PriorSection):
    name: _Text
    sha256: _Text
    runs: Annotated[int, Field(ge=1)]


class _PriorFile(_PriorSection):
    base: PriorBase
    adapters: Annotated[list[_PriorAdapter], Field(min_length=1)]
    groups: Annotated[tuple[_Text, ...], Field(min_length=1)]
    start: list[list[float]]
    spread: list[list[Annotated[float, Field(gt=0)]]]
    runs: tuple[PriorRun, ...]
    provenance: PriorProvenance


def _build_prior(path: Path, content: _PriorFile) -> Prior:
    shape = len(content.groups), len(content.adapters)
    for field, table in (("start", content.start), ("spread", content.spread)):
        if flaw := find_misshapen(table, shape):
            raise InputError(f"{path}: {field}: {flaw}; {_LEARN_AGAIN}")
    names = tuple(adapter.name for adapter in content.adapters)
    hashes = tuple(adapter.sha256 for adapter in content.adapters)
    for field, values in (("groups", content.groups), ("adapters", names), ("adapters", hashes)):
        if twice := [value for value in values if values.count(value) > 1]:
            raise InputError(f"{path}: {field}: found {twice[0]!r} twice, expected once; {_LEARN_AGAIN}")
    return Prior(
        names=names,
        hashes=hashes,
        runs_of=tuple(adapter.runs for adapter in content.adapters),
        groups=content.groups,
        start=np.array(content.start, dtype=np.float64),
        spread=np.array(content.spread, dtype=np.float64),
        runs=content.runs,
        base=content.base,
        provenance=content.provenance,
    )


def find_misshapen(table: Sequence[Sequence[float]], shape: tuple[int, int]) -> str | None:
    """Say how a table differs from the shape (n_groups, n_adapters); None where it does not."""
    widths = sorted({len(row) for row in table} - {shape[1]})
    if len(table) == shape[0] and not widths:
        return None
    found = f"rows of {widths[0]}" if widths else f"{len(table)} rows"
    return f"found {found}, expected (n_groups, n_adapters) = {shape}"


def _check_groups_of_prior(known: Sequence[str], searched: Sequence[str]) -> None:
    if tuple(known) == tuple(searched):
        return
    kind, other = _kind_of_groups(known), _kind_of_groups(searched)
    found = f"this search has {len(searched)} groups of kind {other!r} ({searched[0]}, ...)"
    learnt = f"the prior was learnt on {len(known)} of kind {kind!r} ({known[0]}, ...)"
    cure = "the adapters touch other modules than those of the prior; set `search.prior: null`"
    if kind != other or kind == "block":
        cure = f"set `search.space` so that the groups are of kind {kind!r}, as the prior's are"
    raise InputError(f"{found}, but {learnt}: {cure}")


def _kind_of_groups(groups: Sequence[str]) -> str:
    """Tell the kind of grouping from how the first group is called."""
    return next((kind for pattern, kind in _NAMES_OF_KINDS if re.fullmatch(pattern, groups[0])), "module")


def _refuse_changed(what: str, found: str | None, known: str) -> InputError:
    return InputError(
        f"{what}: found weights with sha256 {str(found)[:12]}, the prior was learnt on "
        f"{known[:12]}: set `search.allow_changed_adapters: true` to use it all the same, or {_LEARN_AGAIN}"
    )
