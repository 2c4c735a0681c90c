"""Lines and tables of merges of one's own adapters: what labels say, and what the search knows without any.

Knows the lines that benchmarks.own_adapters writes; runs nothing.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from benchmarks.fidelity_statistics import spearman
from benchmarks.intervals import estimate_mean
from benchmarks.markdown import NOTHING, format_share, table_head, table_line
from benchmarks.quality_tables import SEARCH, UNIFORM, by_method, method_table
from benchmarks.rows import Row
from search.finalists import BALANCED as BALANCED_FINALIST
from search.finalists import BASE
from search.finalists import UNIFORM as UNIFORM_FINALIST

FINALIST_OF = {UNIFORM: UNIFORM_FINALIST, "balanced": BALANCED_FINALIST}
"""Method -> the merge that every search compares itself with on its unseen prompts, and that is the same."""
MIN_RUNS = 5
"""Of which a rank correlation is told."""
HOW = (
    "Shares in percent, mean over seeds and its 95 % interval. N is accuracy divided by that of the task's "
    "own expert, R = (merge - base) / (expert - base); held-out is accuracy."
)


def format_row(row: Row) -> str:
    """One line for people, shares in percent."""
    start = f"{row['method']:24}{row['seed']:>3}  "
    if "failure" in row:
        return f"{start}FAILED after {row['seconds']:.0f} s: {row['failure'].splitlines()[-1]}"
    if "held_in_N" not in row:
        shares = f"accuracy {100 * fmean(row['tasks'].values()):.1f}, mean of {len(row['tasks'])} tasks"
    else:
        names = ("held_in_N", "worst_task", "held_out")
        shares = "N, worst, held-out " + " ".join(_share(row[name]) for name in names)
    loss = f", loss {row['loss']:.4f}" if row.get("loss") is not None else ""
    return f"{start}{shares}{loss}, {row['seconds']:.0f} s"


def own_report(merges: Sequence[Row], base: Row, own: Mapping[str, float], experts: Mapping[str, str]) -> str:
    """Return the tables of merges, tasks and losses.

    Args:
        merges: lines that worked, with the measures of benchmarks.job.measure_tasks.
        base: the base's line, likewise.
        own: held-in task -> accuracy of its expert alone.
        experts: held-in task -> that expert's name.
    """
    parts = [HOW, method_table([*merges, base]), task_table(merges, base, own, experts), loss_text(merges)]
    return "\n\n".join(["", *parts])


def task_table(merges: Sequence[Row], base: Row, own: Mapping[str, float], experts: Mapping[str, str]) -> str:
    """Return accuracies by task, and the share of unseen prompts on which the search's merge agrees."""
    runs = by_method(merges)
    methods = [f"`{method}`" for method in runs]
    lines = table_head(["task", "expert", BASE, "expert alone", *methods, f"`{SEARCH}` agrees"])
    for task in dict.fromkeys([*own, *base["tasks"]]):
        expert = experts.get(task, NOTHING)
        accuracies = [fmean(row["tasks"][task] for row in rows) for rows in runs.values()]
        cells = [_share(value) for value in (base["tasks"][task], own.get(task), *accuracies)]
        lines.append(table_line([task, expert, *cells, agreement(merges, expert)]))
    return "\n".join(lines)


def agreement(merges: Sequence[Row], expert: str) -> str:
    """Return how often the search's merge has the expert's top token at every scored position, in percent."""
    shares = [row["agreement"][expert] for row in merges if expert in row.get("agreement", {})]
    return format_share(estimate_mean(shares) if shares else None)


def loss_of(row: Row, merges: Sequence[Row]) -> float | None:
    """Return a merge's loss on unseen prompts: its own, or the mean of what searches found for the same.

    None for a merge that no search compared itself with.
    """
    if row.get("loss") is not None:
        return float(row["loss"])
    name = FINALIST_OF.get(row["method"], row.get("winner"))
    found = [other.get("finalist_losses", {}).get(name) for other in merges]
    known = [loss for loss in found if loss is not None]
    return fmean(known) if known else None


def loss_text(merges: Sequence[Row]) -> str:
    """Return the table of losses, and whether they rank merges as the labels do."""
    told = [(row, loss) for row in merges if (loss := loss_of(row, merges)) is not None]
    lines = table_head(["merge", "seed", "loss on unseen prompts", "held-in N", "held-out"]) if told else []
    for row, loss in sorted(told, key=lambda pair: pair[1]):
        shares = [_share(row[name]) for name in ("held_in_N", "held_out")]
        lines.append(table_line([f"`{row['method']}`", str(row["seed"]), f"{loss:.4f}", *shares]))
    if len(told) < MIN_RUNS:
        few = f"{len(told)} runs have a loss on unseen prompts; a rank correlation takes {MIN_RUNS}."
        return "\n".join([*lines, "", few]).strip()
    losses = np.array([loss for _, loss in told])
    ranks = []
    for name, label in (("held_in_N", "held-in N"), ("held_out", "held-out accuracy")):
        values = np.array([np.nan if row[name] is None else row[name] for row, _ in told], dtype=float)
        rho = spearman(losses, values)
        ranks.append(f"{label} {NOTHING if np.isnan(rho) else f'{rho:+.2f}'}")
    ends = (
        f"Rank correlation of low loss (Spearman, {len(told)} runs; 1: the loss ranks as the labels do) with"
    )
    return "\n".join([*lines, "", f"{ends} {', '.join(ranks)}."])


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}"
