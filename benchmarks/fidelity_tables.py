"""Tables of the fidelity benchmark, in Markdown, of its lines alone.

Knows the lines that benchmarks.fidelity writes; measures and draws nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.fidelity_rows import ANSWERED, DEFAULT, SOURCE
from benchmarks.fidelity_scene import SOURCES
from benchmarks.fidelity_statistics import WHERE
from benchmarks.rows import Row
from search.objective import OBJECTIVES

TERMS = ("retention", "pull", "smooth")
SPACES = {"model": "an adapter", "layer": "an adapter and layer"}
SOURCE_NAMES = {
    "skeleton": "skeletons, as in a search",
    "free": "no skeletons",
    "task": "validation questions (uses data)",
    "generic": "texts of the base",
}
Cells = Mapping[str, str]
"""Variant -> what a table says of it."""


class Lines:
    """The lines that count, by what they tell: of most merges, of the longest searches, the latest."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Take all lines, oldest first; a search that time cut short counts where there is no whole one."""
        parts = [row for row in rows if row["part"] not in ("search", "environment")]
        parts.sort(key=lambda row: row["n_merges"])
        self._parts = {(row["part"], row["experts"], row["source"]): row for row in parts}
        searches = [row for row in rows if row["part"] == "search"]
        longest = max((row["evaluations"] for row in searches), default=0)
        searches = [row for row in searches if row["evaluations"] == longest]
        searches.sort(key=lambda row: row["ended_by"] != "seconds")
        self.searches = list({tuple(row[key] for key in SEARCH_KEY): row for row in searches}.values())
        """The latest of each plan."""
        self.environments = [row for row in rows if row["part"] == "environment"]

    def part(self, name: str, experts: str, source: str = SOURCE) -> Row | None:
        """Return one line, None where there is none."""
        return self._parts.get((name, experts, source))

    def variants(self, known: Sequence[str]) -> list[str]:
        """Return the variants that there is anything of, in the order of `known`."""
        there = {experts for _, experts, _ in self._parts} | {row["experts"] for row in self.searches}
        return [variant for variant in known if variant in there]

    def entry(
        self, experts: str, source: str, objective: str, combine: str, positions: str
    ) -> dict[str, Any]:
        """Return the rank correlations of one loss, by column; none where they are not there."""
        row = self.part("ranking", experts, source)
        wanted = [objective, combine, positions]
        found = [entry for entry in row["entries"] if entry[:3] == wanted] if row else []
        return dict(zip(row["columns"], found[0], strict=True)) if row and found else {}

    def plain_searches(self, experts: str, objective: str, space: str) -> list[Row]:
        """Return the searches without added terms, one a seed."""
        return [row for row in self._found(experts, objective, space) if not any(row[t] for t in TERMS)]

    def term_searches(self, experts: str, term: str, weight: float) -> list[Row]:
        """Return the default objective's searches by layer with one term added, or with none at weight 0."""
        wanted = {name: weight if name == term else 0.0 for name in TERMS}
        rows = self._found(experts, DEFAULT.name, "layer")
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def _found(self, experts: str, objective: str, space: str) -> list[Row]:
        wanted = [experts, objective, space]
        return [row for row in self.searches if [row["experts"], row["objective"], row["space"]] == wanted]


SEARCH_KEY = ("experts", "objective", "space", "seed", *TERMS)
"""What makes two searches the same."""


def default_positions(source: str) -> str:
    """Return the positions that the search scores on prompts of a source."""
    return "answer" if source in ANSWERED else "all"


def default_entry(lines: Lines, experts: str, source: str = SOURCE) -> dict[str, Any]:
    """Return the rank correlations of the default loss."""
    return lines.entry(experts, source, DEFAULT.name, DEFAULT.combine, default_positions(source))


def source_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return the default loss's rank correlations with intervals, for each variant and source."""
    header = ["experts", "prompts", "held-in", "best quarter", "held-out", "best quarter", "merges"]
    body = []
    for variant in variants:
        for source in SOURCES:
            if entry := default_entry(lines, variant, source):
                row = lines.part("ranking", variant, source)
                cells = [_interval(entry, name) for name in WHERE]
                body.append([variant, SOURCE_NAMES[source], *cells, str(row["n_merges"] if row else "")])
    return make_table(header, body)


def objective_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return every objective's rank correlations, as the default combines and scores."""
    positions = default_positions(SOURCE)
    cells = {
        f"`{name}`": {v: _triple(lines.entry(v, SOURCE, name, DEFAULT.combine, positions)) for v in variants}
        for name in OBJECTIVES
    }
    return by_variant("objective", cells, variants)


def combination_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return the default objective's rank correlations under every combination, on either positions."""
    row = next((row for v in variants if (row := lines.part("ranking", v))), None)
    pairs = dict.fromkeys((entry[1], entry[2]) for entry in row["entries"]) if row else {}
    cells = {
        f"`{how}`, {positions}": {
            v: _triple(lines.entry(v, SOURCE, DEFAULT.name, how, positions)) for v in variants
        }
        for how, positions in pairs
    }
    return by_variant("combination, positions", cells, variants)


def kind_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return the default loss's rank correlations within each distribution of merges."""
    found: dict[str, dict[str, str]] = {}
    for variant in variants:
        row = lines.part("ranking", variant)
        for kind, rhos in row["by_kind"][DEFAULT.name].items() if row else ():
            found.setdefault(kind, {})[variant] = " / ".join(map(_number, rhos))
    return by_variant("distribution", found, variants)


def prompt_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return the default loss's rank correlations on so many prompts an adapter."""
    found: dict[str, dict[str, str]] = {}
    for variant in variants:
        row = lines.part("prompts_needed", variant)
        curve = row["curve"] if row else {"prompts": []}
        for k, n in enumerate(curve["prompts"]):
            rhos = " / ".join(_number(curve[name][k]) for name in WHERE[:3])
            found.setdefault(str(n), {})[variant] = f"{rhos} ({curve['tokens'][k]:,} tokens)"
    return by_variant("prompts an adapter", found, variants)


def bound_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return how the label-free bound fares."""
    header = ["experts", "prompts", "pairs", "holds", "within error", "worst excess", "of"]
    body = []
    for variant in variants:
        row = lines.part("bound", variant)
        for found in row["checks"] if row else ():
            shares = [f"{100 * found[name]:.1f}" for name in ("holds", "holds_within_error", "worst_excess")]
            worst = f"{found['worst_expert']}, {found['worst_kind']}"
            body.append([variant, str(found["prompts"]), f"{found['n_pairs']:,}", *shares, worst])
    return make_table(header, body)


def term_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return the rank correlations of the default loss with a term added."""
    found: dict[str, dict[str, str]] = {}
    for variant in variants:
        row = lines.part("terms", variant)
        for term, curves in row["curves"].items() if row else ():
            for k, weight in enumerate(row["weights"] if row else ()):
                rhos = " / ".join(_number(curves[name][k]) for name in WHERE)
                found.setdefault(f"{term} {weight:g}", {})[variant] = rhos
    return by_variant("term and weight", found, variants)


def by_variant(what: str, cells: Mapping[str, Cells], variants: Sequence[str]) -> str:
    """Return a table with a line for each label and a column for each variant."""
    body = [[label, *(own.get(variant, "-") for variant in variants)] for label, own in cells.items()]
    return make_table([what, *variants], body)


def make_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def _triple(entry: Mapping[str, Any]) -> str:
    return " / ".join(_number(entry[name]) for name in WHERE[:3]) if entry else "-"


def _interval(entry: Mapping[str, Any], name: str) -> str:
    if entry[name] is None:
        return "-"
    return f"{_number(entry[name])} ({_number(entry[name + '_low'])} to {_number(entry[name + '_high'])})"


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"
