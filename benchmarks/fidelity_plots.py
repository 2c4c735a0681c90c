"""Figures of the fidelity benchmark, of its lines alone.

Knows the lines that benchmarks.fidelity writes, and matplotlib through search.picture; measures nothing.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.drawn_merges import KINDS
from benchmarks.fidelity_plan import TERM_WEIGHTS, VISITED
from benchmarks.fidelity_rows import DEFAULT
from benchmarks.fidelity_scene import SOURCES
from benchmarks.fidelity_tables import SOURCE_NAMES, SPACES, Lines
from benchmarks.rows import Row
from search.objective import OBJECTIVES
from search.picture import BLACK, GREY, PALETTE, Picture, make_axes, say_nothing, set_title
from search.space import FloatArray

PANEL_HEIGHT = 3.2
"""Inches."""
BROWN = "#8c564b"
KIND_COLOURS = dict(zip((*KINDS, VISITED), PALETTE, strict=True))
STYLES = ("-", "--")
SPACE_STYLES = {"layer": "-", "model": "--"}
OTHERS = [name for name in OBJECTIVES if name != DEFAULT.name]
OBJECTIVE_COLOURS = {DEFAULT.name: BLACK, **dict(zip(OTHERS, (*PALETTE[:-1], GREY, BROWN), strict=True))}
PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")
MEASURES = {"held_in_N": "held-in N (%)", "held_out": "held-out accuracy (%)"}
RHOS = {"held_in": "held-in", "held_in_best": "held-in, best quarter", "held_out": "held-out"}


def draw_all(lines: Lines, variants: Sequence[str]) -> dict[str, Picture]:
    """Return the figures by name."""
    pictures = {
        "fidelity": draw_points(lines, variants),
        "prompts_needed": draw_prompts(lines, variants),
        "retention": draw_terms(lines, variants),
    }
    return {**pictures, "goodhart": draw_searches(lines, variants)} if lines.searches else pictures


def draw_points(lines: Lines, variants: Sequence[str]) -> Picture:
    """Draw the default loss against true held-in N: a panel a variant, a point a merge."""
    figure, grid = make_axes([PANEL_HEIGHT + 0.8], len(variants))
    for variant, ax in zip(variants, grid[0], strict=True):
        row = lines.part("points", variant)
        if row is None:
            say_nothing(ax, "not measured")
            continue
        for kind, own in row["points"].items():
            held_in = 100 * _numbers(own["held_in"])
            style = {"color": KIND_COLOURS[kind], "markersize": 4, "alpha": 0.7, "rasterized": True}
            ax.plot(own["loss"], held_in, ".", label=kind, **style)
        ax.set_xlabel("loss (0: every expert, 1: the base)")
        ax.set_ylabel(MEASURES["held_in_N"])
        set_title(ax, "", {}, f"experts: {variant}")
    _explain(grid[0][-1])
    return Picture(figure, f"Default loss against true held-in quality of merges, on {', '.join(variants)}")


def draw_prompts(lines: Lines, variants: Sequence[str]) -> Picture:
    """Draw rank correlations against prompts an adapter: a panel a variant, a line a source."""
    figure, grid = make_axes([PANEL_HEIGHT + 0.4], len(variants))
    for variant, ax in zip(variants, grid[0], strict=True):
        for source, colour in zip(SOURCES, PALETTE, strict=False):
            row = lines.part("prompts_needed", variant, source)
            for name, style in zip(("held_in", "held_in_best"), STYLES, strict=True) if row else ():
                curve = row["curve"] if row else {}
                label = f"{SOURCE_NAMES[source]}{', best quarter' if name == 'held_in_best' else ''}"
                ax.plot(curve["prompts"], _numbers(curve[name]), style, marker=".", color=colour, label=label)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(PLAIN)
        ax.set_xlabel("prompts an adapter")
        ax.set_ylabel("rank correlation with held-in N")
        set_title(ax, "", {}, f"experts: {variant}")
    _explain(grid[0][-1])
    return Picture(figure, f"Rank correlation against prompts an adapter, on {', '.join(variants)}")


def draw_searches(lines: Lines, variants: Sequence[str]) -> Picture:
    """Draw true accuracies along searches: two panels a variant, a line an objective and space."""
    figure, grid = make_axes([PANEL_HEIGHT] * len(variants), len(MEASURES))
    for variant, axes in zip(variants, grid, strict=True):
        for ax, (name, label) in zip(axes, MEASURES.items(), strict=True):
            for objective, space in product(OBJECTIVES, SPACE_STYLES):
                if rows := lines.plain_searches(variant, objective, space):
                    x, y = mean_curve(rows, name)
                    style, colour = SPACE_STYLES[space], OBJECTIVE_COLOURS[objective]
                    ax.plot(x, 100 * y, style, color=colour, label=objective if space == "layer" else None)
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(PLAIN)
            ax.set_xlabel("evaluations")
            ax.set_ylabel(label)
            set_title(ax, "", {}, f"experts: {variant}")
    for space, style in SPACE_STYLES.items():
        grid[0][-1].plot([], [], style, color=GREY, label=f"one coefficient {SPACES[space]}")
    _explain(grid[0][-1])
    return Picture(figure, f"True accuracy along long searches by objective, on {', '.join(variants)}")


def draw_terms(lines: Lines, variants: Sequence[str]) -> Picture:
    """Draw what added terms trade: rank correlations by weight, and held-in against held-out at the end."""
    figure, grid = make_axes([PANEL_HEIGHT] * len(variants), 2)
    for variant, (left, right) in zip(variants, grid, strict=True):
        for (term, weights), colour in zip(TERM_WEIGHTS.items(), PALETTE, strict=False):
            row = lines.part("terms", variant)
            for name, style in zip(("held_in", "held_out"), STYLES, strict=True) if row else ():
                y = _numbers(row["curves"][term][name] if row else [])
                left.plot(
                    np.arange(len(y)), y, style, marker=".", color=colour, label=f"{term}, {RHOS[name]}"
                )
            _draw_trade(right, lines, variant, term, (0.0, *weights), colour)
            if row:
                left.set_xticks(range(len(row["weights"])), [f"{weight:g}" for weight in row["weights"]])
        left.set_xlabel("weight of the term")
        left.set_ylabel("rank correlation")
        right.set_xlabel("held-in N at the end of a search (%)")
        right.set_ylabel(MEASURES["held_out"])
        for ax in (left, right):
            set_title(ax, "", {}, f"experts: {variant}")
    for ax in grid[0]:
        _explain(ax)
    return Picture(
        figure, f"Held-in against held-out by the weight of an added term, on {', '.join(variants)}"
    )


def _draw_trade(
    ax: Axes, lines: Lines, variant: str, term: str, weights: Sequence[float], colour: str
) -> None:
    """Draw where searches end, a mark a weight, joined in its order."""
    found = {weight: lines.term_searches(variant, term, weight) for weight in weights}
    ends = {
        weight: [np.mean([100 * row["curve"][name][-1] for row in rows]) for name in MEASURES]
        for weight, rows in found.items()
        if rows
    }
    if not ends:
        return
    x, y = zip(*ends.values(), strict=True)
    ax.plot(x, y, "-o", color=colour, markersize=4, label=term)
    for weight, (held_in, held_out) in ends.items():
        ax.annotate(
            f"{weight:g}", (held_in, held_out), textcoords="offset points", xytext=(4, 3), fontsize="small"
        )


def mean_curve(rows: Sequence[Row], name: str) -> tuple[FloatArray, FloatArray]:
    """Return evaluations and the mean over searches; one that has converged stays where it ended.

    Left out are the start, which has no place on a logarithmic axis, and what a search cut short did not see.
    """
    points = sorted({n for row in rows for n in row["curve"]["evaluations"] if n})
    seen = [
        row["evaluations"] if row["ended_by"] != "seconds" else row["curve"]["evaluations"][-1]
        for row in rows
    ]
    kept = np.array([n for n in points if n <= min(seen)], dtype=float)
    curves = [np.interp(kept, row["curve"]["evaluations"], row["curve"][name]) for row in rows]
    return kept, np.mean(curves, axis=0)


def _numbers(values: Sequence[float | None]) -> FloatArray:
    """Return values with None, for what could not be said, as NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _explain(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize="small")
