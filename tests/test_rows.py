"""The lines of the quality benchmark: which count, what is done, what is damaged."""

import pytest

from benchmarks.rows import KEY, append_row, is_done, latest_rows, measured, read_rows
from search.errors import InputError
from tests.test_quality_tables import row


def test_the_last_line_of_a_run_counts_and_failures_have_no_measures():
    rows = [row("a", 0, held_in_N=0.1), row("a", 1), row("a", 0, held_in_N=0.9), row("b", failure="no luck")]
    latest = latest_rows(rows)
    assert [(r["method"], r["seed"], r["held_in_N"]) for r in latest] == [
        ("a", 0, 0.9),
        ("a", 1, 0.5),
        ("b", 0, 0.5),
    ]
    assert [r["method"] for r in measured(latest)] == ["a", "a"]


def test_lines_are_read_as_they_were_appended(tmp_path):
    path = tmp_path / "results/quality.jsonl"
    assert read_rows(path) == []
    rows = [{"method": "a", "held_in_N": 0.5}, {"method": "ties, best scale", "failure": "two\nlines"}]
    for one in rows:
        append_row(path, one)
    assert read_rows(path) == rows


def test_a_damaged_line_is_refused_by_its_number(tmp_path):
    path = tmp_path / "quality.jsonl"
    path.write_text('{"method": "a"}\n{"meth')
    with pytest.raises(InputError, match=r"quality\.jsonl:2: no JSON: .*Delete the line"):
        read_rows(path)


@pytest.mark.parametrize("name", KEY)
def test_a_run_is_done_where_all_that_makes_it_is_the_same_and_it_did_not_fail(name):
    identity = dict.fromkeys(KEY, 1)
    assert is_done(identity, [{**identity, "held_in_N": 0.5}])
    assert not is_done(identity, [{**identity, name: 2}])
    assert not is_done(identity, [{**identity, "failure": "no luck"}])
