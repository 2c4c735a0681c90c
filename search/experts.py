"""What the experts say on the prompts they answered, and how far that is from what the base says.

Knows models, prompts and the memory that a forward pass needs; not candidates or losses.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from search.groups import Groups
from search.memory import (
    MEASURED_TOKENS,
    densest_rows,
    fits_in_memory,
    measure_peak,
    tokens_that_fit,
)
from search.objective import disagreement, entropy, sum_by_index
from search.population import population, send
from search.prompts import PromptSet
from search.sampling import takes_logits_to_keep
from search.stack import StackedFactors, at_least_float32

AT_ONCE = {"cpu": 2**17, "cuda": 2**25}
"""Probabilities that are looked at together: a CPU's are to fit its cache, a GPU's to keep it busy."""


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
    """(n_experts,) nats: largest KL(expert || base) in a prompt, mean over prompts.

    At scored positions. What there is to steer by: over positions a mean is diluted by an answer whose first
    token decides.
    """
    entropy_ratio: NDArray[np.float64]
    """(n_experts,) the expert's mean entropy over the base's. At scored positions: far below 1 where an
    expert is at home, about 1 where it knows no better than the base."""

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
    """{"tokens", "tokens_per_forward"} each: what did not fit, the budget from then on."""
    by_memory: bool = False
    """Nobody asked for this number: `plan` may choose another."""
    bytes_per_token: float | None = None
    """Measured, above what is kept anyway; None where nobody measured."""

    def plan(
        self,
        device: torch.device,
        lengths: Sequence[int],
        n_scored: Sequence[int],
        step: Callable[[list[int]], None],
        kept_bytes: int = 0,
    ) -> None:
        """Choose by the free memory of a CUDA device and what one small step takes of it, once.

        What is looked at in parts of fixed size counts as if it grew with the step: an upper bound.

        Args:
            lengths: (n_rows,) tokens.
            n_scored: (n_rows,) positions that logits are computed at.
            kept_bytes: that are to be left for what is computed.
        """
        if not self.by_memory or self.bytes_per_token is not None or device.type != "cuda":
            return
        rows = densest_rows(lengths, n_scored, MEASURED_TOKENS)
        try:
            peak_bytes = measure_peak(device, lambda: step(rows))
        except torch.cuda.OutOfMemoryError:  # some rows did not fit: one is tried when its turn comes
            self.tokens_per_forward, self.by_memory = 1, False
            return
        self.bytes_per_token = peak_bytes / sum(lengths[row] for row in rows)
        self.tokens_per_forward = tokens_that_fit(device, self.bytes_per_token, kept_bytes)

    def run(self, lengths: Sequence[int], step: Callable[[list[int]], None]) -> None:
        """Call `step` on lists of rows that cover all rows, the longest first, each list within the budget.

        Raises:
            torch.OutOfMemoryError: if one row alone does not fit.
        """
        left = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        while left:
            longest = lengths[left[0]]
            rows = left[: max(1, self.tokens_per_forward // longest)]
            if fits_in_memory(step, rows):
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
    inputs = {"input_ids": send(ids, model.device), "use_cache": False}
    if takes_logits_to_keep(model):
        inputs["logits_to_keep"] = send(columns, model.device)
    else:
        column_of = positions
    places = send(row_of, model.device), send(column_of, model.device)
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
    places_of = torch.split(torch.arange(sum(n_scored)), n_scored)
    kept = torch.empty(0)  # (all scored positions, n_vocab), filled in place
    facts_of: dict[int, Tensor] = {}  # prompt -> largest KL, sums of the expert's and of the base's entropies

    def step(rows: list[int]) -> None:
        nonlocal kept
        with population(model, stacked, one_hot[rows], groups):
            logits = scored_logits(model, prompts, rows)
        base = scored_logits(model, prompts, rows)
        if not len(kept):
            kept = logits.new_empty(sum(n_scored), logits.shape[-1])
        places = send(torch.cat([places_of[row] for row in rows]), logits.device)
        tokens = torch.cat([next_tokens[row] for row in rows])
        parts = []
        for own, theirs, token, at in _split_positions(logits, base, tokens, places):
            expert_logp, base_logp = log_softmax(own), log_softmax(theirs)
            kept.index_copy_(0, at, expert_logp if expert_logp.dtype == own.dtype else own)
            kl = disagreement("forward_kl", base_logp, expert_logp, token)
            parts.append(torch.stack([kl, entropy(expert_logp), entropy(base_logp)]))
        measured = torch.cat(parts, dim=1)
        for row, own in zip(rows, torch.split(measured, [n_scored[row] for row in rows], dim=1), strict=True):
            facts_of[row] = torch.stack([own[0].max(), own[1].sum(), own[2].sum()]).double()

    budget = budget or TokenBudget(default_token_budget(model.device))
    budget.run([len(ids) for ids in prompts.ids], step)
    facts = torch.stack([facts_of[row] for row in range(prompts.n_prompts)])  # (n_prompts, 3)
    sums = sum_by_index(facts.T, torch.from_numpy(prompts.expert), prompts.n_experts).numpy()
    n_prompts = np.bincount(prompts.expert, minlength=prompts.n_experts)
    with np.errstate(divide="ignore", invalid="ignore"):  # no prompts, or a base without any doubt
        peak_kl, entropy_ratio = sums[0] / n_prompts, sums[1] / sums[2]
    return ExpertSignals(kept, torch.cat(next_tokens), peak_kl, entropy_ratio)


def _split_positions(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Give scored positions (n, ...) some at a time on a GPU, which float32 copies of all would fill."""
    logits = tensors[0]
    n_positions = max(1, AT_ONCE["cuda"] // logits.shape[-1]) if logits.is_cuda else max(1, len(logits))
    return zip(*(torch.split(tensor, n_positions) for tensor in tensors), strict=True)


def plan_budget(
    model: Any, stacked: StackedFactors, groups: Groups, prompts: PromptSet, budget: TokenBudget, n_kept: int
) -> None:
    """Let a budget follow from the memory that asking the experts takes; scoring candidates takes no more.

    Args:
        n_kept: scored positions, of all prompts, whose logits are to be kept.
    """

    def ask(rows: list[int]) -> None:
        at_once = TokenBudget(len(rows) * max(lengths))
        expert_signals(model, stacked, groups, prompts.select(rows), at_once)

    lengths, n_scored = [len(ids) for ids in prompts.ids], [len(scored) for scored in prompts.scored]
    kept_bytes = n_kept * model.config.get_text_config().vocab_size * model.dtype.itemsize
    budget.plan(model.device, lengths, n_scored, ask, kept_bytes)
