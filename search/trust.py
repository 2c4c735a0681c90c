"""How far each adapter's coefficient may go from the balanced merge's: as far as its prompts can be trusted.

Knows numbers that tell how much an adapter's prompts say of its task; not models, prompts or candidates.
No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.finalists import Bounds
from search.space import FloatArray

SURE = 0.1
"""Doubt up to which coefficients are free."""
UNOWNED = 0.05
"""Another expert nearer than this to an expert, on that one's prompts, answers them as well."""
HELD = 0.9
"""Where nothing is known a coefficient stays within this factor and its inverse of the balanced merge's."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What each adapter's prompts say of its task."""

    names: Sequence[str]
    """(n_adapters,)."""
    peak_kl: FloatArray
    """(n_adapters,) largest KL(expert || base) at a position, mean over prompts, in nats."""
    entropy_ratio: FloatArray
    """(n_adapters,) the expert's mean entropy over the base's: an expert on its own task is sure."""
    from_skeleton: NDArray[np.bool_]
    """(n_adapters,) whether any prompt is from a skeleton; free text need not look like the task."""
    rivals: FloatArray
    """(n_adapters, n_adapters) disagreement of expert j (row) on prompts of i (column), over the base's.
    Near 0, j answers them as i does, and i's coefficient can fall to 0 without a loss."""


@dataclass(frozen=True, slots=True, eq=False)
class Trust:
    """What follows from the evidence."""

    reasons: tuple[str, ...]
    """(n_adapters,) why there is doubt; empty where there is none."""
    bounds: Bounds


def weigh(evidence: Evidence, weak_signal_nats: float, balanced: FloatArray) -> Trust:
    """Bound the coefficients of adapters whose prompts leave doubt, around the balanced merge's.

    The doubt goes from 0, the prompts are the adapter's own, to 1, nothing is known. It is the entropy ratio,
    and 1 where the prompts are free text, where expert and base nowhere differ, or where another expert alone
    answers them as well. The mean doubt is the least that counts: what one adapter takes from another goes
    unseen where nothing is known of that one. Up to SURE a coefficient is free; with doubt d it stays within
    the factors min(2 d, HELD) and its inverse of the balanced merge's. The rule is ours; benchmarks.studies,
    which prompts, shows what it does.

    Args:
        weak_signal_nats: peak KL below which expert and base do not differ; 0 trusts all prompts.
        balanced: (n_adapters,) coefficients of the balanced merge, positive.
    """
    n_adapters = len(evidence.names)
    if weak_signal_nats == 0:
        return Trust(("",) * n_adapters, bound(np.zeros(n_adapters), balanced))
    reasons = [_find_reason(evidence, index, weak_signal_nats) for index in range(n_adapters)]
    known = np.array([not reason for reason in reasons])
    doubt = np.where(known, np.clip(evidence.entropy_ratio, 0, 1), 1.0)
    for index in np.flatnonzero(known & ~(doubt <= SURE)).tolist():
        reasons[index] = f"{doubt[index]:.2g} of the base's entropy"
    return Trust(tuple(reasons), bound(np.maximum(doubt, doubt.mean()), balanced))


def bound(doubt: FloatArray, balanced: FloatArray) -> Bounds:
    """Return where coefficients may lie, for doubt (n_adapters,) and the balanced merge's (n_adapters,)."""
    free, low = doubt <= SURE, np.clip(2 * doubt, 1e-9, HELD)
    return Bounds(np.where(free, -np.inf, low * balanced), np.where(free, np.inf, balanced / low))


def _find_reason(evidence: Evidence, index: int, weak_signal_nats: float) -> str:
    """Say why nothing is known of an adapter; empty where something is."""
    peak_kl, ratio = evidence.peak_kl[index], evidence.entropy_ratio[index]
    if not evidence.from_skeleton[index]:
        return "free text"
    if not peak_kl >= weak_signal_nats:  # NaN too
        return f"{peak_kl:.3f} nats from the base at most"
    if np.isnan(ratio):
        return "no finite entropy"
    others = evidence.rivals[:, index].copy()
    others[index] = np.inf
    nearest = int(np.nanargmin(others))
    return f"{evidence.names[nearest]} alone answers them as well" if others[nearest] < UNOWNED else ""
