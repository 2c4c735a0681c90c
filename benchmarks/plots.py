"""Figures of benchmarks: what was measured, drawn as SVG with the same bytes for the same numbers.

Knows matplotlib and the lines that benchmarks write; measures nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.intervals import Estimate
from benchmarks.quality_tables import SEARCH, by_method, estimates
from benchmarks.rows import JOINT, ORACLE, Row
from search.files import atomic_write
from search.picture import BLACK, PALETTE, Picture, make_axes, set_title

PANELS = {"held_in_N": "held-in N (%)", "held_out": "held-out accuracy (%)"}
MARKERS = "osD^vPX<>ph"
"""Eleven, so that no two of 66 methods share both marker and colour."""
LINES = JOINT, ORACLE
"""What labels can do at most; drawn as lines, since their time says nothing."""
PANEL_HEIGHT = 3.4
"""Inches."""


def draw_quality(rows: Sequence[Row], variants: Sequence[str]) -> Picture:
    """Draw quality against seconds: a row for each variant, a panel for each measure, a marker a method.

    Methods that were not timed are in the tables alone, but for those of LINES.
    """
    shown = [variant for variant in variants if any(row["experts"] == variant for row in rows)]
    rows = [row for row in rows if row["method"] in LINES or row.get("seconds") is not None]
    methods = [*by_method([row for row in rows if row["experts"] in shown])]
    figure, grid = make_axes([PANEL_HEIGHT] * max(1, len(shown)), len(PANELS))
    for variant, axes in zip(shown, grid, strict=False):
        runs = by_method([row for row in rows if row["experts"] == variant])
        for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
            for method, own in runs.items():
                _mark(ax, methods.index(method), method, own, name)
            _dress(ax, label)
            ax.sharex(grid[0][0])
            set_title(ax, "", {}, f"experts: {variant}")
    _explain(figure, methods)
    alt = (
        f"Held-in and held-out quality against seconds of {len(methods)} ways to merge, on {', '.join(shown)}"
    )
    return Picture(figure, alt)


def _mark(ax: Axes, index: int, method: str, rows: Sequence[Row], name: str) -> None:
    """Draw one method's mean with its intervals in both directions."""
    quality, seconds = estimates(rows, name), estimates(rows, "seconds")
    if quality is None:
        return
    colour = BLACK if method == SEARCH else PALETTE[index % (len(PALETTE) - 1)]
    if seconds is None:
        ax.axhline(100 * quality.mean, color=colour, linestyle=":", linewidth=1, label=method)
        return
    ax.errorbar(
        seconds.mean,
        100 * quality.mean,
        xerr=_whiskers(seconds, 1),
        yerr=_whiskers(quality, 100),
        fmt="*" if method == SEARCH else MARKERS[index % len(MARKERS)],
        markersize=11 if method == SEARCH else 6,
        color=colour,
        elinewidth=1,
        capsize=2,
        label=method,
    )


def _whiskers(found: Estimate, factor: float) -> list[list[float]] | None:
    if found.n == 1:
        return None
    return [[factor * (found.mean - found.low)], [factor * (found.high - found.mean)]]


def _dress(ax: Axes, label: str) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("seconds, start to last answer")
    ax.set_ylabel(label)
    ax.set_ylim(-3, 103)
    ax.grid(visible=True, alpha=0.25)


def _explain(figure: Figure, methods: Sequence[str]) -> None:
    """Add one legend for all panels, to the right of them, in the methods' order."""
    pairs = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in figure.axes]
    handles = {label: handle for pair in pairs for handle, label in pair}
    names = [method for method in methods if method in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside right center", frameon=False, fontsize="small"
    )


def write_svg(picture: Picture, path: Path) -> None:
    """Write a figure as SVG: text as text, no date, ids from a fixed salt."""
    with (
        mpl.rc_context({"svg.hashsalt": "concord", "svg.fonttype": "none"}),
        atomic_write(path) as partial,
    ):
        picture.figure.savefig(partial, format="svg", metadata={"Date": None, "Title": picture.alt})
