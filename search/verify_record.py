"""Whether a run's own files agree with each other, and with the libraries that are here.

Knows a run's folder, trace and coefficients.json; not weights, prompts or models.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.checks import Check, compare, compare_all, tell_differences
from search.errors import InputError
from search.finalists import SINGLE
from search.provenance import checkout_commit, library_versions
from search.recorded import COEFFICIENTS_FILE, TRACE_FILE, RecordedMerge, read_merge
from search.resume import flatten
from search.trace import Trace

HEADER_FIELDS = "config", "config_sha256", "seed", "objective", "base", "adapters", "groups", "versions"


@dataclass(frozen=True, slots=True, eq=False)
class RunRecord:
    """A finished run, as its folder has it."""

    folder: Path
    trace: Trace
    document: Mapping[str, Any]
    """The content of coefficients.json."""
    merge: RecordedMerge
    """The same, checked."""

    @property
    def header(self) -> Mapping[str, Any]:
        """The trace's first line."""
        return self.trace.header

    @property
    def finalists(self) -> Mapping[str, Any] | None:
        """The event `finalists`; None where there was no time for a search."""
        return self.trace.ending("finalists")

    @property
    def merged(self) -> Mapping[str, Any]:
        """The event `merged`."""
        return self.trace.ending("merged") or {}

    @property
    def winner(self) -> NDArray[np.float64]:
        """(n_groups, n_adapters) coefficients as the trace has them, else as coefficients.json has."""
        table = self.finalists["winner_coefficients"] if self.finalists else self.merge.coefficients
        return np.array(table, dtype=np.float64)


def read_run(folder: Path) -> RunRecord:
    """Read a finished run's folder.

    Raises:
        InputError: there is none, it is no search's, damaged, or half a run.
    """
    path = folder / TRACE_FILE
    if not path.is_file():
        found = "holds no " + TRACE_FILE if folder.is_dir() else "is no folder"
        inner = sorted(folder.glob(f"*/{TRACE_FILE}"))
        below = f"; {inner[0].parent} does" if inner else ""
        raise InputError(f"{folder}: {found}{below}. Give the folder of a run, such as output/my_merge.")
    trace = Trace.load(path)
    if "method" in trace.header:
        raise InputError(f"{path}: a run of {trace.header['method']}; only a search's is verified. Give one.")
    if missing := [name for name in HEADER_FIELDS if name not in trace.header]:
        raise InputError(f"{path}: its header has no {missing[0]!r}; a bundle's trace is not verified.")
    if trace.ending("merged") is None:
        raise InputError(
            f"{path}: half a run: found no `merged` event that stands. Go on with it first: "
            f"python -m search resume {folder}"
        )
    file = folder / COEFFICIENTS_FILE
    if not file.is_file():
        raise InputError(f"{folder}: holds no {COEFFICIENTS_FILE}. Restore it, or search again.")
    merge = read_merge(file).merge
    return RunRecord(folder, trace, json.loads(file.read_text(encoding="utf-8")), merge)


def check_record(record: RunRecord) -> list[Check]:
    """Check what needs no weights.

    Raises:
        InputError: where the trace lacks what a run writes.
    """
    with refuse_damage(record):
        return [
            _check_config(record.header),
            *_check_code(record.header),
            _check_coefficients(record),
            _check_repeats(record),
            _check_winner(record),
            check_ending(record),
        ]


@contextmanager
def refuse_damage(record: RunRecord) -> Iterator[None]:
    """Turn what reading a line without its fields raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{record.folder / TRACE_FILE}: a line lacks what a run writes there ({error!r}). Restore it."
        ) from error


def _check_config(header: Mapping[str, Any]) -> Check:
    """Hold the recorded configuration against its recorded hash, and what repeats it."""
    config = header["config"]
    text = json.dumps(config, sort_keys=True)
    found = compare("config_sha256", header["config_sha256"], hashlib.sha256(text.encode()).hexdigest())
    found += compare("seed", header["seed"], config.get("search", {}).get("seed"))
    return tell_differences("config", found, f"seed {header['seed']}")


def _check_code(header: Mapping[str, Any]) -> list[Check]:
    checks = [tell_differences("versions", compare_all(header["versions"], library_versions()))]
    if found := compare("", header.get("commit"), checkout_commit()):
        checks.append(Check("commit", "note", found[0]))
    return checks


def _check_coefficients(record: RunRecord) -> Check:
    """Hold coefficients.json, and the adapter's copy of it, against the trace."""
    recorded, groups = record.winner, list(record.header["groups"])
    names = [adapter["name"] for adapter in record.header["adapters"]]
    differences = []
    for path in (COEFFICIENTS_FILE, f"adapter/{COEFFICIENTS_FILE}"):
        if (record.folder / path).is_file():
            table = np.array(read_merge(record.folder / path).merge.coefficients)
            if table.shape != recorded.shape:
                differences += compare(f"{path} (groups, adapters)", recorded.shape, table.shape)
                continue
            for group, adapter in np.argwhere(table != recorded).tolist():
                where = f"{path}, {groups[group]} of {names[adapter]}"
                differences += compare(where, recorded[group, adapter], table[group, adapter])
    return tell_differences("coefficients", differences, f"{recorded.size} as in {TRACE_FILE}")


def _check_repeats(record: RunRecord) -> Check:
    """Hold what else coefficients.json repeats of the trace against it."""
    header, merged, document = record.header, record.merged, record.document
    provenance, objective = document.get("provenance", {}), document.get("objective", {})
    expected: dict[str, Any] = {
        "base": _identity(header["base"]),
        "order": [adapter["name"] for adapter in header["adapters"]],
        "adapters": {adapter["name"]: _identity(adapter) for adapter in header["adapters"]},
        "groups": " ".join(header["groups"]),
        "seed": header["seed"],
        "versions": header["versions"],
        "left_out": header.get("left_out", {}),
        "winner": merged["winner"],
        "ended_by": merged["ended_by"],
        "objective": {"name": header["objective"], "combine": header["config"]["objective"]["combine"]},
    }
    if finalists := record.finalists:
        place = finalists["names"].index(finalists["winner"])
        expected["winner"] = finalists["winner"]
        expected["objective"]["loss"] = finalists["losses"][place]
        expected["objective"]["per_expert"] = finalists["per_expert"][place]
    if ended := record.trace.last("search_ended"):
        expected["evaluations"] = ended["evaluations"]
    found = {
        "base": _identity(document["base"]),
        "order": [adapter["name"] for adapter in document["adapters"]],
        "adapters": {adapter["name"]: _identity(adapter) for adapter in document["adapters"]},
        "groups": " ".join(document["groups"]),
        "objective": objective,
        **{key: provenance.get(key) for key in expected.keys() & _OF_PROVENANCE},
    }
    return tell_differences(COEFFICIENTS_FILE, compare_all(flatten(expected), flatten(found)))


_OF_PROVENANCE = {"seed", "versions", "left_out", "winner", "ended_by", "evaluations"}


def _identity(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return which weights they are, wherever they lie."""
    return {key: weights.get(key) for key in ("revision", "sha256", "text_sha256")}


def _check_winner(record: RunRecord) -> Check:
    """Whether the recorded losses name the recorded winner."""
    if (finalists := record.finalists) is None:
        return Check("winner", "ok", f"{record.merged['winner']}; nothing was searched, for want of time")
    winner, names = finalists["winner"], finalists["names"]
    place = names.index(winner)
    may_win = [at for at, verdict in enumerate(finalists["verdicts"]) if verdict in ("winner", "beaten")]
    best = min(may_win, key=lambda at: finalists["losses"][at])
    found = compare("verdict", finalists["verdicts"][place], "winner")
    found += compare("lowest loss is of", winner, names[best])
    found += compare("merged", record.merged["winner"], winner)
    return tell_differences("winner", found, f"{winner}, of {len(names)} finalists")


def check_ending(record: RunRecord) -> Check:
    """Say whether the same run again has to end as this one did: whether the clock had a say."""
    trace, reasons = record.trace, []
    ended, finalists = trace.last("search_ended"), record.finalists
    if ended is None:
        reasons.append("no time to search")
    elif record.merged["ended_by"] != "evaluations":
        reasons.append(f"ended by {record.merged['ended_by']}")
    if trace.ending("finalists_skipped"):
        reasons.append("no time for finalists")
    elif finalists and finalists["prompts"] == "unseen":
        n_singles = sum(name.startswith(SINGLE) for name in finalists["names"])
        reasons += ["no time for all finalists"] if n_singles < len(record.header["adapters"]) else []
        reasons += _cut_refinement(record)
    if trace.last("out_of_memory"):
        reasons.append("memory ran out, and batches were halved")
    answered = trace.last("answered") or {}
    if answered.get("cut") or answered.get("placeholders"):
        reasons.append(f"{answered['cut']} answers cut and {answered['placeholders']} not read")
    if reasons:
        return Check("end", "note", f"{', '.join(reasons)}: another run may end otherwise")
    return Check("end", "ok", "by evaluations, not by the clock")


def _cut_refinement(record: RunRecord) -> list[str]:
    wanted = record.header["config"]["search"]["gradient"]["refine_steps"]
    refined = record.trace.ending("refined")
    done = len(refined["losses"]) - 1 if refined else 0
    return [f"{done} of {wanted} refinement steps"] if done < wanted else []
