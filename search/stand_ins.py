"""What a bundle has in place of what it leaves out: resumption, signals, progress bars, files and pydantic.

Knows the interfaces of what it stands in for; not the kit, nor which module is bundled.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from search.adapters import Adapter
from search.errors import InputError
from search.groups import Groups
from search.loop import Past, Progress
from search.merge import fold_adapters, merge_adapters
from search.outcome import Ending
from search.parts import Parts
from search.priors import PriorStart
from search.setup import Setup, neutral_start
from search.space import FloatArray
from search.trace import Generation, _to_json


class Settings:
    """A section of the configuration: a literal's items as attributes."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = {key: _as_settings(value) for key, value in items.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._items:
            raise AttributeError(name)
        return self._items[name]

    def model_copy(self, *, update: Mapping[str, Any]) -> "Settings":
        """Return a copy with some items replaced."""
        return Settings({**self._items, **update})

    def model_dump(
        self, mode: str = "python", exclude: Sequence[str] | set[str] = (), exclude_none: bool = False
    ) -> dict[str, Any]:
        """Return the items as they were written."""
        kept = {key: value for key, value in self._items.items() if key not in exclude}
        return {k: _as_literal(v) for k, v in kept.items() if not (exclude_none and v is None)}


def _as_settings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Settings(value)
    return tuple(map(_as_settings, value)) if isinstance(value, list | tuple) else value


def _as_literal(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.model_dump()
    return [_as_literal(item) for item in value] if isinstance(value, tuple) else value


class NothingRecorded:
    """In the place of an earlier run's record: there is none."""

    def event(self, name: str) -> None:
        """Return the event of an earlier run."""
        return

    def past(self, stage: int) -> Past:
        """Return what an earlier run recorded of a stage."""
        return Past()


class Uninterrupted:
    """In the place of signal handling, which is the kit's."""

    requested = False

    def defer(self) -> None:
        """Have the next signal ask instead of raise."""

    def check(self) -> None:
        """Raise where somebody asks to end."""


class PrintedProgress:
    """Phases and every tenth of the evaluations, as lines in the log."""

    def __init__(self, max_evaluations: int) -> None:
        self._step = self._next = max(1, max_evaluations // 10)

    def phase(self, name: str) -> None:
        """Show that a phase has begun."""
        logging.getLogger(__name__).info("%s", name)

    def show(self, progress: Progress) -> None:
        """Show where the search stands."""
        if progress.evaluations >= self._next:
            self._next = progress.evaluations + self._step
            done = progress.evaluations, progress.best_loss, max(0.0, progress.left_s)
            logging.getLogger(__name__).info("%d evaluations, best loss %.4f, %.0f s left", *done)


class LenientTrace:
    """A trace that is given up, with a warning, where it cannot be written: the run goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            self._give_up(error)

    def header(self, content: Mapping[str, Any]) -> None:
        """Write what the run depends on."""
        self._write({"kind": "header", "schema": 1, **content})

    def generation(self, generation: Generation) -> None:
        """Write one generation."""
        fields = Generation.__dataclass_fields__
        self._write({"kind": "generation", **{name: getattr(generation, name) for name in fields}})

    def event(self, name: str, /, **content: Any) -> None:
        """Write that something happened."""
        self._write({"kind": "event", "event": name, **content})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(_to_json(line), allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        logging.getLogger(__name__).warning("no trace in %s: %s; going on", self._path, error.strerror)


def time_merge(parts: Parts, coefficients: FloatArray, base_name: str, output: Path) -> float:
    """Merge in memory and throw away: the seconds that it takes."""
    started_s = time.monotonic()
    merge_adapters(parts.adapters, coefficients, parts.groups, base_name=base_name, dtype=parts.model.dtype)
    return time.monotonic() - started_s


def merge_in_kit(setup: Setup, ending: Ending, output: Path) -> dict[str, Any]:
    """Fold the winner into the base, and return it as an adapter's state dict."""
    parts, table = setup.parts, ending.winner.coefficients
    merged = merge_adapters(
        parts.adapters, table, parts.groups, base_name=setup.config.base.name, dtype=parts.model.dtype
    )
    fold_adapters(parts.model, parts.adapters, table, parts.groups)
    return merged.state_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class KitResult:
    """In the place of a run's result."""

    adapters: tuple[Adapter, ...]
    coefficients: FloatArray
    groups: Groups
    merged: Any
    winner: str
    loss: float
    evaluations: int
    ended_by: str
    interrupted: bool
    report: str


def start_in_kit(config: Any, parts: Parts, balanced: FloatArray) -> tuple[PriorStart, dict[str, str] | None]:
    """Return the neutral start, or the bundled prior's for adapters that it knows by name.

    Raises:
        InputError: for a prior of other groups.
    """
    start, spread = neutral_start(config, parts, balanced)
    prior = config.bundled_prior
    if prior is None:
        return PriorStart(start, spread, ()), None
    if list(prior.groups) != list(parts.groups.names):
        raise InputError("the bundled prior has other groups of modules than these adapters; bundle another")
    missing = tuple(name for name in parts.names if name not in prior.names)
    for column, name in enumerate(parts.names):
        if name not in missing:
            known = prior.names.index(name)
            start[:, column] = np.array(prior.start)[:, known]
            spread[:, column] = np.array(prior.spread)[:, known]
    if config.search.space.sign == "non_negative":
        start = start.clip(min=0.0)
    return PriorStart(start, spread, missing), {"source": "bundled", "sha256": prior.sha256}
