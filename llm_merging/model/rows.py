"""Run a decoder model on rows of unequal length: padding, masks and explicit positions.

Knows token ids and one batch that fits in memory; not what the rows are for. Prompts are padded on the left
and what follows them on the right, so that a row's result does not depend on the rows beside it.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def forward(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any = None, *, last_only: bool = True) -> Any:
    """Run the model on `ids` (n_rows, n_new) that follow the cache; mask (n_rows, all tokens so far)."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "position_ids" in accepted:
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if last_only and "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (n_rows, longest row)."""
    ids, mask = pad_right([row[::-1] for row in rows], pad, device)
    return ids.flip(1), mask.flip(1)


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (n_rows, longest row)."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device
