"""Descend along gradients from a given point, and keep the best point visited.

Pure numpy: knows a function with a gradient and a box; not models, prompts, adapters or the clock.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from search.space import FloatArray

_DECAY_MEAN, _DECAY_SQUARE, _OFFSET = 0.9, 0.999, 1e-8  # beta_1, beta_2, epsilon: the paper's own


@dataclass(frozen=True, slots=True, eq=False)
class Descent:
    """Where a descent has been."""

    best: FloatArray
    """The visited point with the lowest loss, in the shape of the start; the start if no loss was finite."""
    best_loss: float
    """Its loss, NaN if no loss was finite."""
    losses: FloatArray
    """(n_visited,) of all points, the start first; all finite, fewer than asked for if it broke off."""


def adam_descend(  # noqa: PLR0913 (a function, a point, a pace and a box)
    gradient_of: Callable[[FloatArray], tuple[float, FloatArray]],
    start: FloatArray,
    *,
    steps: int,
    learning_rate: float,
    low: ArrayLike,
    high: ArrayLike,
    go_on: Callable[[], bool] = lambda: True,
) -> Descent:
    """Visit `steps` points, the start among them, by Adam; each is clipped to the box.

    Kingma & Ba 2015 (arxiv.org/abs/1412.6980), algorithm 1; the letters are the paper's. A loss or a gradient
    that is not finite ends the descent with what it has.

    Args:
        gradient_of: point -> its loss and gradient, in the point's shape.
        learning_rate: about how far a coefficient moves in one step.
        low: bounds that broadcast to the start, -inf where free.
        high: as `low`, inf where free.
        go_on: asked before each point but the first; False ends the descent with what it has.

    Raises:
        ValueError: on fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    theta = np.clip(np.asarray(start, dtype=np.float64), low, high)
    best, best_loss = theta, float("nan")
    losses: list[float] = []
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, steps + 1):
        if t > 1 and not go_on():
            break
        loss, g = gradient_of(theta.copy())
        if not np.isfinite(loss):
            break
        losses.append(loss)
        if not best_loss <= loss:  # NaN too
            best, best_loss = theta, loss
        if not np.isfinite(g).all():
            break
        m = _DECAY_MEAN * m + (1 - _DECAY_MEAN) * g  # first moment
        v = _DECAY_SQUARE * v + (1 - _DECAY_SQUARE) * g**2  # second raw moment
        m_hat, v_hat = m / (1 - _DECAY_MEAN**t), v / (1 - _DECAY_SQUARE**t)  # section 3, eq. 4
        theta = np.clip(theta - learning_rate * m_hat / (np.sqrt(v_hat) + _OFFSET), low, high)
    return Descent(best, best_loss, np.array(losses, dtype=np.float64))
