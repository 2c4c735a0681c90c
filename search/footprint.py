"""What a run of full size takes of a device's memory, phase by phase, and in what batches it works.

Knows a trial on few prompts and how each part grows; not how it is shown, nor what to advise.
"""

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from search.diagnosis import BatchFacts, MemoryFacts, MemoryPlan, PromptFacts
from search.experts import TokenBudget
from search.memory import (
    ANSWER_TOKENS_ELSEWHERE,
    MOST_TOKENS,
    MOST_WRITTEN_TOKENS,
    choosing_cost,
    largest_fit,
    pick_tokens,
    read_memory,
    sampling_cost,
    shape_of,
    usable_bytes,
    writing_cost,
)
from search.sampling import MAX_CACHED_TOKENS
from search.setup import Setup
from search.trial import Trial


def foresee_memory(setup: Setup, trial: Trial, prompts: PromptFacts) -> MemoryFacts:
    """Add up what a run takes: what was measured on few prompts, scaled to all of them."""
    parts = setup.parts
    events = trial.steering.budget.oom_events
    written = trial.prompts.searched, trial.prompts.unseen
    n_scored = sum(len(positions) for part in written for positions in part.scored)
    each = parts.model.config.get_text_config().vocab_size * parts.model.dtype.itemsize
    grown = max(0.0, prompts.growth - 1) * n_scored * each
    return MemoryFacts(
        peak_bytes=trial.peak_bytes,
        expected_bytes=trial.peak_bytes + round(grown),
        available_bytes=_process_limit(parts.model.device),
        tokens_per_forward=events[-1]["tokens_per_forward"] if events else None,
        plan=_plan(setup, trial, prompts, round(prompts.growth * n_scored * each)),
    )


def _process_limit(device: torch.device) -> int:
    """Bytes: on a GPU what others leave and this process may hold, else what the machine has."""
    reading = read_memory(device)
    return reading.limit if reading else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _plan(setup: Setup, trial: Trial, prompts: PromptFacts, signals_bytes: int) -> MemoryPlan:
    """Choose batches as the run will: by the memory on a CUDA device, else the same ones always."""
    model, stacked = setup.parts.model, setup.parts.stacked
    shape, on_cuda = shape_of(model), model.device.type == "cuda"
    usable, base_bytes = usable_bytes(_process_limit(model.device)), _bytes_of(model.parameters())
    adapters_bytes = _bytes_of(t for module in stacked.modules.values() for t in (module.A, module.B))
    asked, steering = setup.config.search.tokens_per_forward, trial.steering
    one_prompt = round(prompts.tokens_per_prompt)
    n_candidates = setup.config.search.n_candidates

    layers = [model.get_submodule(name) for name in stacked.modules]
    folded_bytes = 0 if on_cuda else _bytes_of(layer.weight for layer in layers)  # of one candidate

    def pass_batch(budget: TokenBudget, estimate: int, n_tokens: float, beside: int = 0) -> BatchFacts:
        each = budget.bytes_per_token or estimate
        tokens = budget.tokens_per_forward
        if on_cuda and asked is None:
            tokens = pick_tokens(usable - base_bytes - adapters_bytes - signals_bytes, each)
        return BatchFacts(tokens, beside + round(max(one_prompt, min(tokens, n_tokens)) * each))

    def batch(cost: Callable[..., int], most: int, beside: int, elsewhere: int) -> BatchFacts:
        tokens = largest_fit(usable - beside, lambda n: cost(shape, n), most) if on_cuda else elsewhere
        return BatchFacts(tokens, cost(shape, tokens))

    n_tokens, estimate = prompts.tokens_per_candidate, shape.forward + shape.logits(1)
    has_gradient = trial.gradient_s is not None
    graph_budget = steering.searched.graph_budget
    return MemoryPlan(
        is_measured=steering.budget.bytes_per_token is not None,
        usable_bytes=usable,
        base_bytes=base_bytes,
        adapters_bytes=adapters_bytes,
        signals_bytes=signals_bytes,
        scoring=pass_batch(steering.budget, estimate, n_candidates * n_tokens, folded_bytes),
        gradient=pass_batch(graph_budget, shape.graph, n_tokens) if has_gradient else None,
        prompts=batch(sampling_cost, MAX_CACHED_TOKENS, base_bytes + adapters_bytes, MAX_CACHED_TOKENS),
        answers=batch(writing_cost, MOST_WRITTEN_TOKENS, base_bytes, ANSWER_TOKENS_ELSEWHERE),
        choices=batch(choosing_cost, MOST_TOKENS, base_bytes, ANSWER_TOKENS_ELSEWHERE),
        tokens_asked=asked,
    )


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
