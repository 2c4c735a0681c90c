"""Write and read the trace of a search: one JSON object a line, in the order in which things happened.

Knows the schema (docs/TRACE.md) and files, not what the numbers mean. A line is on disk before its writer
returns, so a killed run loses at most the line that it was writing.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from search.errors import InputError

SCHEMA = 1
"""Raised when a reader of the old schema would misread a new trace; new fields alone do not."""

_WAY_OUT = "remove this line and all after it to keep what came before"


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What was asked, what came back, and what it cost."""

    index: int
    """Counts from 0 without gaps."""
    genomes: NDArray[np.float64]
    """(n_candidates, n_params) in the order asked."""
    losses: NDArray[np.float64]
    """(n_candidates,) in the order asked; not finite where scoring failed (null in the file)."""
    per_expert: NDArray[np.float64]
    """(n_candidates, n_experts) what the losses are combined from."""
    evaluations: int
    """Candidates scored so far, these included."""
    n_tokens: int
    """Tokens of this generation's forward passes."""
    elapsed_s: float
    """Since the start of the time box."""
    seconds: float
    """From ask to losses."""
    peak_bytes: int | None = None
    rungs: list[dict[str, Any]] = field(default_factory=list)
    """One a rung: {"prompts": how many by its end, "candidates": [indices in it], "losses": [theirs]}; all
    candidates in one when none is given."""
    stage: int = 0
    """Index of the stage, which says what a genome means."""
    injected: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    """(k, n_params) genomes that were put in before asking."""
    prompt_spread: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """(n_prompts,) standard deviation over candidates of each prompt's disagreement."""

    def __post_init__(self) -> None:
        n = len(self.genomes)
        if not self.injected.size:
            object.__setattr__(self, "injected", np.empty((0, self.genomes.shape[-1])))
        if not self.rungs:
            whole = {"prompts": None, "candidates": list(range(n)), "losses": self.losses}
            object.__setattr__(self, "rungs", [whole])
        if self.genomes.ndim != 2 or self.losses.shape != (n,) or self.per_expert.shape[:-1] != (n,):
            raise ValueError(
                f"generation {self.index}: genomes {self.genomes.shape}, losses {self.losses.shape}, "
                f"per_expert {self.per_expert.shape} are not (n, n_params), (n,), (n, n_experts)"
            )


EventKey = tuple[str, int | None]


def event_key(event: Mapping[str, Any]) -> EventKey:
    """Return what tells events apart: the name, and the index where a name comes more than once."""
    return event["event"], event.get("index")


class TraceWriter:
    """Writes a trace, synced to disk a line at a time: a header first, then generations and events."""

    def __init__(
        self, path: Path, *, n_kept_bytes: int = 0, kept_events: Set[EventKey] = frozenset()
    ) -> None:
        """Open the file, replacing what is there, or going on after its first bytes.

        Args:
            path: of the file.
            n_kept_bytes: how much of it stays: whole lines, a header among them. 0 for a new trace.
            kept_events: events that stand in it and are not to be written again, by `event_key`.
        """
        self._path = path
        self._size = n_kept_bytes
        self._has_header = n_kept_bytes > 0
        self._kept_events = kept_events
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if n_kept_bytes else "wb", buffering=0)
            self._file.truncate(n_kept_bytes)
            self._file.seek(n_kept_bytes)
        except OSError as error:
            raise self._refusal(error) from error

    def header(self, content: Mapping[str, Any]) -> None:
        """Write what the run depends on: config, input hashes, versions, seed, hash of the prompts."""
        if self._has_header:
            raise ValueError(f"{self._path}: the trace has its header already")
        self._has_header = True
        self._write("header", {"schema": SCHEMA}, content)

    def generation(self, generation: Generation) -> None:
        """Write one generation."""
        content = {f.name: getattr(generation, f.name) for f in fields(generation)}
        self._write("generation", {}, content)

    def event(self, name: str, /, **content: Any) -> None:
        """Write that something happened: a phase began, finalists were scored, memory ran out."""
        if event_key({"event": name, **content}) not in self._kept_events:
            self._write("event", {"event": name}, content)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, kind: str, marks: dict[str, Any], content: Mapping[str, Any]) -> None:
        """Put one whole line on disk, or leave the file as it was."""
        if not self._has_header:
            raise ValueError(f"{self._path}: a trace starts with its header, found kind {kind!r}")
        line = {"kind": kind, **marks}
        if taken := line.keys() & content.keys():
            raise ValueError(f"{self._path}: a {kind} may not have fields named {sorted(taken)}")
        encoded = json.dumps(_to_json({**line, **content}), allow_nan=False).encode() + b"\n"
        try:
            self._append(encoded)
        except OSError as error:
            raise self._refusal(error) from error

    def _append(self, encoded: bytes) -> None:
        try:
            rest = memoryview(encoded)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:  # Ctrl-C too: half a line in the middle of a trace would make it unreadable
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size += len(encoded)

    def _refusal(self, error: OSError) -> InputError:
        reason = error.strerror or str(error)
        return InputError(f"cannot write {self._path}: {reason}. Free space or choose another folder.")


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace read back."""

    header: dict[str, Any]
    generations: list[Generation]
    events: list[dict[str, Any]]
    n_bytes: int = 0
    """Length of the file without a last line that was cut off."""

    def last(self, name: str) -> dict[str, Any] | None:
        """Return the last event of this name, None where there is none."""
        return next((event for event in reversed(self.events) if event["event"] == name), None)

    def ending(self, name: str) -> dict[str, Any] | None:
        """Return the last event of this name, of those that a run's end writes; None where it does not stand.

        What a run wrote of its end is void once the search went on: generations follow, or it was resumed
        after an interrupt. One in the finalists leaves the search's own end, which is not written anew.
        """
        searched = (self.last("search_ended") or {}).get("generations")
        if searched not in (None, len(self.generations)):
            return None
        standing, phase = None, None
        for event in self.events:
            if event["event"] == name:
                standing = event
            elif event["event"] == "interrupt":
                phase = event.get("phase")
            elif event["event"] == "resumed":
                interrupted = phase == "search" or (phase is not None and name != "search_ended")
                if interrupted or (standing or {}).get("ended_by") == "interrupt":
                    standing = None
                phase = None
        return standing

    @classmethod
    def load(cls, path: Path | str) -> "Trace":
        """Read a trace; a last line that was cut off while written is left out.

        Raises:
            InputError: for a file without header, of a newer schema, or damaged before its last line.
        """
        path = Path(path)
        lines, n_bytes = _read_lines(path)
        if not lines or lines[0].get("kind") != "header":
            raise InputError(
                f"{path}: no trace: its first line is no header; choose a trace.jsonl of `search run`"
            )
        _check_schema(path, lines[0].get("schema"))
        trace = cls(header=lines[0], generations=[], events=[], n_bytes=n_bytes)
        for number, line in enumerate(lines[1:], start=2):
            try:
                trace._take(line)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}:{number}: damaged line: {error!r}; {_WAY_OUT}") from error
        return trace

    def _take(self, line: dict[str, Any]) -> None:
        if line["kind"] == "event":
            self.events.append(line)
        elif line["kind"] == "generation":
            self.generations.append(_to_generation(line, len(self.generations)))
        else:
            raise ValueError(f"kind {line['kind']!r} is neither 'generation' nor 'event'")


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Parse all lines but a torn last one; return also how many bytes they are."""
    try:
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        cure = f"give {path / 'trace.jsonl'}" if path.is_dir() else "give the trace.jsonl of a run"
        raise InputError(f"{path}: cannot read the trace: {error.strerror or error}; {cure}") from error
    lines = []
    n_bytes = 0
    for number, text in enumerate(raw, start=1):
        is_last = number >= len(raw) - 1  # behind its line end comes an empty text
        try:
            if number == len(raw):
                if text:
                    raise ValueError("no line end")
                break
            line = json.loads(text.decode())
            if not isinstance(line, dict):
                raise ValueError(f"found a {type(line).__name__}, expected an object")
        except ValueError as error:
            if not is_last or any(raw[number:]):
                raise InputError(f"{path}:{number}: damaged line: {error}; {_WAY_OUT}") from error
            logging.getLogger(__name__).warning("%s:%d: the last line was cut off; left out", path, number)
            break
        lines.append(line)
        n_bytes += len(text) + 1
    return lines, n_bytes


def _check_schema(path: Path, schema: object) -> None:
    if not isinstance(schema, int) or schema < 1:
        raise InputError(f"{path}: found schema {schema!r}, expected a number from 1 to {SCHEMA}")
    if schema > SCHEMA:
        raise InputError(
            f"{path}: found schema {schema}, this version reads up to {SCHEMA}; "
            "upgrade concord-merge, or use the version that wrote it (`versions` in the first line)"
        )


def _to_generation(line: dict[str, Any], expected_index: int) -> Generation:
    """Rebuild a generation, null becoming NaN; fields of later versions are ignored."""
    optional = {
        f.name for f in fields(Generation) if f.default is not MISSING or f.default_factory is not MISSING
    }
    known = {f.name: line[f.name] for f in fields(Generation) if f.name in line or f.name not in optional}
    for name in known.keys() & {"genomes", "losses", "per_expert", "injected", "prompt_spread"}:
        known[name] = np.array(known[name], dtype=np.float64)
    if known["index"] != expected_index:
        raise ValueError(f"generation {known['index']}, expected {expected_index}")
    return Generation(**known)


def _to_json(value: Any) -> Any:
    """Turn arrays and tuples into lists, and numbers that are not finite into null."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_to_json(item) for item in value]
    return value
