"""Is the search as good as is wanted of it? The quality benchmark's numbers against their limits.

Knows lines of the benchmark and limits; runs and draws nothing.
"""

from collections.abc import Sequence

from benchmarks.quality_tables import SEARCH, estimates, gains, worthless_weights
from benchmarks.rows import SCALED, Row, is_option
from benchmarks.zoo.check import Limit

HELD_IN_MEAN, HELD_IN_SEED, WORST_TASK = 97.0, 95.0, 85.0
ABOVE_FREE, ABOVE_LABELLED = 15.0, 10.0
"""Points of held-in N above the best data-free method, and above the best scale that labels pick for one."""
MOST_WEIGHT = 10.0
"""Of a worthless expert, in percent of the others' mean."""


def quality_limits(rows: Sequence[Row], variants: Sequence[str], sets: Sequence[str]) -> list[Limit]:
    """Return every limit that the recorded runs can tell of."""
    found = [limit for variant in variants for limit in variant_limits(rows, variant)]
    return [*found, *(limit for name in sets for limit in set_limits(rows, name))]


def variant_limits(rows: Sequence[Row], variant: str) -> list[Limit]:
    """Return the limits on one variant; none where the search was not run."""
    own = [row for row in rows if row["experts"] == variant]
    searched = [row for row in own if row["method"] == SEARCH]
    held_in, worst = estimates(searched, "held_in_N"), estimates(searched, "worst_task")
    if held_in is None or worst is None:
        return []
    free = [row for row in own if row["method"] != SEARCH and is_option(row)]
    scaled = [row for row in own if row["method"].endswith(SCALED)]
    task_arithmetic = [row for row in scaled if row["method"] == f"task_arithmetic{SCALED}"]
    limits = [
        _at_least(f"{variant}: held-in N, mean", 100 * held_in.mean, HELD_IN_MEAN),
        _at_least(f"{variant}: held-in N, every seed", 100 * held_in.least, HELD_IN_SEED),
        _at_least(f"{variant}: worst task's N, mean", 100 * worst.mean, WORST_TASK),
        _at_least(f"{variant}: worst task's N, every seed", 100 * worst.least, WORST_TASK),
    ]
    for others, what, measure, wanted in (
        (free, "held-in N above the best data-free", "held_in_N", ABOVE_FREE),
        (scaled, "held-in N above the best label-tuned", "held_in_N", ABOVE_LABELLED),
        (free, "held-out above the best data-free", "held_out", 0.0),
        (task_arithmetic, "held-out above label-tuned", "held_out", 0.0),
    ):
        limits += _margin(f"{variant}: {what}", searched, others, measure, wanted)
    return limits


def set_limits(rows: Sequence[Row], name: str) -> list[Limit]:
    """Return the limits on one other set of experts."""
    own = [row for row in rows if row["experts"] == name]
    limits = [_at_least(f"{name}: above uniform, every seed", 100 * g, 0.0) for g in sorted(gains(own))[:1]]
    weights = sorted(worthless_weights(own))[-1:]
    heaviest = [
        Limit(f"{name}: worthless weight, every seed", 100 * w, MOST_WEIGHT, False, "%") for w in weights
    ]
    return limits + heaviest


def _margin(
    name: str, searched: Sequence[Row], others: Sequence[Row], measure: str, wanted: float
) -> list[Limit]:
    """Compare means with the best of other methods; nothing where there are none."""
    found = estimates(searched, measure)
    means = {
        method: estimate.mean
        for method in {row["method"] for row in others}
        if (estimate := estimates([row for row in others if row["method"] == method], measure))
    }
    if not means or found is None:
        return []
    best = max(sorted(means), key=means.__getitem__)
    return [Limit(name, 100 * (found.mean - means[best]), wanted, True, "points", best)]


def _at_least(name: str, measured: float, wanted: float) -> Limit:
    return Limit(name, measured, wanted, True, "%")
