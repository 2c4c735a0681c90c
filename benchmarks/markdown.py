"""Cells and lines of Markdown tables: shares and numbers with their intervals.

Knows estimates and text, not what was measured.
"""

from collections.abc import Sequence

from benchmarks.intervals import Estimate

NOTHING = "-"


def format_share(found: Estimate | None) -> str:
    """Return a share in percent with its interval."""
    if found is None:
        return NOTHING
    return f"{100 * found.mean:.1f}" + _interval(100 * found.low, 100 * found.high, found, ".1f")


def format_number(found: Estimate | None) -> str:
    """Return a number, rounded, with its interval."""
    if found is None:
        return NOTHING
    return f"{found.mean:,.0f}" + _interval(found.low, found.high, found, ",.0f")


def table_head(columns: Sequence[str]) -> list[str]:
    """Return the two lines that a table begins with: all but the first column are numbers."""
    return [table_line(columns), table_line(["---", *["---:"] * (len(columns) - 1)])]


def table_line(cells: Sequence[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def _interval(low: float, high: float, found: Estimate, spec: str) -> str:
    return f" ({low:{spec}} to {high:{spec}})" if found.n > 1 and found.low != found.high else ""
