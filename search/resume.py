"""What an earlier run left in the trace, and whether this run is its continuation.

Knows headers, events and generations; not how any of them is made.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.errors import InputError
from search.loop import Past
from search.trace import EventKey, Trace, event_key

_REPEATED = {"out_of_memory", "interrupt", "resumed"}
_ENDINGS = {"search_ended", "refined", "finalists_skipped", "finalists", "merged"}
_PLACES = {"source", "name", "about", "prior", "adapters_missing"}
"""Settings that say where weights lie, what they are called or whether they may be missing: which weights are
there, and their hashes, is compared instead."""


@dataclass(frozen=True, slots=True)
class Record:
    """An earlier run of the same search, or nothing."""

    trace: Trace | None = None

    @property
    def n_bytes(self) -> int:
        """Of the trace, without a line that was cut off; 0 for nothing."""
        return self.trace.n_bytes if self.trace else 0

    @property
    def elapsed_s(self) -> float:
        """Seconds that the earlier run had used at its last record."""
        if self.trace is None:
            return 0.0
        events = [event["elapsed_s"] for event in self.trace.events if "elapsed_s" in event]
        return max([*events, *(generation.elapsed_s for generation in self.trace.generations)], default=0.0)

    @property
    def kept_events(self) -> frozenset[EventKey]:
        """Events that stand: of an end by interrupt, none."""
        return frozenset(event_key(event) for event in self._standing())

    def event(self, name: str) -> Mapping[str, Any] | None:
        """Return the event of this name that stands, None where there is none."""
        return next((event for event in self._standing() if event["event"] == name), None)

    def past(self, stage: int) -> Past:
        """Return what is known of a stage of the search."""
        if self.trace is None:
            return Past()
        generations = [generation for generation in self.trace.generations if generation.stage == stage]
        ends = [event for event in self._standing() if event_key(event) == ("stage_ended", stage)]
        return Past(generations, ends[0]["ended_by"] if ends else None)

    def _standing(self) -> list[Mapping[str, Any]]:
        """The events that stand; an interrupt takes back the ends that were written because of it."""
        events: dict[EventKey, Mapping[str, Any]] = {}
        phase: str | None = None
        for event in self.trace.events if self.trace else ():
            if event["event"] == "interrupt":
                phase = event["phase"]
            elif event["event"] == "resumed":
                events, phase = _take_back_ends(events, phase), None
            elif event["event"] not in _REPEATED:
                events[event_key(event)] = event
        return list(_take_back_ends(events, phase).values())


def _take_back_ends(
    events: dict[EventKey, Mapping[str, Any]], phase: str | None
) -> dict[EventKey, Mapping[str, Any]]:
    """Leave out what an interrupt in this phase (None for no interrupt) made final too early."""
    early = {None: set(), "search": _ENDINGS}.get(phase, _ENDINGS - {"search_ended"})
    return {
        key: event
        for key, event in events.items()
        if key[0] not in early and event.get("ended_by") != "interrupt"
    }


def read_record(path: Path) -> Record:
    """Read what is there: nothing where there is no file, or not even one whole line.

    Raises:
        InputError: for a file that is no trace, or a damaged one.
    """
    try:
        if b"\n" not in path.read_bytes():
            return Record()
    except (FileNotFoundError, NotADirectoryError):
        return Record()
    except OSError as error:
        raise InputError(f"{path}: cannot read the trace: {error.strerror or error}") from error
    return Record(Trace.load(path))


def refuse_changes(record: Record, header: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with other inputs than the trace in `path` was begun with.

    Raises:
        InputError: that names the first setting, weights, library or device that differs.
    """
    if record.trace is None:
        return
    before = flatten({key: record.trace.header.get(key) for key in header})
    now = flatten(header)
    for key in sorted(before.keys() | now.keys(), key=_by_importance):
        if before.get(key) != now.get(key) and not _is_place(key):
            raise InputError(
                f"{path}: begun with {key} = {before.get(key)!r}, now it is {now.get(key)!r}. Set it back to "
                "go on, choose another --out for a new search, or make a prior of this one with "
                "`python -m search priors`."
            )
    for key in ("commit", "device_name", "cpu"):
        if record.trace.header.get(key, header.get(key)) != header.get(key):
            logging.getLogger(__name__).warning(
                "%s: begun with %s %s, going on with %s",
                path,
                key,
                record.trace.header.get(key),
                header.get(key),
            )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings and sequences into dotted keys; what has a name is keyed by it."""
    if isinstance(value, Mapping):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list | tuple):
        named = all(isinstance(item, Mapping) and "name" in item for item in value)
        items = [(item["name"] if named else place, item) for place, item in enumerate(value)]
        if named:
            items.insert(0, ("order", " ".join(item["name"] for item in value)))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _is_place(key: str) -> bool:
    """Whether a change of this key does not change the search."""
    first, last = key.split(".")[0], key.rsplit(".", 1)[-1]
    if first == "config":
        return last in _PLACES
    passing = "commit", "device_name", "cpu", "config_sha256", "schema", "folder"
    return first in passing or last in ("id", "source")


def _by_importance(key: str) -> tuple[bool, bool, str]:
    """Settings first, and first of them which adapters there are: the rest may follow from these."""
    return not key.startswith("config."), not key.endswith("adapters.order"), key
