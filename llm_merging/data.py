"""Read query files: CSV rows into checked `Query` values.

Knows the competition's CSV format, not models: token counts are the caller's.
"""

import ast
import csv
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from search.errors import InputError

MULTIPLE_CHOICE = "multiple_choice"
GENERATION = "generation"
COLUMNS = ("id", "input", "eval_type", "answer_choices")
MAX_CHOICES_CHARS = 100_000
_STRING = r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\""
# Only a flat list of plain string literals reaches the parser: no nesting, calls, numbers or prefixes.
_LIST_OF_STRINGS = re.compile(rf"\[\s*(?:{_STRING})(?:\s*,\s*(?:{_STRING}))*\s*,?\s*\]")


@dataclass(frozen=True, slots=True)
class Query:
    """One row of a query file; `answer_choices` is empty for generation."""

    id: str
    input: str
    eval_type: str
    answer_choices: tuple[str, ...] = ()


def read_queries(path: Path) -> list[Query]:
    """Read and check a query file; columns other than the four needed (`target`, say) are ignored.

    Raises:
        InputError: naming the file, the row's id and what is wrong with it.
    """
    rows = _read_rows(path)
    queries = [_to_query(path, row) for row in rows]
    seen: set[str] = set()
    for query in queries:
        if query.id in seen:
            raise InputError(f"{path}: the id {query.id!r} is used twice. Give every row its own id.")
        seen.add(query.id)
    return queries


def parse_choices(text: str) -> tuple[str, ...]:
    """Parse the text of a Python list of strings, quoted either way.

    Raises:
        ValueError: saying what is wrong, for anything but a non-empty flat list of strings.
    """
    text = text.strip()
    if len(text) > MAX_CHOICES_CHARS:
        raise ValueError(f"is {len(text)} characters long, more than {MAX_CHOICES_CHARS}")
    if not _LIST_OF_STRINGS.fullmatch(text):
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise ValueError(f"is {shown!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a choice is only deprecated, and is what it looks like
            choices = tuple(ast.literal_eval(text))
        "".join(choices).encode()  # half of a surrogate pair is no text: UnicodeEncodeError
        return choices
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"has a broken escape ({getattr(error, 'msg', error)})") from error


def check_lengths(
    queries: Sequence[Query], n_input_tokens: Sequence[int], n_answer_tokens: Sequence[int], context: int
) -> None:
    """Refuse a query that, with the longest answer it may get, does not fit the model's context.

    Raises:
        InputError: naming the row's id and the token counts.
    """
    for query, n_input, n_answer in zip(queries, n_input_tokens, n_answer_tokens, strict=True):
        if n_input + n_answer > context:
            raise InputError(
                f"row {query.id!r}: the input is {n_input} tokens and its answer up to {n_answer}, "
                f"but the model's context is {context} tokens. Shorten the input or drop the row."
            )


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Return the file's rows as dicts that hold every needed column."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}. Check the path of the query file."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from error
    if not text.strip():
        raise InputError(f"{path}: the file is empty. Expected the columns {', '.join(COLUMNS)}.")
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
        header = list(reader.fieldnames or ())
    except csv.Error as error:
        raise InputError(
            f"{path}: broken CSV near line {reader.line_num + 1}: {error}. Check the quotes there."
        ) from error
    _check_header(path, header)
    if not rows:
        raise InputError(f"{path}: there is a header but no row. Give it at least one query.")
    return rows


def _check_header(path: Path, header: list[str]) -> None:
    for column in COLUMNS:
        if header.count(column) != 1:
            what = "missing" if column not in header else "there twice"
            raise InputError(
                f"{path}: the column {column!r} is {what}; found {', '.join(header)}. "
                f"Expected {', '.join(COLUMNS)}."
            )


def _to_query(path: Path, row: dict[str, str]) -> Query:
    """Check one row; csv marks missing cells with None values and surplus cells with a None key."""
    if None in row or None in row.values():
        raise InputError(
            f"{path}: row {row['id']!r} has more or fewer cells than the header. "
            "Quote cells that hold commas."
        )
    if not row["id"].strip():
        raise InputError(f"{path}: a row has no id (its input starts {row['input'][:30]!r}). Give it one.")
    if row["eval_type"] not in (MULTIPLE_CHOICE, GENERATION):
        raise InputError(
            f"{path}: row {row['id']!r} has the eval_type {row['eval_type']!r}. "
            f"Expected {MULTIPLE_CHOICE} or {GENERATION}."
        )
    if row["eval_type"] == GENERATION:
        return Query(row["id"], row["input"], GENERATION)
    try:
        choices = parse_choices(row["answer_choices"])
    except ValueError as error:
        raise InputError(
            f"{path}: row {row['id']!r}: answer_choices {error}. "
            "Expected a Python list of strings, such as ['yes', 'no']."
        ) from error
    return Query(row["id"], row["input"], MULTIPLE_CHOICE, choices)
