"""What the experts say on the prompts they answered, and how far that is from what the base says.

Knows models, prompts and the memory that a forward pass needs; not candidates or losses.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from search.groups import Groups
from search.objective import disagreement, entropy, sum_by_index
from search.population import population, send
from search.prompts import PromptSet
from search.stack import StackedFactors, at_least_float32


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSignals:
    """The target at every scored position, prompt after prompt; tensors on the model's device."""

    logits: Tensor
    """(n_scored, n_vocab) what the expert says of the next token, exactly, in the model's type.

    In float32 or wider its log-probabilities, which are logits too; below that its logits as they came.
    """
    next_tokens: Tensor
    """(n_scored,) the token that the prompt goes on with."""
    peak_kl: NDArray[np.float64]
    """(n_experts,) largest KL(expert || base) at a scored position of a prompt, mean over prompts, in nats.

    What there is to steer by: over positions a mean is diluted by an answer whose first token decides.
    """
    entropy_ratio: NDArray[np.float64]
    """(n_experts,) the expert's mean entropy over the base's, at scored positions: far below 1 where
    an expert is at home, about 1 where it knows no better than the base."""

    def logp(self, at: Tensor) -> Tensor:
        """Return the expert's log-probabilities (n, n_vocab) at positions `at`, in float32 at least."""
        return widened_logp(self.logits[at])


@dataclass(slots=True)
class TokenBudget:
    """How many tokens, padding included, go into one forward pass; halved whenever memory runs out.

    Passed to all that fill the same device, so that what fits is learnt once.
    """

    tokens_per_forward: int
    oom_events: list[dict[str, int]] = field(default_factory=list)
    """One {"tokens", "tokens_per_forward"} for each time: what did not fit, the budget from then on."""

    def run(self, lengths: Sequence[int], step: Callable[[list[int]], None]) -> None:
        """Call `step` on lists of rows that cover all rows, the longest first, each list within the budget.

        Raises:
            torch.OutOfMemoryError: if one row alone does not fit.
        """
        left = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        while left:
            longest = lengths[left[0]]
            rows = left[: max(1, self.tokens_per_forward // longest)]
            if _fits_in_memory(step, rows):
                left = left[len(rows) :]
            else:
                self._halve(len(rows) * longest)

    def _halve(self, n_tokens: int) -> None:
        torch.cuda.empty_cache()
        self.tokens_per_forward = n_tokens // 2
        self.oom_events.append({"tokens": n_tokens, "tokens_per_forward": self.tokens_per_forward})
        logging.getLogger(__name__).warning(
            "out of memory at %d tokens; going on with %d", n_tokens, self.tokens_per_forward
        )


def _fits_in_memory(step: Callable[[list[int]], None], rows: list[int]) -> bool:
    try:
        step(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
        return False  # outside the except block the failed step's tensors are free
    return True


def default_token_budget(device: torch.device) -> int:
    """Tokens that keep a device busy without taking much memory."""
    return 8192 if device.type == "cuda" else 1024


def scored_logits(
    model: Any,
    prompts: PromptSet,
    rows: Sequence[int],
    weights: dict[str, Tensor] | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Logits (n_scored, n_vocab) at the scored positions of the prompts `rows`, row after row.

    Rows are padded on the right, which nothing before can see. Only scored positions pass through the output
    layer, unless that is adapted itself: then all columns that some row scores do.

    Args:
        weights: parameters, by name, to use in place of the model's own.
        shape: (n_rows, n_tokens) to pad to; as little as can be when None.
    """
    n_rows, n_tokens = shape or (len(rows), max(len(prompts.ids[row]) for row in rows))
    ids = torch.zeros(n_rows, n_tokens, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(prompts.ids[row])] = torch.tensor(prompts.ids[row])
    positions = torch.tensor([position for row in rows for position in prompts.scored[row]])
    columns, column_of = torch.unique(positions, return_inverse=True)
    row_of = torch.repeat_interleave(torch.tensor([len(prompts.scored[row]) for row in rows]))
    places = send(row_of, model.device), send(column_of, model.device)
    inputs = {
        "input_ids": send(ids, model.device),
        "logits_to_keep": send(columns, model.device),
        "use_cache": False,
    }
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return _logits_of(model, inputs, weights)[places]
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][places][None],))
    try:
        return _logits_of(model, inputs, weights)[0]
    finally:
        hook.remove()


def _logits_of(model: Any, inputs: dict[str, Any], weights: dict[str, Tensor] | None) -> Tensor:
    if weights is None:
        logits: Tensor = model(**inputs).logits
    else:
        logits = functional_call(model, weights, (), inputs, tie_weights=False).logits
    return logits


def scored_logp(
    model: Any, prompts: PromptSet, rows: Sequence[int], weights: dict[str, Tensor] | None = None
) -> Tensor:
    """Log-probabilities (n_scored, n_vocab) of `scored_logits`; softmax in float32 at least."""
    return log_softmax(scored_logits(model, prompts, rows, weights))


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of a model's logits, in float32 at least."""
    return torch.log_softmax(logits.to(at_least_float32(logits.dtype)), -1)


def widened_logp(logits: Tensor) -> Tensor:
    """Log-probabilities (n, n_vocab), in float32 at least, of ExpertSignals.logits."""
    is_wide = logits.dtype == at_least_float32(logits.dtype)
    return logits if is_wide else log_softmax(logits)  # as a merge's: equal logits differ by nothing at all


@torch.no_grad()
def expert_signals(
    model: Any,
    stacked: StackedFactors,
    groups: Groups,
    prompts: PromptSet,
    budget: TokenBudget | None = None,
) -> ExpertSignals:
    """Score every prompt under its own expert, and under the base to compare.

    Args:
        budget: where to learn, and to leave, what fits into memory.
    """
    one_hot = torch.zeros(prompts.n_prompts, len(groups.names), stacked.n_adapters)
    one_hot[range(prompts.n_prompts), :, prompts.expert] = 1
    next_tokens = [
        torch.tensor([ids[t + 1] for t in scored]).to(model.device)
        for ids, scored in zip(prompts.ids, prompts.scored, strict=True)
    ]
    n_scored = [len(scored) for scored in prompts.scored]
    logits_of: dict[int, Tensor] = {}
    facts_of: dict[int, Tensor] = {}  # prompt -> largest KL, sums of the expert's and of the base's entropies

    def step(rows: list[int]) -> None:
        with population(model, stacked, one_hot[rows], groups):
            logits = scored_logits(model, prompts, rows)
        expert_logp, base_logp = log_softmax(logits), scored_logp(model, prompts, rows)
        exact = expert_logp if expert_logp.dtype == logits.dtype else logits
        tokens = torch.cat([next_tokens[row] for row in rows])
        kl = disagreement("forward_kl", base_logp, expert_logp, tokens)
        counts = [n_scored[row] for row in rows]
        logits_of.update(zip(rows, torch.split(exact, counts), strict=True))
        measured = torch.stack([kl, entropy(expert_logp), entropy(base_logp)])
        for row, own in zip(rows, torch.split(measured, counts, dim=1), strict=True):
            facts_of[row] = torch.stack([own[0].max(), own[1].sum(), own[2].sum()]).double()

    budget = budget or TokenBudget(default_token_budget(model.device))
    budget.run([len(ids) for ids in prompts.ids], step)
    facts = torch.stack([facts_of[row] for row in range(prompts.n_prompts)])  # (n_prompts, 3)
    sums = sum_by_index(facts.T, torch.from_numpy(prompts.expert), prompts.n_experts).numpy()
    n_prompts = np.bincount(prompts.expert, minlength=prompts.n_experts)
    with np.errstate(divide="ignore", invalid="ignore"):  # a base without any doubt: NaN, or infinite
        entropy_ratio = sums[1] / sums[2]
    logits = torch.cat([logits_of[row] for row in range(prompts.n_prompts)])
    return ExpertSignals(logits, torch.cat(next_tokens), sums[0] / n_prompts, entropy_ratio)
