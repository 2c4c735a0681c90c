"""Tables of the studies, in Markdown: an arm a line, at the end of the search and on the way to it.

Knows the lines that benchmarks.studies writes; runs and draws nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.intervals import Estimate, estimate_mean
from benchmarks.markdown import format_number, format_share, table_head, table_line
from benchmarks.quality_tables import describe_runs, estimates
from benchmarks.replay import BEST, CHOSEN, MEAN
from benchmarks.rows import Row, measured
from benchmarks.study_arms import DEFAULT, STUDIES
from benchmarks.zoo.sets import VARIANTS

SHARES = {"held_in_N": "N", "worst_task": "worst task's N", "held_out": "held-out"}
COSTS = {"search_s": "seconds", "evaluations": "evaluations", "n_tokens": "tokens"}
ANSWERS = "most frequent answer"
DELIVERED = {
    CHOSEN: "finalists' winner",
    MEAN: "mean of the distribution",
    BEST: "best on searched prompts",
}
UNITS = {"seconds": "{:g} s", "n_tokens": "{:,g} tokens", "evaluations": "{:,g} evaluations"}
HOW = (
    "Shares in percent: mean over seeds and, in brackets, its 95 % interval (percentile bootstrap, 10,000 "
    "resamples; n is the number of seeds). N is held-in accuracy divided by that of the task's own expert. "
    "Seconds and tokens are those of the search and of the gradient steps that refine its best, without the "
    "tokens of gradient steps that are injected. On the way: what a run that had been given so much would "
    "have returned, its N and its held-out accuracy; a dash where its search ended before, or would not have "
    "had a generation."
)


@dataclass(frozen=True, slots=True)
class Point:
    """A reading of a clock of the search."""

    clock: str
    """A key of UNITS."""
    at: float

    @property
    def label(self) -> str:
        """For the head of a table."""
        return UNITS[self.clock].format(self.at)


def study_rows(rows: Sequence[Row], study: str, experts: str) -> dict[str, list[Row]]:
    """Return the runs of each arm of a study on one expert set, the last one of each seed.

    Where seconds ended searches, those with the most of them count. Nothing is returned where only the
    default was run, for another study.
    """
    own = measured(row for row in rows if row["experts"] == experts and study in row["studies"])
    if all(DEFAULT.name in row["arms"] for row in own):
        return {}
    longest_s = max((row["limit_s"] for row in own if row["limit_s"] is not None), default=None)
    shown = [row for row in own if row["limit_s"] == longest_s or "search_s" not in row]
    arms = [arm.name for arm in STUDIES[study].arms]
    found = {arm: list({row["seed"]: row for row in shown if arm in row["arms"]}.values()) for arm in arms}
    return {arm: runs for arm, runs in found.items() if runs}


def end_table(runs: Mapping[str, Sequence[Row]], with_answers: bool = False) -> str:
    """Return the table of what the arms' searches ended with and spent."""
    answers = [ANSWERS] if with_answers else []
    lines = table_head(["arm", *SHARES.values(), *COSTS.values(), *answers, "n"])
    for arm, own in runs.items():
        cells = [format_share(estimates(own, name)) for name in SHARES]
        cells += [format_number(estimates(own, name)) for name in COSTS]
        cells += [format_share(top_share(own))] if with_answers else []
        lines.append(table_line([arm, *cells, str(len(own))]))
    return "\n".join(lines)


def way_table(runs: Mapping[str, Sequence[Row]]) -> str:
    """Return the table of the arms at each checkpoint that one of them reached; "" where there is none."""
    points = list_points([row for own in runs.values() for row in own])
    if not points:
        return ""
    lines = table_head(["arm", *(f"{point.label}: N; held-out" for point in points)])
    for arm, own in runs.items():
        lines.append(table_line([arm, *(_way_cell(own, point, CHOSEN) for point in points)]))
    return "\n".join(lines)


def delivery_table(rows: Sequence[Row]) -> str:
    """Return the table of what one arm's search could deliver at each checkpoint; "" where there is none."""
    points = list_points(rows)
    if not points:
        return ""
    lines = table_head(["delivered", *(f"{point.label}: N; held-out" for point in points)])
    for name, label in DELIVERED.items():
        lines.append(table_line([label, *(_way_cell(rows, point, name) for point in points)]))
    return "\n".join(lines)


def list_points(rows: Sequence[Row]) -> list[Point]:
    """Return the checkpoints of some runs: in the order of UNITS."""
    points = {Point(found["clock"], found["at"]) for row in rows for found in row.get("checkpoints", [])}
    return sorted(points, key=lambda point: (list(UNITS).index(point.clock), point.at))


def at_point(rows: Sequence[Row], point: Point, table: str, name: str) -> Estimate | None:
    """Estimate one measure at a checkpoint; None where no run reached it.

    Args:
        rows: runs of one arm.
        point: the checkpoint.
        table: CHOSEN, MEAN or BEST.
        name: one of SHARES.
    """
    found = [
        checkpoint[table][name]
        for row in rows
        for checkpoint in row.get("checkpoints", [])
        if (checkpoint["clock"], checkpoint["at"]) == (point.clock, point.at) and table in checkpoint
    ]
    return estimate_mean(found) if found else None


def top_share(rows: Sequence[Row]) -> Estimate | None:
    """Estimate the share of an adapter's most frequent answer, the mean over adapters with a skeleton."""
    shares = [np.mean([*own.values()]) for row in rows if (own := row.get("answers_top_share"))]
    return estimate_mean(shares) if shares else None


def _way_cell(rows: Sequence[Row], point: Point, table: str) -> str:
    shares = [at_point(rows, point, table, name) for name in ("held_in_N", "held_out")]
    return "; ".join(format_share(found) for found in shares) if any(shares) else "-"


def studies_text(rows: Sequence[Row], figures: Mapping[tuple[str, str], str]) -> str:
    """Return the whole section: each study on each expert set, its figure if it has one, and where it ran.

    Args:
        rows: all lines of the benchmark.
        figures: (study, expert set) -> path of a figure, as seen from the document.
    """
    parts, shown = [HOW], []
    for name, study in STUDIES.items():
        for experts in VARIANTS:
            runs = study_rows(rows, name, experts)
            if not runs:
                continue
            shown += [row for own in runs.values() for row in own]
            parts += [f"**{study.question}**, experts `{experts}`:", end_table(runs, name == "prompts")]
            parts += _on_the_way(runs)
            if (name, experts) in figures:
                parts.append(
                    f"![Held-in N and held-out accuracy against seconds of search]({figures[name, experts]})"
                )
    failed = [row for row in rows if "failure" in row and not _is_repeated(row, shown)]
    return "\n\n".join([*parts, describe_runs([*shown, *failed])])


def _on_the_way(runs: Mapping[str, Sequence[Row]]) -> list[str]:
    way, delivered = way_table(runs), delivery_table(runs.get(DEFAULT.name, []))
    parts = ["On the way:", way] if way else []
    return [*parts, "What the default could deliver there:", delivered] if delivered else parts


def _is_repeated(failed: Row, shown: Sequence[Row]) -> bool:
    """Whether a run that failed worked another time."""
    key: Any = (failed["method"], failed["experts"], failed["seed"])
    return any((row["method"], row["experts"], row["seed"]) == key for row in shown)
