"""Lines of a verification: what they show of values, and that they stay lines."""

import pytest

from search.checks import Check, compare, compare_all, show, tell_differences


def test_a_check_is_a_line():
    assert str(Check("config", "ok")) == "config: ok"
    assert str(Check("config", "differs", "seed recorded 1, found 2")) == (
        "config: differs: seed recorded 1, found 2"
    )


def test_of_many_differences_the_first_few_are_shown_and_all_counted():
    assert tell_differences("x", [], "3 rows") == Check("x", "ok", "3 rows")
    assert tell_differences("x", ["a", "b", "c"]).text == "a; b; c"
    assert tell_differences("x", ["a", "b", "c", "d", "e"]).text == "a; b; c; and 2 more"


def test_values_are_compared_and_mappings_key_by_key():
    assert compare("seed", 1, 1) == []
    assert compare("seed", 1, None) == ["seed recorded 1, found none"]
    assert compare("", "a", "b") == ["recorded a, found b"]
    assert compare_all({"b": 1, "a": 2}, {"a": 2}) == ["b recorded 1, found none"]
    assert compare_all({}, {"a": None}) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0a" * 20, "0a0a0a0a0a0a"),
        ("0a" * 20 + "-dirty", "0a0a0a0a0a0a-dirty"),
        ("0a" * 32, "0a0a0a0a0a0a"),
        ("data/zoo/base", "data/zoo/base"),
        ("two\nlines: 'x'", "\"two\\nlines: 'x'\""),
        ("", '""'),
        (0.1, "0.1"),
        ([1, 2], "[1, 2]"),
        ("x" * 200, '"' + "x" * 76 + "..."),
    ],
)
def test_a_value_is_shown_in_a_line(value, shown):
    assert show(value) == shown
    assert "\n" not in shown
