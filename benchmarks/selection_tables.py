"""Tables of the searches on prompts that were chosen without knowing what an adapter is for, in Markdown.

Knows the lines that benchmarks.selection writes; runs nothing.
"""

from collections.abc import Sequence

from benchmarks.intervals import Estimate
from benchmarks.markdown import format_number, format_share, table_head, table_line
from benchmarks.quality_tables import describe_runs, estimates
from benchmarks.rows import Row, latest_rows, measured
from benchmarks.selection_run import SKELETONS, UNIFORM

SHARES = {"held_in_N": "N", "worst_task": "worst task's N", "held_out": "held-out", "own_task": "own task"}
HOW = (
    "Shares in percent: mean over seeds and, in brackets, its 95 % interval (percentile bootstrap, 10,000 "
    "resamples; n is the number of seeds). N is held-in accuracy divided by that of the task's own expert. "
    "Own task: the share of kept questions that are of their expert's own task, which no criterion can see. "
    "Free: no bounds; confined: coefficients within a tenth of the balanced merge's."
)


def selection_table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Return one variant's table, an arm a line in the order of `methods`."""
    lines = table_head(["prompts, coefficients", *SHARES.values(), "seconds", "n"])
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        if own:
            cells = [format_share(estimates(own, name)) for name in SHARES]
            cells.append(format_number(estimates(own, "search_s")))
            lines.append(table_line([method, *cells, str(len(own))]))
    return "\n".join(lines)


def halfway(rows: Sequence[Row]) -> str:
    """Say where half of the way from the uniform merge to the search with skeletons is; "" where unknown."""
    ends: list[Estimate] = [
        found
        for method in (UNIFORM, SKELETONS)
        if (found := estimates([row for row in rows if row["method"] == method], "held_in_N"))
    ]
    if len(ends) < 2:
        return ""
    middle = (ends[0].mean + ends[1].mean) / 2
    return f"Halfway from the uniform merge to the search with skeletons is N {100 * middle:.1f}."


def selection_text(rows: Sequence[Row], methods: Sequence[str], variants: Sequence[str]) -> str:
    """Return the whole section: a table for each variant, and where it ran."""
    last = latest_rows(measured(rows))
    parts = [HOW]
    for variant in variants:
        own = [row for row in last if row["experts"] == variant]
        if own:
            parts += [f"Experts `{variant}`:", selection_table(own, methods)]
            parts += [text for text in [halfway(own)] if text]
    templates = sorted({(row["template"], row["questions"]) for row in last if "template" in row})
    parts += [f"Pool: {n} questions from the template {text!r}." for text, n in templates]
    return "\n\n".join([*parts, describe_runs(last)])
