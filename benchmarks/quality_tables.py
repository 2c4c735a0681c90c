"""Tables of the quality benchmark, in Markdown: methods on each variant, the search on odd expert sets.

Knows the lines that benchmarks.quality, benchmarks.labelled and benchmarks.operator_search write; runs and
draws nothing.
"""

from collections.abc import Sequence

from benchmarks.intervals import Estimate, estimate_mean
from benchmarks.markdown import format_number, format_share, table_head, table_line
from benchmarks.rows import Row, is_option, measured

UNIFORM, SEARCH = "uniform_average", "my_merge"
SHARES = {"held_in_N": "held-in N", "held_in_R": "held-in R", "worst_task": "worst task's N"} | {
    "held_out": "held-out"
}
COSTS = {"seconds": "seconds", "search_s": "search seconds", "evaluations": "evaluations"}
HOW = (
    "Shares in percent: mean over seeds and, in brackets, its 95 % interval (percentile bootstrap, 10,000 "
    "resamples; n is the number of seeds, and methods without chance run once). N is accuracy divided by "
    "that of the task's own expert, R = (merge - base) / (expert - base). Seconds are the whole job's, start "
    "to last answer; search seconds are those in which candidates were scored. No option: data-free too, but "
    "not offered by `-m`: either what a method adds up, one update an adapter, weighed by the search from 1 "
    "each, or the search's coefficients at other adapters than they were found for (mean of permutations)."
)


def estimates(rows: Sequence[Row], name: str) -> Estimate | None:
    """Estimate one measure over runs; None where no run has it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return estimate_mean(values) if values else None


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return runs by method, data-free methods first, each kind by its held-in N, best first."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["method"], []).append(row)

    def rank(method: str) -> tuple[bool, float]:
        found = estimates(runs[method], "held_in_N")
        return bool(runs[method][0].get("labels")), -(found.mean if found else 0.0)

    return {method: runs[method] for method in sorted(runs, key=rank)}


def method_table(rows: Sequence[Row]) -> str:
    """Return the table of one variant's methods, those that use labels marked and last."""
    lines = table_head(["merge", *SHARES.values(), *COSTS.values(), "n"])
    for method, own in by_method(rows).items():
        mark = "labels" if own[0].get("labels") else "no option"
        label = f"`{method}`" if is_option(own[0]) else f"{method} ({mark})"
        shares = [format_share(estimates(own, name)) for name in SHARES]
        costs = [format_number(estimates(own, name)) for name in COSTS]
        lines.append(table_line([label, *shares, *costs, str(len(own))]))
    return "\n".join(lines)


def set_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Return the table of expert sets: the search against the uniform merge on the set's own tasks.

    The weight of experts that deserve none is told in shares of the others' mean.
    """
    columns = ("experts", "tasks", "uniform N", "search N", "search - uniform", "least of seeds")
    lines = table_head([*columns, "weight of the worthless", "n"])
    for name in names:
        own = [row for row in rows if row["experts"] == name]
        uniform = estimates([row for row in own if row["method"] == UNIFORM], "held_in_N")
        found = estimates([row for row in own if row["method"] == SEARCH], "held_in_N")
        if found is None or uniform is None:
            continue
        gain, weights = estimate_mean(gains(own)), worthless_weights(own)
        cells = [
            name,
            str(len(own[0]["held_in_tasks"])),
            format_share(uniform),
            format_share(found),
            format_share(gain),
        ]
        cells += [f"{100 * gain.least:+.1f}", format_share(estimate_mean(weights) if weights else None)]
        lines.append(table_line([*cells, str(found.n)]))
    return "\n".join(lines)


def gains(rows: Sequence[Row]) -> list[float]:
    """Return each seed's held-in N of the search less the uniform merge's; none where either was not run."""
    uniform = estimates([row for row in rows if row["method"] == UNIFORM], "held_in_N")
    searched = [row["held_in_N"] for row in rows if row["method"] == SEARCH]
    return [share - uniform.mean for share in searched] if uniform else []


def worthless_weights(rows: Sequence[Row]) -> list[float]:
    """Return `worthless_weight` of each seed's search that has such experts."""
    weights = (worthless_weight(row) for row in rows if row["method"] == SEARCH)
    return [weight for weight in weights if weight is not None]


def worthless_weight(row: Row) -> float | None:
    """Return the worthless experts' mean absolute coefficient over the others', None without such experts."""
    worthless, weights = row.get("worthless", []), row.get("mean_abs_coefficients", {})
    theirs = [weights[name] for name in worthless if name in weights]
    others = [weight for name, weight in weights.items() if name not in worthless]
    if not theirs or not sum(others):
        return None
    return float(sum(theirs) / len(theirs) / (sum(others) / len(others)))


def quality_text(rows: Sequence[Row], variants: Sequence[str], sets: Sequence[str], figure: str) -> str:
    """Return the whole section: a table for each variant, the figure, the expert sets, and where it ran."""
    good = measured(rows)
    parts = [HOW]
    for variant in variants:
        own = [row for row in good if row["experts"] == variant]
        if own:
            parts += [f"Experts `{variant}`:", method_table(own)]
    parts.append(f"![Held-in and held-out quality against seconds, a marker for each method]({figure})")
    if any(row["experts"] in sets for row in good):
        parts += ["Other sets of experts, N over the tasks of the set:", set_table(good, sets)]
    return "\n\n".join([*parts, describe_runs(rows)])


def describe_runs(rows: Sequence[Row]) -> str:
    """Say on what machines, with what code and settings, and what failed."""
    told = [
        f"{title}: {'; '.join(found)}."
        for title, key in (("Machine", "machine"), ("Commit", "commit"), ("Configuration", "config"))
        if (found := _distinct(rows, key))
    ]
    cores = _distinct(rows, "cores")
    told.append(f"Cores a run was pinned to: {', '.join(cores)}.")
    failed = [f"{r['method']} on {r['experts']}, seed {r['seed']}" for r in rows if "failure" in r]
    return " ".join([*told, f"Failed: {'; '.join(failed)}." if failed else "No run failed."])


def _distinct(rows: Sequence[Row], key: str) -> list[str]:
    return sorted({str(row[key]) for row in rows if row.get(key) is not None})
