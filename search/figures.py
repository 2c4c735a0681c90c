"""Draw what was scored: losses, the last comparison, experts before and after, wall time and prompts.

Knows the columns of search/tables.py; not how they came about, nor files. Each function takes runs by their
labels and gives one picture; a run that did not come so far says so in its place.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from search.picture import (
    BLACK,
    BLUE,
    EMPTY_HEIGHT,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILION,
    Picture,
    add_legend,
    make_axes,
    plain_text,
    say_nothing,
    set_title,
)
from search.tables import (
    candidate_table,
    elapsed_s,
    expert_table,
    finalist_table,
    generation_table,
    prompt_table,
    reference_table,
    stage_title,
    time_table,
)
from search.trace import Trace

CLOCKS = {"elapsed_s": "time since the run began (s)", "n_tokens": "tokens scored by the search"}
LOSS_LABEL = "loss (base model = 1)"
DISAGREEMENT_LABEL = "disagreement with the expert (0 = the expert itself, 1 = the base model)"
RUNG_STYLES = (SKY, "v"), (PURPLE, "s"), (ORANGE, "D"), (GREEN, "P")
REFERENCE_STYLES = {
    "base": (BLACK, ":"),
    "uniform": (ORANGE, "--"),
    "balanced": (PURPLE, (0, (5, 1, 1, 1))),
    "prior": (GREEN, "-."),
}
KIND_STYLES = {"reference": (ORANGE, "s"), "expert": (BLACK, "D"), "candidate": (BLUE, "o")}
POINT_STYLES = {
    "base": (BLACK, "|"),
    "uniform": (ORANGE, "s"),
    "balanced": (PURPLE, "D"),
    "prior": (GREEN, "^"),
    "best so far": (BLUE, "o"),
    "winner": (BLUE, "o"),
}
MOST_PROMPTS = 16
PHASE_PAD = 30
"""Points above axes that phases' names take."""
LEAST_NAMED_SHARE = 0.13
"""Of the axis: narrower phases have no room for their name."""


def draw_losses(traces: Mapping[str, Trace]) -> Picture:
    """Draw losses on the searched prompts against seconds and against tokens, a row for each run.

    The line is the best so far of candidates scored on all prompts. Fainter marks, a shape for each number of
    prompts, are candidates on fewer prompts, in an earlier rung of the race. Single experts are scored on the
    unseen prompts only: the best of them is drawn for orientation, and its label says so.
    """
    figure, grid = make_axes(
        [3.6 if trace.generations else EMPTY_HEIGHT for trace in traces.values()], len(CLOCKS)
    )
    for row, (label, trace) in zip(grid, traces.items(), strict=True):
        for ax, clock in zip(row, CLOCKS, strict=True):
            _draw_run_losses(ax, trace, clock)
        set_title(row[0], label, traces, "against time", PHASE_PAD)
        set_title(row[1], "", {}, "against tokens", PHASE_PAD)
        add_legend(row[1], "upper left")
    return Picture(figure, "Losses on the searched prompts, against time and against tokens.")


def draw_best_losses(traces: Mapping[str, Trace]) -> Picture:
    """Draw the best loss so far of all runs in the same axes, against seconds and against tokens."""
    figure, grid = make_axes([3.6], len(CLOCKS))
    for ax, clock in zip(grid[0], CLOCKS, strict=True):
        for number, (label, trace) in enumerate(traces.items()):
            table = generation_table(trace)
            colour, dash = PALETTE[number % len(PALETTE)], ("-", "--", ":")[number // len(PALETTE) % 3]
            losses = table["best_loss"]
            ax.step(
                table[clock], losses, dash, where="post", color=colour, marker=".", label=plain_text(label)
            )
        _label_losses(ax, clock)
    set_title(grid[0][0], "", {}, "best loss so far, against time")
    set_title(grid[0][1], "", {}, "against tokens")
    add_legend(grid[0][1], "upper left")
    return Picture(figure, "The best loss so far of each run, against time and against tokens.")


def draw_finalists(traces: Mapping[str, Trace]) -> Picture:
    """Draw the losses of the last comparison: references, every single expert, and what the search found."""
    tables = {label: finalist_table(trace) for label, trace in traces.items()}
    figure, grid = make_axes([max(EMPTY_HEIGHT, 0.9 + 0.2 * len(table)) for table in tables.values()])
    for (ax,), (label, table) in zip(grid, tables.items(), strict=True):
        if table.empty:
            say_nothing(ax, "no finalists: the run did not come to its last comparison")
        else:
            _draw_finalists(ax, table)
        prompts = "" if table.empty else f", on {table['prompts'].iloc[0]} prompts"
        set_title(ax, label, traces, f"the last comparison{prompts}")
    return Picture(figure, "Losses of the finalists: references, single experts and candidates.")


def draw_experts(traces: Mapping[str, Trace]) -> Picture:
    """Draw each expert's disagreement before, under the uniform merge or prior, and after."""
    tables = {label: expert_table(trace) for label, trace in traces.items()}
    figure, grid = make_axes([1.2 + 0.22 * len(table) for table in tables.values()])
    for (ax,), (label, table) in zip(grid, tables.items(), strict=True):
        points = [name for name in POINT_STYLES if name in table]
        if points:
            _draw_experts(ax, table, points)
            text = f"each expert before and after, on {table['prompts'].iloc[0]} prompts"
            set_title(ax, label, traces, text)
        else:
            say_nothing(ax, "nothing was scored yet")
            set_title(ax, label, traces, "each expert before and after")
    return Picture(figure, "Each expert's disagreement before and after the search.")


def draw_time(traces: Mapping[str, Trace]) -> Picture:
    """Draw the seconds that each phase took."""
    tables = {label: time_table(trace) for label, trace in traces.items()}
    figure, grid = make_axes([0.9 + 0.25 * len(table) for table in tables.values()])
    for (ax,), (label, table) in zip(grid, tables.items(), strict=True):
        bars = ax.barh([plain_text(phase) for phase in table.index], table["seconds"], color=BLUE)
        texts = [f" {row.seconds:.3g} s, {row.share:.0%}" for row in table.itertuples()]
        ax.bar_label(bars, texts, size="small")
        ax.margins(x=0.15)
        ax.invert_yaxis()
        ax.set_xlabel("seconds")
        set_title(ax, label, traces, f"where {elapsed_s(traces[label]):.4g} seconds went")
    return Picture(figure, "Seconds of wall time by phase of the run.")


def draw_prompts(traces: Mapping[str, Trace]) -> Picture:
    """Draw the prompts on which candidates differ most, with the expert that answered each."""
    tables = {label: prompt_table(trace).dropna(subset="spread") for label, trace in traces.items()}
    shown = {label: table.head(MOST_PROMPTS) for label, table in tables.items()}
    figure, grid = make_axes([max(EMPTY_HEIGHT, 0.9 + 0.22 * len(table)) for table in shown.values()])
    for (ax,), (label, table) in zip(grid, shown.items(), strict=True):
        if table.empty:
            say_nothing(ax, "the trace does not tell how far candidates differ on a prompt")
        else:
            names = [f"{plain_text(row.expert)}, prompt {row.Index}" for row in table.itertuples()]
            ax.barh(names, table["spread"], color=BLUE)
            ax.invert_yaxis()
            ax.set_xlabel("standard deviation over candidates of the disagreement on the prompt")
        text = f"the {len(table)} of {len(tables[label])} searched prompts on which candidates differ most"
        set_title(ax, label, traces, text)
    return Picture(figure, "The prompts on which candidates differ most.")


def _draw_run_losses(ax: Axes, trace: Trace, clock: str) -> None:
    candidates, generations = candidate_table(trace), generation_table(trace)
    if candidates.empty:
        say_nothing(ax, "no generation yet")
        return
    _draw_phases(ax, trace, clock)
    rungs = candidates[~candidates["on_all"]].groupby("prompts")
    for number, (prompts, part) in enumerate(rungs):
        colour, marker = RUNG_STYLES[number % len(RUNG_STYLES)]
        style: dict[str, Any] = {"s": 12, "alpha": 0.5, "lw": 0, "color": colour, "marker": marker}
        ax.scatter(part[clock], part["loss"], **style, label=f"candidate on {prompts} prompts")
    part = candidates[candidates["on_all"]]
    style = {"s": 14, "alpha": 0.7, "lw": 0, "color": BLUE, "label": "candidate on all prompts"}
    ax.scatter(part[clock], part["loss"], **style)
    best = generations["best_loss"]
    ax.step(generations[clock], best, where="post", color=BLUE, lw=1.8, marker=".", label="best so far")
    for name, loss in reference_table(trace)["loss"].items():
        colour, dash = REFERENCE_STYLES[str(name)]
        ax.axhline(loss, color=colour, ls=dash, lw=1.3, label=str(name))
    finalists = finalist_table(trace)
    experts = finalists[(finalists["kind"] == "expert") & finalists["loss"].notna()]
    for name, row in experts.head(1).iterrows():
        label = f"best {plain_text(name)}\n(on {row['prompts']} prompts)"
        ax.axhline(row["loss"], color=VERMILION, ls=(0, (1, 3)), lw=1.3, label=label)
    _label_losses(ax, clock)


def _draw_phases(ax: Axes, trace: Trace, clock: str) -> None:
    """Shade every other phase of the run, and name those that are wide enough."""
    table = generation_table(trace)
    if clock == "elapsed_s":
        starts, end = table["elapsed_s"] - table["seconds"], elapsed_s(trace)
    else:
        starts, end = table["n_tokens"].shift(fill_value=0), table["n_tokens"].max()
    spans = [("prepare", 0.0, float(starts.min()))]
    for stage, part in table.groupby("stage"):
        name = stage_title(trace, int(str(stage)))
        spans.append((name, float(starts[part.index].min()), float(part[clock].max())))
    spans.append(("end", spans[-1][2], float(end)))
    for number, (name, left, right) in enumerate(spans):
        if number % 2 == 0:
            ax.axvspan(left, right, color="0.94", lw=0, zorder=0)
        if right - left > LEAST_NAMED_SHARE * end:
            place: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "va": "bottom", "ha": "center"}
            ax.text((left + right) / 2, 1.01, name.replace(", ", "\n"), size="small", color=GREY, **place)


def _label_losses(ax: Axes, clock: str) -> None:
    ax.set_xlabel(CLOCKS[clock])
    ax.set_ylabel("loss, searched prompts (base = 1)")
    if clock == "n_tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    points = [y for line in ax.lines for y in np.asarray(line.get_ydata(), dtype=float) if np.isfinite(y)]
    if points and min(points) > 0 and ax.get_ylim()[1] > 3 * min(points):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_finalists(ax: Axes, table: Any) -> None:
    places = np.arange(len(table))
    for kind, (colour, marker) in KIND_STYLES.items():
        is_kind = (table["kind"] == kind).to_numpy()
        if is_kind.any():
            ax.scatter(table["loss"][is_kind], places[is_kind], color=colour, marker=marker, s=28, label=kind)
    is_winner = (table["verdict"] == "winner").to_numpy()
    style: dict[str, Any] = {"s": 150, "facecolors": "none", "edgecolors": VERMILION, "linewidths": 1.8}
    ax.scatter(table["loss"][is_winner], places[is_winner], **style, label="winner")
    for place, (loss, verdict) in enumerate(zip(table["loss"], table["verdict"], strict=True)):
        if verdict not in ("winner", "beaten"):
            at = loss if np.isfinite(loss) else table["loss"].min()
            ax.annotate(f"  {verdict}", (at, place), va="center", size="small")
    ax.set_yticks(places, [plain_text(name) for name in table.index])
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.set_xlabel(LOSS_LABEL)
    add_legend(ax, "center left")


def _draw_experts(ax: Axes, table: Any, points: list[str]) -> None:
    places = np.arange(len(table))
    for name in points:
        colour, marker = POINT_STYLES[name]
        ax.scatter(table[name], places, color=colour, marker=marker, s=30, label=name, zorder=3)
    moved = [name for name in points if name != "base"]
    if len(moved) > 1:
        ax.hlines(places, table[moved[0]], table[moved[-1]], color="0.75", zorder=1)
    names = [plain_text(name) + (" (weak)" if weak else "") for name, weak in table["weak"].items()]
    ax.set_yticks(places, names)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.set_xlabel(DISAGREEMENT_LABEL)
    add_legend(ax, "center left")
