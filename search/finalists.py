"""Who is compared at the end, and who wins: the search's best against the merges that need no search.

Knows coefficients, losses and agreement; not prompts, models or time. No torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from search.errors import InputError
from search.space import FloatArray

Verdict = Literal["winner", "beaten", "not finite", "outside bounds", "collapsed"]
BASE, UNIFORM, BALANCED, PRIOR, SINGLE = "base", "uniform", "balanced", "prior", "expert "
"""Names of references, the last one before an adapter's name."""


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Where coefficients may lie; a reference need not."""

    low: FloatArray
    """(n_adapters,) -inf where free."""
    high: FloatArray
    """(n_adapters,) inf where free."""

    def hold(self, coefficients: FloatArray) -> bool:
        """Whether coefficients (n_groups, n_adapters) lie inside."""
        return bool(((coefficients >= self.low) & (coefficients <= self.high)).all())


@dataclass(frozen=True, slots=True, eq=False)
class Finalist:
    """A merge that may become the result."""

    name: str
    """"base", "uniform", "balanced", "prior", "expert NAME"; "archive 1" (the best), "mean", "refined"."""
    coefficients: FloatArray
    """(n_groups, n_adapters)."""
    is_reference: bool
    """Needs no search: base, uniform or balanced merge, prior or a single expert."""


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """The finalists, compared."""

    finalists: tuple[Finalist, ...]
    losses: FloatArray
    """(n_finalists,)."""
    per_expert: FloatArray
    """(n_finalists, n_experts)."""
    agreements: dict[int, FloatArray]
    """By index: (n_experts,) share of prompts with the expert's top answer; of those that were asked."""
    verdicts: tuple[Verdict, ...]

    @property
    def place(self) -> int:
        """Index of the winner."""
        return self.verdicts.index("winner")

    @property
    def winner(self) -> Finalist:
        """Who won."""
        return self.finalists[self.place]

    @property
    def rivals(self) -> dict[str, float]:
        """Losses of base, uniform, balanced and, where they were compared, prior and best single expert."""
        loss_of = {f.name: loss for f, loss in zip(self.finalists, self.losses.tolist(), strict=True)}
        singles = [name for name in loss_of if name.startswith(SINGLE)]
        best = sorted(singles, key=loss_of.__getitem__)[:1]
        return {name: loss_of[name] for name in (BASE, UNIFORM, BALANCED, PRIOR, *best) if name in loss_of}


def make_references(
    n_groups: int, adapter_names: Sequence[str], balanced: FloatArray, prior: FloatArray | None = None
) -> tuple[Finalist, ...]:
    """Return base, uniform and balanced merge, the prior's start if any, and every expert.

    Args:
        balanced: (n_adapters,) coefficients under which all updates are equally long.
        prior: (n_groups, n_adapters).
    """
    n_adapters = len(adapter_names)
    shape = (n_groups, n_adapters)
    general = {BASE: np.zeros(shape), UNIFORM: np.full(shape, 1 / n_adapters)}
    general[BALANCED] = np.broadcast_to(balanced, shape).copy()
    if prior is not None:
        general[PRIOR] = prior
    singles = {
        SINGLE + name: np.broadcast_to(row, shape).copy()
        for name, row in zip(adapter_names, np.eye(n_adapters), strict=True)
    }
    return tuple(Finalist(name, table, True) for name, table in {**general, **singles}.items())


def make_candidates(archive: FloatArray, mean: FloatArray, refined: FloatArray | None) -> list[Finalist]:
    """Return what the search offers: archive (k, n_groups, n_adapters), mean and refined best."""
    tables = {f"archive {place + 1}": table for place, table in enumerate(archive)}
    tables["mean"] = mean
    if refined is not None:
        tables["refined"] = refined
    return [Finalist(name, table, False) for name, table in tables.items()]


def choose_finalists(finalists: Sequence[Finalist], n_most: int) -> list[Finalist]:
    """Return at most so many, in their order, but never fewer than `count_few` says.

    Given up first are single experts, which hardly ever win, then the rest of the archive from its end.
    """
    wanted = sorted(range(len(finalists)), key=lambda index: (_rank(finalists[index]), index))
    kept = sorted(wanted[: max(n_most, count_few(finalists))])
    return [finalists[index] for index in kept]


def count_few(finalists: Sequence[Finalist]) -> int:
    """Count what a comparison cannot do without: general references, the best, refined or not, the mean."""
    return sum(_rank(finalist) == 0 for finalist in finalists)


def _rank(finalist: Finalist) -> int:
    if finalist.is_reference:
        return 2 if finalist.name.startswith(SINGLE) else 0
    return 0 if finalist.name in ("archive 1", "refined", "mean") else 1


def stack_coefficients(finalists: Sequence[Finalist]) -> FloatArray:
    """Return all their coefficients, (n_finalists, n_groups, n_adapters)."""
    return np.stack([finalist.coefficients for finalist in finalists])


def judge_finalists(
    finalists: Sequence[Finalist],
    losses: FloatArray,
    per_expert: FloatArray,
    bounds: Bounds,
    agreement_of: Callable[[FloatArray], FloatArray] | None = None,
) -> Judgement:
    """Let the lowest loss win, of those that may.

    Set aside are losses that are not finite, merges outside the bounds (a reference may be) and what
    has collapsed: a merge from the search that gives the experts' top answers less often than the uniform
    merge, which must be among the finalists. Equal losses keep their order.

    Args:
        finalists: references before what they should win against on equal losses.
        losses: (n_finalists,).
        per_expert: (n_finalists, n_experts).
        bounds: that the winner keeps to.
        agreement_of: coefficients (n_groups, n_adapters) -> shares (n_experts,), asked only about the uniform
            merge and those that would win; without it nothing counts as collapsed.

    Raises:
        InputError: if nobody may win.
    """
    verdicts: list[Verdict] = ["beaten"] * len(finalists)
    agreements: dict[int, FloatArray] = {}

    def may_win(index: int) -> bool:
        if agreement_of is None:
            return True
        for asked in {uniform, index} - agreements.keys():
            agreements[asked] = agreement_of(finalists[asked].coefficients)
        return finalists[index].is_reference or agreements[index].mean() >= agreements[uniform].mean()

    uniform = next(index for index, finalist in enumerate(finalists) if finalist.name == UNIFORM)
    for index in np.argsort(losses, kind="stable").tolist():
        if flaw := _find_flaw(float(losses[index]), finalists[index], bounds):
            verdicts[index] = flaw
        elif "winner" not in verdicts:
            verdicts[index] = "winner" if may_win(index) else "collapsed"
    if "winner" not in verdicts:
        found = ", ".join(f"{f.name}: {verdict}" for f, verdict in zip(finalists, verdicts, strict=True))
        raise InputError(f"no finalist can win ({found}). Use a wider base.dtype, or other prompts.")
    return Judgement(tuple(finalists), losses, per_expert, agreements, tuple(verdicts))


def _find_flaw(loss: float, finalist: Finalist, bounds: Bounds) -> Verdict | None:
    """Return what keeps a finalist from winning, whatever its place; None for nothing."""
    if not math.isfinite(loss):
        return "not finite"
    return None if bounds.hold(finalist.coefficients) else "outside bounds"
