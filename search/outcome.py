"""What a run returns, and how its winner is merged and written.

Knows setup, winner and folder; not how the winner was found.
"""

from dataclasses import dataclass
from pathlib import Path

from search.adapters import Adapter
from search.delivery import deliver_merge
from search.finalists import Finalist
from search.groups import Groups
from search.loop import EndedBy
from search.merge import MergedAdapter
from search.objective import objective_label
from search.provenance import checkout_commit, library_versions
from search.recorded import TRACE_FILE
from search.setup import Setup
from search.space import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunResult:
    """What a run found and wrote."""

    adapters: tuple[Adapter, ...]
    coefficients: FloatArray
    """(n_groups, n_adapters) of the winner."""
    groups: Groups
    merged: MergedAdapter
    winner: str
    """The finalist's name."""
    loss: float
    """On unseen prompts, or on the searched ones where finalists were skipped."""
    evaluations: int
    ended_by: EndedBy
    interrupted: bool
    """Whether somebody asked to end, be it when all was done but the merge."""
    report: str
    """For people."""


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """What is merged, and what is said of it."""

    winner: Finalist
    loss: float
    """NaN where nothing was compared."""
    per_expert: list[float] | None
    """(n_experts,) what the loss is combined from, if there is one."""
    ended_by: EndedBy
    evaluations: int
    report: str


def deliver_ending(setup: Setup, ending: Ending, output: Path) -> MergedAdapter:
    """Merge the winner, and write adapter and coefficients."""
    winner = ending.winner
    return deliver_merge(
        setup.parts,
        winner.coefficients,
        setup.config.base.name,
        output,
        objective={
            "name": objective_label(setup.objective),
            "combine": setup.config.objective.combine,
            **({} if ending.per_expert is None else {"loss": ending.loss, "per_expert": ending.per_expert}),
        },
        provenance={
            "commit": checkout_commit(),
            "versions": library_versions(),
            "seed": setup.config.search.seed,
            "trace": TRACE_FILE,
            "winner": winner.name,
            "ended_by": ending.ended_by,
            "evaluations": ending.evaluations,
            "left_out": dict(setup.left_out),
        },
    )
