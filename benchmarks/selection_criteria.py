"""Which questions should an expert keep, when nobody has said what it is for?

Each criterion looks at what models say, never at a label or a task. Knows arrays; not models or text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.space import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """What is known of every expert's answers to a pool of questions; all arrays (n_experts, n_questions)."""

    usable: NDArray[np.bool_]
    """Whether the answer is neither blank nor a loop."""
    divergence: FloatArray
    """Largest KL(expert || base) at a position of the answer, in nats."""
    entropy_ratio: FloatArray
    """The expert's entropy over the base's, means over the answer: low where only the expert is sure."""
    nearest: FloatArray
    """Smallest disagreement of another expert with the answer, over the base's: low where it is shared."""


Criterion = Callable[[Signals], FloatArray]
"""What an expert keeps has the largest values: (n_experts, n_questions)."""


def rank(values: FloatArray) -> FloatArray:
    """Return each value's rank among its expert's questions, 0 to 1; of equal values the first is lower."""
    order = np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")
    return order / max(1, values.shape[1] - 1)


def _any(signals: Signals) -> FloatArray:
    return np.random.default_rng(0).random(signals.divergence.shape)


def _among_divergent(signals: Signals, values: FloatArray) -> FloatArray:
    """Put an expert's questions on which it diverges more than on its median one before all others."""
    middle = np.median(signals.divergence, axis=1, keepdims=True)
    return rank(values) + (signals.divergence >= middle)


def _certain(signals: Signals) -> FloatArray:
    return _among_divergent(signals, -signals.entropy_ratio)


def _owned(signals: Signals) -> FloatArray:
    return signals.nearest


def _certain_and_owned(signals: Signals) -> FloatArray:
    worse = np.minimum(rank(-signals.entropy_ratio), rank(signals.nearest))
    return _among_divergent(signals, worse)


def _shared(signals: Signals) -> FloatArray:
    return _among_divergent(signals, -signals.nearest)


CRITERIA: Mapping[str, Criterion] = {
    "any": _any,
    "divergence": lambda signals: signals.divergence,
    "certain": _certain,
    "owned": _owned,
    "certain and owned": _certain_and_owned,
    "shared": _shared,
}
"""Name -> what it prefers; `shared` is agreement among experts, the opposite of `owned`."""


def choose(signals: Signals, criterion: Criterion, n: int) -> NDArray[np.int64]:
    """Return the `n` questions (n_experts, n) that each expert keeps, best first, unusable ones last."""
    return np.lexsort((-criterion(signals), ~signals.usable), axis=1)[:, :n]
