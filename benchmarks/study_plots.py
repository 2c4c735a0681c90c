"""Figure of the timed study: quality against seconds of search, the arms of a family in one row.

Knows matplotlib and the lines that benchmarks.studies writes; measures nothing.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.intervals import Estimate
from benchmarks.plots import MARKERS, PANELS
from benchmarks.quality_tables import estimates
from benchmarks.replay import CHOSEN
from benchmarks.rows import Row
from benchmarks.study_arms import DEFAULT, STUDIES
from benchmarks.study_tables import at_point, list_points
from search.picture import BLACK, PALETTE, Picture, add_legend, make_axes, set_title

PANEL_HEIGHT = 2.6
"""Inches."""
ROOM = 3.0
"""Percent, below and above what is drawn."""


def draw_families(runs: Mapping[str, Sequence[Row]], experts: str) -> Picture:
    """Draw held-in N and held-out accuracy over seconds of search: a row a family, a line an arm.

    The default is in every row. An arm whose settings are the default's is not drawn again.

    Args:
        runs: of each arm of the study "search", on one expert set.
        experts: its name.
    """
    families: dict[str, list[str]] = {}
    for arm in STUDIES["search"].arms:
        if arm.family and arm.name in runs and DEFAULT.name not in runs[arm.name][0]["arms"]:
            families.setdefault(arm.family, []).append(arm.name)
    rows = families or {"": []}
    figure, grid = make_axes([PANEL_HEIGHT] * len(rows), len(PANELS))
    for axes, (family, arms) in zip(grid, rows.items(), strict=True):
        shown = [DEFAULT.name, *arms] if DEFAULT.name in runs else arms
        for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
            for place, shown_arm in enumerate(shown):
                _draw_arm(ax, shown_arm, runs[shown_arm], name, place)
            _dress(ax, label)
            ax.sharex(grid[0][0])
        set_title(axes[0], "", {}, f"experts {experts}: {family}")
        add_legend(axes[-1], "upper left")
    alt = f"Held-in and held-out quality against seconds of search, experts {experts}: {', '.join(rows)}"
    return Picture(figure, alt)


def _draw_arm(ax: Axes, arm: str, rows: Sequence[Row], name: str, place: int) -> None:
    """Draw an arm's checkpoints in seconds and its end, means with their intervals."""
    points = [point for point in list_points(rows) if point.clock == "seconds"]
    curve = [(point.at, at_point(rows, point, CHOSEN, name)) for point in points]
    end_s = estimates(rows, "search_s")
    curve += [(end_s.mean, estimates(rows, name))] if end_s else []
    known = [(at, found) for at, found in curve if found is not None]
    if not known:
        return
    is_default = arm == DEFAULT.name
    ax.errorbar(
        [at for at, _ in known],
        [100 * found.mean for _, found in known],
        yerr=np.array([_whiskers(found) for _, found in known]).T,
        marker="*" if is_default else MARKERS[place % len(MARKERS)],
        markersize=9 if is_default else 5,
        color=BLACK if is_default else PALETTE[(place - 1) % (len(PALETTE) - 1)],
        linestyle="-" if place < len(PALETTE) else "--",
        linewidth=1,
        elinewidth=0.7,
        capsize=2,
        label=arm,
    )


def _whiskers(found: Estimate) -> tuple[float, float]:
    return 100 * (found.mean - found.low), 100 * (found.high - found.mean)


def _dress(ax: Axes, label: str) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("seconds of search and refinement")
    ax.set_ylabel(label)
    ax.grid(visible=True, alpha=0.25)
    drawn = [y for line in ax.lines for y in np.asarray(line.get_ydata(), dtype=float)]
    ax.set_ylim(min(drawn, default=0) - ROOM, 100 + ROOM)
