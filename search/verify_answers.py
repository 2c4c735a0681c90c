"""Whether a run's answers are all there, in order, and the ones that were recorded.

Knows CSV files and the event `answered`; not models, nor what a good answer is.
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from search.checks import Check, compare, tell_differences
from search.errors import InputError
from search.files import sha256_file
from search.verify_record import RunRecord, refuse_damage

COLUMNS_OF_ANSWERS = ["id", "prediction", "dummy_field"]


def check_answers(record: RunRecord) -> list[Check]:
    """Check each file of answers that the run recorded.

    Raises:
        InputError: where the trace lacks what a run writes.
    """
    if (answered := record.trace.last("answered")) is None:
        return [Check("answers", "note", "the run answered no queries")]
    with refuse_damage(record):
        return [_check_file(record, file) for file in answered["files"]]


def find_answers(record: RunRecord, file: Mapping[str, Any]) -> Path:
    """Return where a file of answers lies: in the folder, as in a submission, or where it was written."""
    inside = record.folder / Path(file["answers"]).name
    return inside if inside.is_file() else record.folder / file["answers"]


def find_queries(record: RunRecord, file: Mapping[str, Any]) -> Path | None:
    """Return the query file, seen from where the run began or from here; None where there is none."""
    places = (Path(root, file["queries"]) for root in (record.header.get("folder") or "", ""))
    return next((place for place in places if place.is_file()), None)


def _check_file(record: RunRecord, file: Mapping[str, Any]) -> Check:
    answers, queries = find_answers(record, file), find_queries(record, file)
    name = f"answers {Path(os.path.normpath(answers))}"
    if not answers.is_file():
        return Check(name, "differs", f"recorded {file['rows']} rows, found no such file")
    differences, ids = [], None
    if queries is not None:
        differences = compare(f"{queries} sha256", file["queries_sha256"], sha256_file(queries))
        ids = None if differences else read_ids(queries)
    differences = [
        *find_flaws(answers, file["rows"], ids),
        *compare("sha256", file["sha256"], sha256_file(answers)),
        *differences,
    ]
    unseen = "" if queries else f"; {file['queries']} is not here: ids not held against it"
    return tell_differences(name, differences, f"{file['rows']} rows, none empty{unseen}")


def find_flaws(answers: Path, rows: int, ids: Sequence[str] | None) -> Iterator[str]:
    """Say what the leaderboard, or the kit, would refuse in a file of answers.

    Args:
        rows: that it should have.
        ids: (n_rows,) that it should have, in order, where they are known.
    """
    try:
        header, *cells = _read_cells(answers)
    except (OSError, ValueError, csv.Error) as error:
        yield f"cannot be read: {error}"
        return
    yield from compare("columns", COLUMNS_OF_ANSWERS, header)
    yield from compare("rows", rows, len(cells))
    found = [row[0] for row in cells]
    if ids is not None and found != list(ids):
        missing, strange = (sorted(set(a) - set(b)) for a, b in ((ids, found), (found, ids)))
        what = [*(f"no id {one}" for one in missing[:1]), *(f"a strange id {one}" for one in strange[:1])]
        yield f"ids differ: {', '.join(what) or 'another order, or one twice'}"
    empty = [row[0] for row in cells if len(row) != len(COLUMNS_OF_ANSWERS) or not row[1].strip()]
    if empty:
        yield f"{len(empty)} without a prediction, id {empty[0]} for one"


def read_ids(queries: Path) -> list[str]:
    """Return the column `id` of a query file.

    Raises:
        InputError: if it has none.
    """
    header, *rows = _read_cells(queries)
    if "id" not in header:
        raise InputError(f"{queries}: found no column `id`. Give the query file that was answered.")
    return [row[header.index("id")] for row in rows]


def _read_cells(path: Path) -> list[list[str]]:
    """Return all rows, the header first; blank lines are no rows.

    Raises:
        ValueError: for an empty file, or one that is not UTF-8.
    """
    text = path.read_bytes().decode("utf-8-sig")
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    if not rows:
        raise ValueError("the file is empty")
    return rows
