"""Draw what was searched: coefficients as heat maps, how wide the population is, and where it moved.

Knows the columns of search/tables.py and search/movement.py; not losses or files. Each function takes runs
by their labels and gives one picture; a run that did not come so far says so in its place.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from search.movement import projection_table, spread_table
from search.picture import (
    BLUE,
    EMPTY_HEIGHT,
    VERMILION,
    Picture,
    make_axes,
    say_nothing,
    set_title,
    thin_labels,
)
from search.tables import coefficient_table, stage_title
from search.trace import Trace

COLOUR_MAP = "viridis"
MOST_NUMBERS = 200
"""Cells of a heat map that have room for a number each."""
MOST_SIDE_BY_SIDE = 12
"""Groups in a heat map that leave room for another beside it."""
MOST_COLUMNS = 3
POINT_NAMES = {
    "prior": "the prior's start",
    "start": "the start (there was no prior)",
    "winner": "the winner",
    "mean": "centre of the last distribution (no winner yet)",
}


def draw_coefficients(traces: Mapping[str, Trace]) -> Picture:
    """Draw coefficients (n_adapters, n_groups) of the prior or start and of the winner, coloured alike."""
    tables = {label: coefficient_table(trace) for label, trace in traces.items()}
    n_groups = max(table.index.unique("group").size for table in tables.values())
    n_columns = 2 if n_groups <= MOST_SIDE_BY_SIDE else 1
    heights = [1.3 + 0.2 * max(t.shape[1], 3) if len(t) else EMPTY_HEIGHT for t in tables.values()]
    figure, grid = make_axes([h for h in heights for _ in range(2 // n_columns)], n_columns)
    axes = iter([ax for row in grid for ax in row])
    for label, table in tables.items():
        points = table.index.unique("point").tolist()
        for number in range(2):
            ax = next(axes)
            if number < len(points):
                _draw_heat_map(ax, table.loc[points[number]].T, table.to_numpy())
                set_title(ax, label, traces, f"coefficients of {POINT_NAMES[points[number]]}")
            else:
                say_nothing(ax, "no coefficients of the end yet" if points else "the search has not begun")
                set_title(ax, label, traces, "")
    return Picture(figure, "Coefficients of adapters by groups, at the start and of the winner.")


def draw_spread(traces: Mapping[str, Trace]) -> Picture:
    """Draw how wide the population is in each dimension of the genome, a line each, and their median."""
    figure, panels = _make_panels(traces, 2.9)
    for ax, label, stage in panels:
        table = spread_table(traces[label])
        part = table[table.index.get_level_values("stage") == stage].dropna(axis="columns")
        _draw_spread(ax, part)
        text = f"{stage_title(traces[label], stage)}\nhow wide in {part.shape[1]} dimension(s)"
        set_title(ax, label, traces, text)
    return Picture(figure, "Standard deviation of the population in each dimension, by generation.")


def draw_projection(traces: Mapping[str, Trace]) -> Picture:
    """Draw all candidates in the plane in which they vary most, by generation, and each generation's mean."""
    tables = {label: projection_table(trace) for label, trace in traces.items()}
    figure, panels = _make_panels(traces, 4.2)
    for ax, label, stage in panels:
        part = tables[label][tables[label]["stage"] == stage]
        _draw_projection(ax, part)
        text = f"plane with {part['explained'].iloc[0]:.0%} of the variance"
        set_title(ax, label, traces, f"{stage_title(traces[label], stage)}\n{text}")
    return Picture(figure, "All candidates in the plane in which they vary most, by generation.")


def _make_panels(traces: Mapping[str, Trace], height: float) -> tuple[Figure, list[tuple[Axes, str, int]]]:
    """Return a figure, and axes for each stage of each run with the run's label and the stage."""
    stages = {label: sorted({g.stage for g in trace.generations}) for label, trace in traces.items()}
    n_columns = min(MOST_COLUMNS, max(1, *(len(found) for found in stages.values())))
    rows = [
        (label, found[first : first + n_columns])
        for label, found in stages.items()
        for first in range(0, max(len(found), 1), n_columns)
    ]
    figure, grid = make_axes([height if found else EMPTY_HEIGHT for _, found in rows], n_columns)
    panels = []
    for axes, (label, found) in zip(grid, rows, strict=True):
        panels += [(ax, label, stage) for ax, stage in zip(axes, found, strict=False)]
        for ax in axes[len(found) :]:
            say_nothing(ax, "" if found else "no generation yet")
        if not found:
            set_title(axes[0], label, traces, "")
    return figure, panels


def _draw_heat_map(ax: Axes, table: pd.DataFrame, scale: NDArray[np.float64]) -> None:
    """Draw a table (n_adapters, n_groups), coloured over the range of `scale`."""
    finite = scale[np.isfinite(scale)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    values = table.to_numpy()
    is_small = values.size <= MOST_NUMBERS and values.shape[1] <= MOST_SIDE_BY_SIDE
    image = ax.imshow(values, cmap=COLOUR_MAP, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="coefficient", pad=0.01)
    for place, value in np.ndenumerate(values) if is_small else ():
        colour = "white" if value < (low + high) / 2 else "black"
        ax.text(place[1], place[0], f"{value:.2f}", ha="center", va="center", color=colour, size="x-small")
    ax.set_yticks(*thin_labels(list(table.index), 60), size="small")
    ax.set_xticks(*thin_labels(list(table.columns), 36), rotation=90, size="small")
    ax.set_xlabel("group of modules")
    ax.spines[:].set_visible(False)


def _draw_spread(ax: Axes, table: pd.DataFrame) -> None:
    """Draw a table (n_generations, n_params)."""
    generations = table.index.get_level_values("generation").to_numpy(dtype=float)
    lines = [np.column_stack([generations, table[dimension]]) for dimension in table]
    opacity = max(0.03, min(0.5, 15 / len(lines)))
    ax.add_collection(LineCollection(lines, colors=BLUE, alpha=opacity, linewidths=0.8, label="a dimension"))
    if len(generations) == 1:
        ax.plot(np.repeat(generations, len(lines)), table.to_numpy()[0], "_", color=BLUE)
    ax.plot(generations, table.median(axis=1), color=VERMILION, lw=2, marker=".", label="median")
    ax.set_xlim(generations.min() - 0.5, generations.max() + 0.5)
    ax.set_ylim(0, 1.05 * max(table.to_numpy().max(), 1e-9))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("generation")
    ax.set_ylabel("standard deviation (genome units)")
    for handle in ax.legend(frameon=False, fontsize="small").legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _draw_projection(ax: Axes, table: pd.DataFrame) -> None:
    first, last = table["generation"].min(), table["generation"].max()
    colours = {"c": table["generation"], "cmap": COLOUR_MAP, "vmin": first, "vmax": max(last, first + 1)}
    points = ax.scatter(table["x"], table["y"], s=14, lw=0, **colours)
    path = table.groupby("generation")[["x", "y"]].mean()
    ax.plot(path["x"], path["y"], color=VERMILION, lw=1.5, marker=".", label="mean of a generation")
    ax.figure.colorbar(points, ax=ax, label="generation", pad=0.01, ticks=MaxNLocator(integer=True))
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel("first direction (genome units)")
    ax.set_ylabel("second direction (genome units)")
    ax.legend(frameon=False, fontsize="small")
