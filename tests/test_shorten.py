"""Source gets shorter and does the same: checks, docstrings, notes and brackets, each before and after."""

import ast
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest

from search.errors import InputError
from search.shorten import drop_checks, join_rows, keep_items, shorten_row, shorten_texts, span

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "search").glob("*.py"))
CHECKS = {
    "a caller's mistake is not looked for": (
        """
        def f(x):
            if x < 0:
                raise ValueError(x)
            return x
        """,
        """
        def f(x):
            return x
        """,
    ),
    "a user's is": (
        """
        def f(x):
            if x < 0:
                raise InputError(x)
            return x
        """,
        None,
    ),
    "what only the check reads goes with it, comments too": (
        """
        def f(x):
            low = min(x)
            total = sum(x)
            # below zero there is nothing
            if low < 0 or total < 0:
                raise RuntimeError(f"{low}")
            return [total]
        """,
        """
        def f(x):
            total = sum(x)
            return [total]
        """,
    ),
    "other branches stay": (
        """
        def f(x):
            if x < 0:
                raise ValueError(x)
            elif x > 9:
                raise ValueError(x)
            if x == 5:
                x = 6
                raise ValueError(x)
            return x
        """,
        None,
    ),
    "a loop over checks and a method of checks go": (
        """
        class A:
            x: int

            def __post_init__(self):
                for y in (self.x,):
                    if y < 0:
                        raise ValueError(y)

            def g(self):
                return 1
        """,
        """
        class A:
            x: int


            def g(self):
                return 1
        """,
    ),
    "a value is returned at once where only a check stood between": (
        """
        def f(x):
            table = make(
                x, table=1
            )
            if not table:
                raise ValueError(x)
            return table
        """,
        """
        def f(x):
            return make(
                x, table=1
            )

        """,
    ),
}


@pytest.mark.parametrize("case", CHECKS)
def test_checks(case):
    before, after = CHECKS[case]
    assert drop_checks(dedent(before)).strip() == dedent(after or before).strip()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_module_is_source_without_checks(path):
    compile(drop_checks(path.read_text(encoding="utf-8")), path.name, "exec")


def test_a_dictionary_keeps_some_items():
    text = 'A: dict = {\n    "x": 1,\n    "y": (\n        2\n    ),\n    "z": 3,\n}\nB = {"x": 1}\n'
    assert keep_items(text, "A", {"z"}) == 'A: dict = {\n    "z": 3,\n}\nB = {"x": 1}\n'
    with pytest.raises(InputError, match="no dictionary C"):
        keep_items(text, "C", {"z"})


def shorten(text):
    tree, lines = ast.parse(text), text.split("\n")
    edits = shorten_texts(tree.body, lines)
    return "\n".join(row for place, old in enumerate(lines) for row in edits.get(place, [old]))


def test_docstrings_and_notes_are_a_line():
    before = '''
    class A:
        """First.

        More, with `x`.
        """

        def __init__(self):
            """Start."""
            self.x = 1
            """One. Or two."""

        size: int
        """(n,) how large it is to become: as large as it gets, %s."""


    LIMIT = 3
    """Most."""
    TABLE = {
        1: 2,
    }
    """Rows of it."""
    '''
    after = '''
    class A:
        """First."""

        def __init__(self):
            self.x = 1  # One

        size: int  # (n,) how large it is to become


    LIMIT = 3  # Most
    # Rows of it.
    TABLE = {
        1: 2,
    }
    '''
    long = "and on " * 12
    assert shorten(dedent(before) % long) == dedent(after).replace("Rows of it.", "Rows of it")


def test_a_row_loses_clauses_before_words():
    assert shorten_row("Do this: by that; or so.", 99) == "Do this: by that; or so."
    assert shorten_row("Do this: by that; or so.", 18) == "Do this: by that."
    assert shorten_row("Do this, which is long, at once.", 20) == "Do this, which ..."


def test_rows_in_brackets_are_joined_where_they_fit():
    wide = "x" * 100
    before = f"""
    f(
        a,
        b=g(1),
    )
    function(
        "{wide}",
        2,
    )
    t = (
        1,
    )
    z = [
        1,  # one
        2,
    ]
    """
    after = f"""
    f(a, b=g(1))
    function(
        "{wide}", 2
    )
    t = (
        1,
    )
    z = [
        1,  # one
        2,
    ]
    """
    assert join_rows(dedent(before)) == dedent(after)


def test_joined_modules_are_formatted_and_mean_the_same(tmp_path):
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        joined = join_rows(text)
        assert ast.dump(ast.parse(joined)) == ast.dump(ast.parse(text)), path.name
        (tmp_path / path.name).write_text(joined, encoding="utf-8")
    order = ["ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(order, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_definitions_rows_hold_its_decorators():
    node = ast.parse("x = 1\n@a\n@b\ndef f():\n    pass\n").body[1]
    assert span(node) == (1, 5)
