"""Tables of long searches, in Markdown, and the fidelity benchmark's whole text and limits.

Knows the lines that benchmarks.fidelity writes; measures and draws nothing.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.fidelity_rows import DEFAULT
from benchmarks.fidelity_tables import (
    SPACES,
    TERMS,
    Lines,
    bound_table,
    by_variant,
    combination_table,
    default_entry,
    kind_table,
    objective_table,
    prompt_table,
    source_table,
    term_table,
)
from benchmarks.rows import Row
from search.objective import OBJECTIVES

WANTED_RHO, WANTED_RHO_BEST, MOST_LOST = 0.95, 0.75, 0.01
"""For the default objective: rank correlations, and what true accuracy may lose by going on."""


def lost_at_end(row: Row) -> float:
    """Return how far a search's held-in N is, at its end, below its highest."""
    held_in = row["curve"]["held_in_N"]
    return round(float(max(held_in) - held_in[-1]), 4)  # as exact as the line is


def search_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return where searches end: highest held-in N on the way, at the end, and held-out at the end."""
    cells = {
        f"`{objective}`, {SPACES[space]}": {
            variant: _ends(lines.plain_searches(variant, objective, space)) for variant in variants
        }
        for objective in OBJECTIVES
        for space in SPACES
    }
    return by_variant("objective, one coefficient", cells, variants)


def term_search_table(lines: Lines, variants: Sequence[str]) -> str:
    """Return where the default objective's searches by layer end with a term added."""
    weights = {(term, row[term]) for row in lines.searches for term in TERMS if row[term]}
    pairs = [("none", 0.0), *sorted(weights, key=lambda pair: (TERMS.index(pair[0]), pair[1]))]
    cells = {
        f"{term} {weight:g}" if weight else term: {
            variant: _ends(lines.term_searches(variant, term, weight)) for variant in variants
        }
        for term, weight in pairs
    }
    return by_variant("term and weight", cells, variants)


def _ends(rows: Sequence[Row]) -> str:
    """Return means over seeds, in percent."""
    if not rows:
        return "-"
    most = np.mean([max(row["curve"]["held_in_N"]) for row in rows])
    held_in, held_out = (np.mean([r["curve"][name][-1] for r in rows]) for name in ("held_in_N", "held_out"))
    cut = "*" if any(row["ended_by"] == "seconds" for row in rows) else ""
    return f"{100 * most:.1f} / {100 * held_in:.1f} / {100 * held_out:.1f} (n = {len(rows)}){cut}"


def limits(lines: Lines, variants: Sequence[str]) -> list[str]:
    """Return a line for each limit on the default objective: met or missed, and by what."""
    told = []
    for variant in variants:
        entry = default_entry(lines, variant)
        for name, wanted in (("held_in", WANTED_RHO), ("held_in_best", WANTED_RHO_BEST)):
            if (rho := entry.get(name)) is not None:
                told.append(_limit(rho >= wanted, f"{variant}: Spearman {name} {rho:.3f}, wanted {wanted}"))
        for space in SPACES:
            for row in lines.plain_searches(variant, DEFAULT.name, space):
                lost, where = lost_at_end(row), f"{variant}, {space}, seed {row['seed']}"
                text = f"{where}: {100 * lost:.1f} points below the highest after {row['evaluations']}"
                told.append(_limit(lost <= MOST_LOST, f"{text} evaluations, wanted {100 * MOST_LOST:g}"))
    return told


def _limit(is_met: bool, text: str) -> str:
    return f"{'met   ' if is_met else 'MISSED'} {text}"


def fidelity_text(lines: Lines, variants: Sequence[str], figures: str) -> str:
    """Return the whole section; `figures` is the folder of the figures, seen from the document."""
    parts = [
        "Rank correlations (Spearman) of -loss with true accuracy over merges of seven distributions; "
        "held-in is N, the mean over tasks of accuracy divided by the task's own expert's, held-out the mean "
        "accuracy on compositions. The best quarter is that of merges with the highest held-in N. In "
        "brackets 95 % intervals (percentile bootstrap over merges, 500 resamples). The default loss, by "
        "source of prompts:",
        source_table(lines, variants),
        f"![Default loss against true held-in N, a point a merge]({figures}/fidelity.svg)",
        "Every objective, combined and scored as by default; held-in / its best quarter / held-out:",
        objective_table(lines, variants),
        "The default objective, otherwise combined or on other positions, likewise:",
        combination_table(lines, variants),
        "The default loss within each distribution of merges, held-in / held-out:",
        kind_table(lines, variants),
        "On fewer prompts, mean over random subsets, held-in / its best quarter / held-out:",
        prompt_table(lines, variants),
        f"![Rank correlation against prompts an adapter]({figures}/prompts_needed.svg)",
        "The bound of section 7, over pairs of a merge and an expert, in percent; within error: what is lost "
        "exceeds 1 - g by less than 1.96 standard errors of both shares (Agresti-Coull):",
        bound_table(lines, variants),
        "The default loss with a term added: retention, KL(base, merge) in nats on texts of the base; pull, "
        "the mean of c^2; smooth, coefficients' variance over layers. Held-in / its best quarter / held-out "
        "/ its best quarter:",
        term_table(lines, variants),
        f"![Held-in against held-out by the weight of an added term]({figures}/retention.svg)",
    ]
    return "\n\n".join([*parts, *_search_parts(lines, variants, figures), _where(lines)])


def _search_parts(lines: Lines, variants: Sequence[str], figures: str) -> list[str]:
    if not lines.searches:
        return []
    evaluations = max(row["evaluations"] for row in lines.searches)
    return [
        f"Searches of {evaluations:,} evaluations (CMA, no race, 8 prompts an adapter), the distribution's "
        "mean: highest held-in N on the way / held-in N at the end / held-out at the end, mean over n seeds "
        "in percent. A search ends early where no coefficient's standard deviation is above 0.0001; a star: "
        "some were cut short by time.",
        search_table(lines, variants),
        f"![True accuracy along long searches, a line an objective]({figures}/goodhart.svg)",
        "The default objective by adapter and layer, with a term added to the loss, likewise:",
        term_search_table(lines, variants),
    ]


def _where(lines: Lines) -> str:
    """Say on what machines, and with what code."""
    told = [
        f"{title}: {'; '.join(found)}."
        for title, key in (("Machine", "machine"), ("Device", "device_name"), ("Commit", "commit"))
        if (found := sorted({str(row[key]) for row in lines.environments if row.get(key)}))
    ]
    return " ".join(told)
