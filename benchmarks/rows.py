"""The lines of the quality benchmark: read, append, and which of them count.

Knows JSON lines and what makes two runs the same; not how a run is done or shown.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from search.errors import InputError

Row = Mapping[str, Any]
"""One run: what was run, its measures or "failure", and where."""
KEY = ("method", "experts", "seed", "config_sha256", "code_sha256", "cores")
"""What makes two runs the same."""

JOINT, SINGLE, ORACLE, SCALED = "joint LoRA", "best single expert", "oracle search", ", best scale"
"""Methods of lines that labels were used for; the last one comes after the name of a method."""
WEIGHED, PERMUTED = ", weights searched", "my_merge, coefficients permuted"
"""Methods of lines without labels that `-m` does not offer; the first comes after the name of a method."""


def read_rows(path: Path) -> list[Row]:
    """Read the lines of earlier runs; none where there is no file (InputError for a damaged line)."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: no JSON: {error}. Delete the line; its run is done again."
            ) from error
    return rows


def append_row(path: Path, row: Row) -> None:
    """Append one line, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def latest_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the last line of each method, expert set and seed."""
    last = {(row["method"], row["experts"], row["seed"]): row for row in rows}
    return list(last.values())


def measured(rows: Iterable[Row]) -> list[Row]:
    """Return the lines of runs that worked."""
    return [row for row in rows if "failure" not in row]


def is_option(row: Row) -> bool:
    """Say whether a line is of a method that `-m` offers: it uses no labels, and is more than an analysis."""
    return not row.get("labels") and not row.get("no_option")


def is_done(identity: Row, rows: Iterable[Row]) -> bool:
    """Say whether the same run worked before."""
    wanted = [identity.get(name) for name in KEY]
    return any([row.get(name) for name in KEY] == wanted for row in measured(rows))
