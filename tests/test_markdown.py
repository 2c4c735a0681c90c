"""Cells and lines of Markdown tables."""

from benchmarks.intervals import estimate_mean
from benchmarks.markdown import format_number, format_share, table_head, table_line


def test_a_cell_has_an_interval_only_where_runs_differ():
    assert format_share(estimate_mean([0.5, 0.5])) == "50.0"
    assert format_number(estimate_mean([1234.4])) == "1,234"
    found = estimate_mean([0.5, 0.7])
    assert format_share(found) == f"60.0 ({100 * found.low:.1f} to {100 * found.high:.1f})"


def test_what_was_not_measured_is_a_dash():
    assert format_share(None) == format_number(None) == "-"


def test_lines_have_a_cell_a_column():
    assert table_head(["arm", "N"]) == ["| arm | N |", "| --- | ---: |"]
    assert table_line(["a", "1"]) == "| a | 1 |"
