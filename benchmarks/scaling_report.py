"""Tables and figure of how cost grows, from the recorded lines alone.

Knows lines, Markdown and matplotlib; measures nothing.
"""

from collections.abc import Sequence
from math import log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.environment import ROOT
from benchmarks.markdown import NOTHING, table_head, table_line
from benchmarks.plots import write_svg
from benchmarks.rows import Row, measured, read_rows
from benchmarks.scaling_points import SWEEPS
from benchmarks.sections import replace_section
from search.errors import InputError
from search.picture import BLACK, BLUE, GREEN, Picture, make_axes

DOCUMENT, SECTION = ROOT / "docs/SCALING.md", "scaling"
FIGURE = Path("figures/scaling.svg")
"""Seen from the document's folder."""
TITLES = {
    "adapters": "adapters, rank 8 each",
    "total_rank": "total rank, of 16 adapters",
    "population": "candidates a generation",
    "layers": "layers",
    "vocabulary": "vocabulary",
    "tokens": "tokens a forward pass",
}
COLOURS = {"base": BLACK, "population": BLUE, "objective": GREEN}
STYLES = {"compiled": "-", "eager": "--"}
PANEL_HEIGHT = 1.9
"""Inches."""


def write_report(out: Path, *, into_document: bool) -> None:
    """Put tables and a figure into the document, or print them and draw beside the lines.

    Raises:
        InputError: if there is nothing to report; a toy's lines are nothing to the document.
    """
    rows = latest_points([row for row in read_rows(out) if not (into_document and row.get("tiny"))])
    if not measured(rows):
        raise InputError(f"{out}: no point that was measured, nothing to report. Run without --report first.")
    folder, figure = (DOCUMENT.parent, FIGURE) if into_document else (out.parent, Path(f"{out.stem}.svg"))
    write_svg(draw_scaling(rows), folder / figure)
    text = scaling_text(rows, figure.as_posix())
    if into_document:
        replace_section(DOCUMENT, SECTION, text)
        print("report:", DOCUMENT, figure)
    else:
        print(text, f"figure: {folder / figure}", sep="\n\n")


def latest_points(rows: Sequence[Row]) -> list[Row]:
    """Return each point's last line on the device measured last, in the order of sweeps and values."""
    own = [row for row in rows if row["device"] == rows[-1]["device"]]
    last = {(list(SWEEPS).index(row["sweep"]), row["value"]): row for row in own}
    return [last[key] for key in sorted(last)]


def by_sweep(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the points of each sweep that has some."""
    return {name: own for name in SWEEPS if (own := [row for row in rows if row["sweep"] == name])}


def scaling_text(rows: Sequence[Row], figure: str) -> str:
    """Return a line on the machine, the figure, and a table a sweep."""
    lines = [_where(rows), "", f"![What a forward pass and a generation cost]({figure})"]
    for name, points in by_sweep(rows).items():
        lines += ["", *_table(name, points)]
    return "\n".join(lines)


def _where(rows: Sequence[Row]) -> str:
    row, failed = measured(rows)[-1], len(rows) - len(measured(rows))
    n_failed = "No point failed." if not failed else f"{failed} of {len(rows)} points failed."
    commits = ", ".join(dict.fromkeys(row["commit"] for row in measured(rows)))
    compiled = all(row["compiled"] or not row["asked_to_compile"] for row in measured(rows))
    return (
        f"Device: {row['device']} ({row['machine']}), torch {row['versions']['torch']}, {row['dtype']}, rows "
        f"of {row['tokens_a_row']} tokens. Commit: {commits}. Medians of {row['repeats']} interleaved "
        "repeats (three at most for a generation). `x base`: the time in forward passes of the base over as "
        "many tokens, run in the same manner. `slope`: by which power of what is swept the population's time "
        f"grows from the point before. {n_failed}{'' if compiled else ' Compiling failed at some points.'}"
    )


def _table(name: str, points: Sequence[Row]) -> list[str]:
    """Return a sweep's table, without columns in which nothing stands."""
    cells = [_cells(row, before) for row, before in zip(points, [None, *points[:-1]], strict=True)]
    shown = [title for title in cells[0] if any(own[title] != NOTHING for own in cells)]
    lines = table_head([TITLES[name], *shown])
    for row, own in zip(points, cells, strict=True):
        lines.append(table_line([f"{row['value']:,}", *(own[title] for title in shown)]))
    return lines


def _cells(row: Row, before: Row | None) -> dict[str, str]:
    """Return what stands in a point's line, by column."""
    cells = {}
    for how in STYLES:
        cells[f"base, {how} (ms)"] = _number(row, "ms", f"base_{how}", ",.2f")
        cells[f"population, {how} (ms)"] = _number(row, "ms", f"population_{how}", ",.2f")
        cells[f"x base, {how}"] = _number(row, "of_base", f"population_{how}", ".3f")
    how = best_of(row)
    cells["slope"] = _slope(row, before)
    cells["tokens/s"] = _number(row, "tokens_per_s", f"population_{how}", ",.0f")
    cells["candidates/s"] = f"{row['candidates_per_s']:,.1f}" if "candidates_per_s" in row else NOTHING
    cells["objective (x base)"] = _number(row, "of_base", f"objective_{how}", ".4f")
    cells["peak GiB"] = _number(row, "peak_gib", f"population_{how}", ".2f")
    cells["failed"] = row.get("failure", NOTHING)
    return cells


def best_of(row: Row) -> str:
    """Return how a point's population is meant to run: compiled, where that was measured."""
    return "compiled" if "population_compiled" in row.get("ms", ()) else "eager"


def _number(row: Row, kind: str, way: str, spec: str) -> str:
    value = row.get(kind, {}).get(way)
    return NOTHING if value is None else f"{value:{spec}}"


def _slope(row: Row, before: Row | None) -> str:
    """Return d log(time) / d log(value): 0 is flat, 1 in proportion."""
    way = f"population_{best_of(row)}"
    if before is None or way not in row.get("ms", ()) or way not in before.get("ms", ()):
        return NOTHING
    growth = log(row["ms"][way] / before["ms"][way])
    return f"{growth / log(row['value'] / before['value']):.2f}"


def draw_scaling(rows: Sequence[Row]) -> Picture:
    """Draw a row a sweep: milliseconds on the left, times the base on the right."""
    sweeps = by_sweep(measured(rows))
    figure, grid = make_axes([PANEL_HEIGHT] * len(sweeps), 2)
    for axes, (name, points) in zip(grid, sweeps.items(), strict=True):
        for kind, ax in zip(("ms", "of_base"), axes, strict=True):
            for what in COLOURS:
                for how in STYLES:
                    if kind == "ms" or what == "population":
                        _draw_way(ax, points, kind, what, how)
            _dress(ax, [row["value"] for row in points], TITLES[name])
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes[0].yaxis.set_minor_locator(NullLocator())
        axes[0].set_ylabel("ms")
        axes[1].set_ylabel("times the base")
        axes[1].axhline(1, color=BLACK, linewidth=0.7, linestyle=":")
        axes[1].legend(
            *axes[0].get_legend_handles_labels(),
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize="small",
        )
    alt = f"Time of base, population and objective over {', '.join(TITLES[name] for name in sweeps)}"
    return Picture(figure, alt)


def _draw_way(ax: Axes, points: Sequence[Row], kind: str, what: str, how: str) -> None:
    way = f"{what}_{how}"
    known = [(row["value"], row[kind][way]) for row in points if way in row[kind]]
    if known:
        ax.plot(
            *zip(*known, strict=True),
            color=COLOURS[what],
            linestyle=STYLES[how],
            marker="o",
            markersize=3,
            linewidth=1,
            label=f"{what}, {how}",
        )


def _dress(ax: Axes, values: Sequence[int], label: str) -> None:
    ax.set_xscale("log")
    ax.set_xticks(values, [_short(value) for value in values])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)
    ax.grid(visible=True, alpha=0.25)


def _short(value: int) -> str:
    """Return a number as a tick has room for it: 8k for 8,000, 8Ki for 8,192."""
    if value >= 1000 and value % 1000 == 0:
        return f"{value // 1000}k"
    return f"{value // 1024}Ki" if value >= 1024 and value % 1024 == 0 else str(value)
