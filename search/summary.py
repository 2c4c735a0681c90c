"""The report of a run, for people: what won, what ended the search, how close each expert is.

Knows numbers and names; not how they were found. Plain text, no tables of a library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search.finalists import Judgement
from search.loop import EndedBy
from search.space import FloatArray

ENDINGS: dict[EndedBy, str] = {
    "evaluations": "the limit on evaluations",
    "clock": "the clock",
    "interrupt": "an interrupt",
}
BOUND = (
    "on how many of the expert's unseen prompts the merge gives its top answer at every scored position; "
    "on inputs like those from a skeleton the two accuracies differ by at most one minus that share"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the report says."""

    names: Sequence[str]
    """(n_adapters,)."""
    judgement: Judgement
    evaluations: int
    generations: int
    ended_by: EndedBy
    """Of the run; the finalists may be interrupted where the search was not."""
    n_unseen: Sequence[int]
    """(n_adapters,) prompts that the search has not seen."""
    left_out: Mapping[str, str]
    """Name of each adapter that is not in the merge at all, and why."""
    twins: Sequence[str]
    """Names of adapters that are the same weights, a text for each set of them."""
    weak: Sequence[str]
    """Names of adapters whose prompts are too weak to steer by."""
    back_offs: Sequence[Mapping[str, int]]
    """Each time memory ran out: {"tokens", "tokens_per_forward"}."""


def write_summary(facts: RunFacts) -> str:
    """Return the report, without a last line end."""
    judgement = facts.judgement
    agreement = judgement.agreements.get(judgement.place)  # counted on unseen prompts only
    prompts = "the prompts searched on" if agreement is None else "prompts that the search has not seen"
    rivals = ", ".join(f"{name} {loss:.4f}" for name, loss in judgement.rivals.items())
    loss = judgement.losses[judgement.place]
    lines = [
        f"winner: {judgement.winner.name}, loss {loss:.4f} on {prompts} ({rivals})",
        f"search: {facts.evaluations} evaluations in {facts.generations} generations, "
        f"ended by {ENDINGS[facts.ended_by]}",
        *_describe_experts(facts, agreement),
    ]
    lines += [f"left out, coefficient 0: {name}: {reason}" for name, reason in facts.left_out.items()]
    lines += [f"the same weights under several names: {names}" for names in facts.twins]
    if facts.weak:
        lines.append(_describe_weak(facts))
    if facts.back_offs:
        least = min(event["tokens_per_forward"] for event in facts.back_offs)
        lines.append(f"memory ran out {len(facts.back_offs)} times; at last {least} tokens to a forward pass")
    return "\n".join(lines)


def write_skipped(winner: str, phase: str, limit_s: float, left_out: Mapping[str, str]) -> str:
    """Return the report of a run whose time box had no room for a search, without a last line end."""
    lines = [
        f"the time box of {limit_s:g} s is too short for a search: it ended in the phase {phase!r}",
        f"winner: {winner}, which needs no search; a larger time box searches",
    ]
    lines += [f"left out, coefficient 0: {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


def _describe_experts(facts: RunFacts, agreement: FloatArray | None) -> list[str]:
    """One line an expert under a heading, then what the columns mean; counts only where there are any."""
    width = max(map(len, ("expert", *facts.names)))
    judgement = facts.judgement
    rows = [
        f"{name:<{width}}  {left:9.3f}"
        for name, left in zip(facts.names, judgement.per_expert[judgement.place], strict=True)
    ]
    heading = f"{'expert':<{width}}  loss left"
    meaning = "loss left: disagreement with the expert over the base's (0 is the expert itself, 1 the base)"
    if agreement is None:
        return [heading, *rows, meaning]
    counts = [f"{round(share * n)} of {n}" for share, n in zip(agreement, facts.n_unseen, strict=True)]
    counted = [f"{row}  {count}" for row, count in zip(rows, counts, strict=True)]
    return [f"{heading}  same answer", *counted, meaning, f"same answer: {BOUND}"]


def _describe_weak(facts: RunFacts) -> str:
    if len(facts.weak) == len(facts.names):
        found = "weak signal from all adapters: the result is close to the balanced merge."
    else:
        found = f"weak signal, kept near the balanced merge: {', '.join(facts.weak)}."
    return f"{found} Give them `skeletons:` in the words that they were trained on."
