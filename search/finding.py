"""Say in words what traces show: what was found, against what, how late, and where it falls short.

Knows the tables of search/tables.py; not figures or files.
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass

from search.tables import (
    best_candidate,
    ending_event,
    expert_table,
    finalist_table,
    generation_table,
    reference_table,
    run_table,
)
from search.trace import Trace

ENDED_BECAUSE = {
    "evaluations": "its limit of evaluations ended it",
    "clock": "the clock ended it",
    "interrupt": "it was interrupted",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Sentences on each run, shown as paragraphs in a notebook."""

    paragraphs: tuple[str, ...]

    def __str__(self) -> str:
        return "\n\n".join(self.paragraphs)

    def _repr_html_(self) -> str:
        return "".join(f"<p>{html.escape(text)}</p>" for text in self.paragraphs)


def state_finding(traces: Mapping[str, Trace]) -> Finding:
    """Return a paragraph for each run, and for several runs one on those that can be compared."""
    paragraphs = [f"{label}: {_describe_run_found(trace)}" for label, trace in traces.items()]
    finalists = {label: finalist_table(trace) for label, trace in traces.items()}
    losses = {
        label: float(table.loc[table["verdict"] == "winner", "loss"].min())
        for label, table in finalists.items()
        if (table["prompts"] == "unseen").any() and (table["verdict"] == "winner").any()
    }
    if len(losses) > 1:
        best = min(losses, key=lambda label: losses[label])
        paragraphs.append(
            f"Of {len(losses)} runs with finalists on unseen prompts, {best} has the smallest loss, "
            f"{losses[best]:.3g} (the largest is {max(losses.values()):.3g}). Losses compare runs only where "
            "base, adapters, objective and prompts are the same."
        )
    return Finding(tuple(paragraphs))


def _describe_run_found(trace: Trace) -> str:
    if not trace.generations:
        return "no generation was finished, so there is nothing to find."
    sentences = [_describe_effort(trace), _describe_progress(trace)]
    sentences.append(_describe_winner(trace) if ending_event(trace, "finalists") else _describe_best(trace))
    return " ".join(sentence for sentence in sentences if sentence)


def _describe_effort(trace: Trace) -> str:
    run = run_table(trace).iloc[0]
    ending = ENDED_BECAUSE.get(run["ended_by"], "it has not ended")
    return (
        f"the search scored {run['evaluations']} candidates on {run['n_tokens']:,} tokens within "
        f"{run['elapsed_s']:.0f} s; {ending}."
    )


def _describe_progress(trace: Trace) -> str:
    """Say when the best candidate came: late means that more time may find more."""
    best = best_candidate(trace)
    if best is None:
        return "No candidate has a finite loss on all prompts."
    n_generations = len(generation_table(trace))
    return (
        f"The best on the searched prompts came in generation {best[0].index} (of 0 to {n_generations - 1})."
    )


def _describe_winner(trace: Trace) -> str:
    run, finalists = run_table(trace).iloc[0], finalist_table(trace)
    others = [
        f"{name} {finalists['loss'][name]:.3g}"
        for name in ("base", "uniform", "balanced", "prior")
        if name in finalists.index
    ]
    experts = finalists[finalists["kind"] == "expert"]
    others += [f"the best single {name} {loss:.3g}" for name, loss in experts["loss"].head(1).items()]
    return (
        f"On the {run['prompts']} prompts the winner is {run['winner']!r} with a loss of {run['loss']:.3g} "
        f"({', '.join(others)}). {_compare_experts(trace, 'winner')}"
    )


def _describe_best(trace: Trace) -> str:
    best = generation_table(trace)["best_loss"].iloc[-1]
    others = ", ".join(f"{name} {loss:.3g}" for name, loss in reference_table(trace)["loss"].items())
    known = f" ({others})" if others else ""
    return (
        "There are no finalists, so nothing is known on unseen prompts; the best loss on the searched "
        f"prompts is {best:.3g}{known}. {_compare_experts(trace, 'best so far')}"
    )


def _compare_experts(trace: Trace, point: str) -> str:
    """Name the experts that the merge comes closest to, stays farthest from, and serves worse than before."""
    table = expert_table(trace)
    values = table[point].dropna() if point in table else table["peak_kl_nats"].iloc[:0]
    if values.empty:
        return ""
    text = (
        f"It is closest to the expert {values.idxmin()} ({values.min():.2g} of the base's disagreement) and "
        f"farthest from {values.idxmax()} ({values.max():.2g})."
    )
    worse = [
        str(name) for name in values.index if "uniform" in table and values[name] > table["uniform"][name]
    ]
    if worse:
        text += f" The uniform merge is closer to {len(worse)} of {len(table)}: {', '.join(worse[:5])}"
        text += ", ..." if len(worse) > 5 else "."
    return text
