"""Per-token disagreement between merge and expert, and how it becomes one loss.

Pure functions of log-probabilities, differentiable in the merge; know no models, prompts or adapters, nor
where a user's own objective comes from.
p_m and p_i are the next-token distributions of merge and expert at one position, H is entropy in nats.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from search.errors import InputError

ObjectiveFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(merged_logp, expert_logp, next_tokens) -> what each position costs; shapes as in `disagreement`."""
Objective = str | ObjectiveFunction
"""A key of OBJECTIVES, or a user's own function."""

LOG_FLOOR = -1e4
"""Log-probabilities are cut here: p * log p is 0 at p = 0, and an impossible token costs 10,000 nats."""
ENTROPY_OFFSET_NATS = 0.1
"""Keeps the relative gap finite where the expert is certain."""


def entropy(logp: Tensor) -> Tensor:
    """H(p) = -sum_v p(v) log p(v), for log-probabilities (..., n_vocab) -> (...)."""
    return -(logp.exp() * logp.clamp_min(LOG_FLOOR)).sum(-1)


def entropy_gap(merged_logp: Tensor, expert_logp: Tensor) -> Tensor:
    """|H(p_m) - H(p_i)|: how differently sure the two are, whatever they say."""
    return (entropy(merged_logp) - entropy(expert_logp)).abs()


def relative_entropy_gap(merged_logp: Tensor, expert_logp: Tensor) -> Tensor:
    """|H(p_m) - H(p_i)| / (H(p_i) + 0.1)."""
    expert_entropy = entropy(expert_logp)
    return (entropy(merged_logp) - expert_entropy).abs() / (expert_entropy + ENTROPY_OFFSET_NATS)


def entropy_excess(merged_logp: Tensor, expert_logp: Tensor) -> Tensor:
    """H((p_m + p_i) / 2) - H(p_m) / 2 - H(p_i) / 2: the entropy that mixing both outputs adds.

    This is the Jensen-Shannon divergence (Lin 1991, doi.org/10.1109/18.61115, eq. 4.1): symmetric, zero
    exactly where the two agree, at most ln 2.
    """
    mixed = (merged_logp.exp() + expert_logp.exp()) / 2
    log_mixed = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()
    mixed_entropy = -(mixed * log_mixed).sum(-1)
    return (mixed_entropy - (entropy(merged_logp) + entropy(expert_logp)) / 2).clamp_min(0)


def forward_kl(merged_logp: Tensor, expert_logp: Tensor) -> Tensor:
    """KL(p_i || p_m) = sum_v p_i(v) (log p_i(v) - log p_m(v))."""
    difference = expert_logp.clamp_min(LOG_FLOOR) - merged_logp.clamp_min(LOG_FLOOR)
    return (expert_logp.exp() * difference).sum(-1).clamp_min(0)


def reverse_kl(merged_logp: Tensor, expert_logp: Tensor) -> Tensor:
    """KL(p_m || p_i) = sum_v p_m(v) (log p_m(v) - log p_i(v))."""
    return forward_kl(expert_logp, merged_logp)


def top1_disagreement(merged_logp: Tensor, expert_logp: Tensor) -> Tensor:
    """1 where the most likely tokens differ, else 0; it has no gradient."""
    return (merged_logp.argmax(-1) != expert_logp.argmax(-1)).to(merged_logp.dtype)


def nll(merged_logp: Tensor, next_tokens: Tensor) -> Tensor:
    """-log p_m(next token of the expert's text)."""
    index = next_tokens.expand(merged_logp.shape[:-1]).unsqueeze(-1)
    return -merged_logp.gather(-1, index).squeeze(-1).clamp_min(LOG_FLOOR)


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "entropy_excess": lambda merged, expert, tokens: entropy_excess(merged, expert),
    "entropy_gap": lambda merged, expert, tokens: entropy_gap(merged, expert),
    "relative_entropy_gap": lambda merged, expert, tokens: relative_entropy_gap(merged, expert),
    "forward_kl": lambda merged, expert, tokens: forward_kl(merged, expert),
    "reverse_kl": lambda merged, expert, tokens: reverse_kl(merged, expert),
    "top1_disagreement": lambda merged, expert, tokens: top1_disagreement(merged, expert),
    "excess_and_top1": lambda merged, expert, tokens: (
        entropy_excess(merged, expert) + top1_disagreement(merged, expert)
    ),
    "entropy_minimisation": lambda merged, expert, tokens: entropy(merged),
    "nll": lambda merged, expert, tokens: nll(merged, tokens),
}
"""Name in the config -> function of (merged_logp, expert_logp, next_tokens)."""

SMOOTH_PARTS = {"excess_and_top1": "entropy_excess"}
"""Objective with a part that is flat nearly everywhere -> the objective that is its other part."""


def smooth_part(objective: Objective) -> Objective:
    """Return what has an objective's gradient: the objective itself, but for those with a flat part."""
    return SMOOTH_PARTS.get(objective, objective) if isinstance(objective, str) else objective


def disagreement(
    objective: Objective, merged_logp: Tensor, expert_logp: Tensor, next_tokens: Tensor
) -> Tensor:
    """Return what an objective measures at each position; smaller is better.

    Args:
        objective: a key of OBJECTIVES, or a user's own function.
        merged_logp: (..., n_positions, n_vocab) log-probabilities of the merge.
        expert_logp: (n_positions, n_vocab) those of the expert whose prompt it is.
        next_tokens: (n_positions,) the token that the expert's text goes on with.

    Returns:
        (..., n_positions).

    Raises:
        ValueError: on an unknown name.
        InputError: if a user's function returns anything but one float a position.
    """
    if not isinstance(objective, str):
        values = objective(merged_logp, expert_logp, next_tokens)
        _check_user_values(objective, values, merged_logp.shape[:-1])
        return values
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective](merged_logp, expert_logp, next_tokens)


def objective_label(objective: Objective) -> str:
    """Return the name of an objective as the config has it."""
    if isinstance(objective, str):
        return objective
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}:{named.__qualname__}"


def _check_user_values(function: ObjectiveFunction, values: object, expected: torch.Size) -> None:
    if isinstance(values, Tensor) and values.shape == expected and values.is_floating_point():
        return
    found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise InputError(
        f"objective.name: {objective_label(function)} returned {found}, expected a floating-point tensor of "
        f"shape (n_positions,) = {tuple(expected)}; return one value a position, not summed or averaged"
    )


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum values (..., n) that share an index (n,) int64 below `size` -> (..., size), differentiably.

    On a CPU, where sums are taken in order: scattered sums on a GPU are not reproducible.
    """
    zeros = torch.zeros(*values.shape[:-1], size, dtype=values.dtype)
    return zeros.index_add(-1, index.cpu(), values.cpu())


def normalise(per_expert: Tensor, base_per_expert: Tensor, floor: float) -> Tensor:
    """per_expert (..., n_experts) / max(base_per_expert, floor): 1 is as far as the base, 0 full agreement.

    The floor keeps an expert that the base already agrees with from ruling the loss.
    """
    return per_expert / base_per_expert.clamp_min(floor)


def _mean_sqrt(per_expert: Tensor) -> Tensor:
    """mean_i sqrt(x_i): the last stretch towards any one expert counts more than the first.

    The root's slope is infinite at 0, where that of x_i, a minimum, is 0: their product would be NaN. Where
    x_i is below rounding, the merge is the expert, and the slope counts as 0: one of the subgradients that
    the loss has in such a corner, and the one that says to stay.
    """
    rounding = torch.finfo(per_expert.dtype).eps
    roots = per_expert.clamp_min(rounding).sqrt()
    flat = per_expert.detach().clamp_min(0).sqrt()
    return torch.where(per_expert > rounding, roots, flat).mean(-1)


def _worst_quarter(per_expert: Tensor) -> Tensor:
    """Mean of the largest quarter of x_i, rounded up."""
    return per_expert.topk(math.ceil(per_expert.shape[-1] / 4), dim=-1).values.mean(-1)


COMBINATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda per_expert: per_expert.mean(-1),
    "mean_sqrt": _mean_sqrt,
    "worst": _worst_quarter,
}
"""Name in the config -> function of per-expert values."""


def combine_experts(per_expert: Tensor, how: str) -> Tensor:
    """Combine values (..., n_experts) into losses (...), by a key of COMBINATIONS."""
    if how not in COMBINATIONS:
        raise ValueError(f"unknown combination {how!r}; known: {', '.join(COMBINATIONS)}")
    return COMBINATIONS[how](per_expert)
