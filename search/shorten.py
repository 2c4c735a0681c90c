"""Shorten Python source without changing what it does: fewer checks, docstrings of a line, notes as comments.

Knows Python's syntax tree and rows of text; not what the code does, nor which of it is kept.
"""

import ast
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import pairwise

from search.errors import InputError

BUNDLE_WIDTH = 110
CALLERS_MISTAKES = {"ValueError", "RuntimeError"}
"""What search/ raises for a caller's mistake, which a bundle's one caller does not make; a user's differs."""
Edits = dict[int, list[str]]
"""Row -> the rows in its place."""
SHORTEST_NOTE = 24
"""Characters; a note that would be cut to fewer stays whole, above what it is on."""
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_CALL = re.compile(r"[\w\])]\($")
"""Opens a call's or a definition's arguments, not a tuple."""
_SENTENCE_END = re.compile(r"(?<=[.])\s+(?=[A-Z])")


@cache
def drop_checks(text: str) -> str:
    """Return a module's text without checks of callers, and without what only they use."""
    tree, rows, gone = ast.parse(text), text.split("\n"), set[int]()
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        dropped = list(_drop_from(function))
        if dropped:
            dropped += _drop_unused(function, dropped)
        for node in dropped:
            begin, end = span(node)
            gone |= set(range(with_comments(rows, begin), end))
    for holder in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
        for part in [p for p in holder.body if isinstance(p, ast.FunctionDef) and not p.body]:
            gone |= set(range(*span(part)))
    return _return_at_once("\n".join(row for place, row in enumerate(rows) if place not in gone))


def _return_at_once(text: str) -> str:
    """Return values that are but named before they are returned."""
    rows = text.split("\n")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    for body in [function.body for function in functions if len(function.body) > 1]:
        named, last = body[-2:]
        names = ", ".join(map(ast.unparse, named.targets)) if isinstance(named, ast.Assign) else None
        if isinstance(last, ast.Return) and last.value and ast.unparse(last.value) == names:
            begin, value = named.lineno - 1, named.value  # type: ignore[attr-defined]
            rows[begin] = f"{rows[begin][: named.col_offset]}return {rows[begin][value.col_offset :]}"
            rows[last.lineno - 1] = ""
    return "\n".join(rows)


def keep_items(text: str, name: str, keys: Collection[str]) -> str:
    """Return a module's text with but these items in the dictionary of a name.

    Raises:
        InputError: if there is no such dictionary.
    """
    gone = set[int]()
    for node in ast.parse(text).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        literal = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == name and isinstance(literal, ast.Dict):
            begins = [key.lineno - 1 for key in literal.keys if key] + [(literal.end_lineno or 0) - 1]
            for place, key in enumerate(literal.keys):
                if isinstance(key, ast.Constant) and key.value not in keys:
                    gone |= set(range(begins[place], begins[place + 1]))
            return "\n".join(row for place, row in enumerate(text.split("\n")) if place not in gone)
    raise InputError(f"search/ has no dictionary {name} to shorten")


def _drop_from(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    """Take checks out of a function, and loops over nothing but checks."""
    for node in [function, *reversed(list(ast.walk(function)))]:
        for part in ("body", "orelse", "finalbody"):
            body = getattr(node, part, None)
            is_elif = part == "orelse" and isinstance(node, ast.If) and len(node.orelse) == 1
            if isinstance(body, list) and not is_elif:
                for statement in [s for s in body if _is_check(s) or (isinstance(s, ast.For) and not s.body)]:
                    body.remove(statement)
                    yield statement


def _is_check(node: ast.stmt) -> bool:
    if not isinstance(node, ast.If) or node.orelse or len(node.body) != 1:
        return False
    raised = node.body[0]
    return isinstance(raised, ast.Raise) and (
        isinstance(raised.exc, ast.Call)
        and isinstance(raised.exc.func, ast.Name)
        and raised.exc.func.id in CALLERS_MISTAKES
    )


def _drop_unused(function: ast.FunctionDef, dropped: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Take out assignments that only the dropped checks read."""
    asked = {name for check in dropped for name in _read_names(check)}
    unused = asked - set(_read_names(function))
    for node in list(ast.walk(function)):
        body = getattr(node, "body", None)
        for statement in [s for s in body if isinstance(s, ast.Assign)] if isinstance(body, list) else []:
            target = statement.targets[0]
            if isinstance(target, ast.Name) and target.id in unused and isinstance(body, list):
                body.remove(statement)
                yield statement


def _read_names(node: ast.AST) -> Iterator[str]:
    return (p.id for p in ast.walk(node) if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Load))


def span(node: ast.stmt) -> tuple[int, int]:
    """Return the rows of a statement, decorators included: the first, and the one behind the last."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]) - 1, node.end_lineno or node.lineno


def with_comments(lines: Sequence[str], begin: int) -> int:
    """Return the row at which the comments above a row begin."""
    while begin and lines[begin - 1].lstrip().startswith("#"):
        begin -= 1
    return begin


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a text: a docstring, or a note on what stands before it."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def shorten_texts(nodes: Sequence[ast.stmt], lines: Sequence[str]) -> Edits:
    """Return what turns docstrings in statements into their first lines, and notes into comments."""
    edits: Edits = _shorten_notes(nodes, lines)
    for node in [part for top in nodes for part in ast.walk(top)]:
        body = getattr(node, "body", None)
        if isinstance(body, list) and isinstance(node, ast.stmt):
            edits |= _shorten_notes(body, lines)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and body and is_text(body[0]):
                is_start = node.name == "__init__" and len(body) > 1  # the class says what it is
                edits |= _nothing(*span(body[0])) if is_start else _shorten_docstring(body[0], lines)
    return edits


def _shorten_docstring(node: ast.stmt, lines: Sequence[str]) -> Edits:
    begin, end = span(node)
    if end == begin + 1:
        return {}
    first = shorten_row(lines[begin].rstrip(), BUNDLE_WIDTH - 3)
    return {begin: [first + '"""'], **_nothing(begin + 1, end)}


def shorten_row(row: str, width: int) -> str:
    """Return a row of prose without its last clauses, else words, as many as must go to fit the width."""
    while len(row) > width and re.search(r"[;:] ", row):
        row = re.split(r"[;:] [^;:]*$", row)[0] + "."
    return row if len(row) <= width else row[: width - 3].rsplit(" ", 1)[0].rstrip(",.") + " ..."


def _shorten_notes(body: Sequence[ast.stmt], lines: Sequence[str]) -> Edits:
    """Return what puts the first sentence of each note behind its assignment, else above it."""
    edits: Edits = {}
    for node, note in pairwise(body):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not is_text(note):
            continue
        begin, end = span(note)
        text = " ".join(row.strip() for row in lines[begin:end])[3:-3]
        text = _SENTENCE_END.split(text)[0].strip().removesuffix(".")
        first, behind = span(node)
        row = lines[first]
        indent = row[: len(row) - len(row.lstrip())]
        edits |= _nothing(behind, end)
        short = shorten_row(text, BUNDLE_WIDTH - len(row) - 4)
        is_said = short == text or (len(short) >= SHORTEST_NOTE and not short.endswith("..."))
        if behind == first + 1 and "#" not in row and is_said:
            edits[first] = [f"{row}  # {short.removesuffix('.')}"]
        else:
            comment = textwrap.wrap(text, BUNDLE_WIDTH - len(indent) - 2)
            edits[first] = [*(f"{indent}# {piece}" for piece in comment), row]
    return edits


def join_rows(text: str) -> str:
    """Put what stands in brackets an item a row into one row, where that fits, as a formatter would."""
    rows = text.split("\n")
    begin = len(rows)
    while begin:
        begin -= 1
        end = _find_bracket_end(rows, begin)
        if end is not None:
            indent, inner = (
                _indent_of(rows[begin]),
                " ".join(row.strip() for row in rows[begin + 1 : end])[:-1],
            )
            whole = rows[begin] + inner + rows[end].strip()
            if len(whole) <= BUNDLE_WIDTH and not whole.endswith(tuple(_PAIRS)):
                rows[begin : end + 1] = [whole]
            elif _CALL.search(rows[begin]) and len(indent) + 4 + len(inner) <= BUNDLE_WIDTH:
                rows[begin + 1 : end] = [f"{indent}    {inner}"]
    return "\n".join(rows)


def _find_bracket_end(rows: Sequence[str], begin: int) -> int | None:
    """Return the row that closes what a row opens, if between them are items, one a row, and no comment."""
    opening = rows[begin][-1:]
    if opening not in _PAIRS or rows[begin].lstrip().startswith(("#", '"', "@", "from ")):
        return None
    indent = _indent_of(rows[begin])
    for place in range(begin + 1, len(rows)):
        row = rows[place]
        if row.startswith(indent + _PAIRS[opening]):
            is_tuple = place == begin + 2 and opening == "(" and not _CALL.search(rows[begin])
            return place if place > begin + 1 and not is_tuple else None
        is_item = _indent_of(row) == indent + "    " and row.endswith(",") and "#" not in row
        if not is_item or row.lstrip().startswith(")"):
            return None
    return None


def _indent_of(row: str) -> str:
    return row[: len(row) - len(row.lstrip())]


def _nothing(begin: int, end: int) -> Edits:
    return {row: [] for row in range(begin, end)}
