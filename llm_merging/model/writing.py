"""Write greedily for a batch of prompts: on CUDA over a cache of fixed size, a recorded graph for each token.

Knows token ids and one batch that fits in memory; not texts, nor how prompts are grouped. At a few dozen rows
a token costs a 7B model less time on the card than Python needs to launch its kernels; a CUDA graph launches
them at once, and needs tensors that stay where they are. Elsewhere the cache grows with every token.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from llm_merging.model.rows import device_of, forward, pad_left
from search.memory import PREFILL_TOKENS

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
"""Steps before a graph is recorded: kernels and libraries load at their first call, which no graph holds."""
CHECK_EVERY = 8
"""Steps between two looks at whether all rows have ended, each of which waits for the device."""
ALIGNMENT = 16
"""Columns of the cache come in multiples of it: attention kernels want their masks aligned."""
NOT_WRITTEN = -1


def write_greedily(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new: int, stop_ids: frozenset[int], *, pad: int
) -> list[list[int]]:
    """Return each prompt's greedy continuation of at most `max_new` tokens, without its end token."""
    reason = why_growing(model, max(map(len, prompts)) + max_new)
    if reason:
        _tell_once(f"answers are written without CUDA graphs: {reason}")
    write = write_growing if reason else write_static
    return write(model, prompts, max_new, stop_ids, pad=pad)


def why_growing(model: nn.Module, n_tokens: int) -> str | None:
    """Say why rows of `n_tokens` cannot be written over a cache of fixed size, None if they can."""
    if device_of(model).type != "cuda":
        return "the model is not on a CUDA device"
    if not getattr(
        model, "_can_compile_fullgraph", False
    ):  # transformers' word for "no data-dependent steps"
        return f"{type(model).__name__} does not allow them"
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return (
        f"rows are longer than the attention's window of {window}"
        if n_tokens > (window or n_tokens)
        else None
    )


@torch.inference_mode()
def write_growing(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new: int, stop_ids: frozenset[int], *, pad: int
) -> list[list[int]]:
    """`write_greedily` with a cache that grows; rows that have ended leave the batch."""
    written: list[list[int]] = [[] for _ in prompts]
    writing = list(range(len(prompts)))  # the prompt that each row of the batch continues
    ids, mask = pad_left(prompts, pad, device_of(model))
    past = None
    for _ in range(max_new):
        output = forward(model, ids, mask, past)
        past = output.past_key_values
        tokens = output.logits[:, -1].argmax(dim=-1)
        going = [row for row, token in enumerate(tokens.tolist()) if token not in stop_ids]
        for row in going:
            written[writing[row]].append(int(tokens[row]))
        if not going:
            break
        if len(going) < len(writing):
            kept = torch.tensor(going, device=ids.device)
            writing, tokens, mask = [writing[row] for row in going], tokens[kept], mask[kept]
            past.batch_select_indices(kept)
        ids, mask = tokens[:, None], functional.pad(mask, (0, 1), value=1)
    return written


@torch.inference_mode()
def write_static(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new: int, stop_ids: frozenset[int], *, pad: int
) -> list[list[int]]:
    """`write_greedily` (max_new >= 1) over a cache of fixed size; on CUDA a graph of one step is replayed."""
    order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))  # neighbours waste little padding
    rows = _read_prompts(model, [prompts[p] for p in order], max_new, pad)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=rows.ids.device)
    advance = rows.step
    for n_written in range(1, max_new):
        if n_written % CHECK_EVERY == 0 and stop_ids and _all_ended(rows.written, stops):
            break
        if n_written == 1 + WARM_UP_STEPS and rows.ids.is_cuda:
            advance = _record(rows.step)
        advance()
    written: list[list[int]] = [[] for _ in prompts]
    for place, tokens in zip(order, rows.written.tolist(), strict=True):
        written[place] = list(takewhile(lambda token: token not in stop_ids, tokens))
    return written


class FixedCache(Cache):
    """Keys and values of fixed size and place; a step writes one column, the same in every layer.

    Args:
        shapes_of: the cache of a first forward, from which the number of layers and all shapes are taken.
        column: (1,) int64, the column that the next step fills; the owner moves it on.
    """

    def __init__(self, shapes_of: Cache, n_rows: int, n_columns: int, column: Tensor) -> None:
        super().__init__(layers=[])
        self.column = column

        def make(like: Tensor) -> Tensor:  # zeros: what is masked still is multiplied, and by 0
            return like.new_zeros(n_rows, like.shape[1], n_columns, like.shape[3])

        self.keys_and_values = [(make(layer.keys), make(layer.values)) for layer in shapes_of.layers]

    def fill(self, first_row: int, past: Cache) -> None:
        """Copy another cache into the first columns of as many rows as it has."""
        for own, layer in zip(self.keys_and_values, past.layers, strict=True):
            for mine, theirs in zip(own, (layer.keys, layer.values), strict=True):
                mine[first_row : first_row + theirs.shape[0], :, : theirs.shape[2]] = theirs

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values (n_rows, n_heads, 1, d_head) and return all of the layer."""
        keys, values = self.keys_and_values[layer_idx]
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values


@dataclass(frozen=True, slots=True)
class StaticRows:
    """What one step reads and writes, all in place: a recorded step finds it where it was.

    mask is added to attention scores (n_rows, 1, 1, n_columns); ids and positions are (n_rows, 1); written is
    (n_rows, max_new), `NOT_WRITTEN` where nothing is yet; n_written is (1,).
    """

    model: nn.Module
    past: FixedCache
    mask: Tensor
    ids: Tensor
    positions: Tensor
    written: Tensor
    n_written: Tensor

    def step(self) -> None:
        """Read each row's last token and write the next one; nothing here waits for the device."""
        self.mask.index_fill_(3, self.past.column, 0)
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.past,
            use_cache=True,
        )
        self.ids.copy_(output.logits[:, -1].argmax(dim=-1, keepdim=True))
        self.written.index_copy_(1, self.n_written, self.ids)
        for counter in (self.past.column, self.positions, self.n_written):
            counter.add_(1)


def _read_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], max_new: int, pad: int) -> StaticRows:
    """Read prompts, longest first, some rows at a time, and write each one's first token."""
    device, dtype, n_rows = device_of(model), next(model.parameters()).dtype, len(prompts)
    n_columns = -(-(len(prompts[0]) + max_new) // ALIGNMENT) * ALIGNMENT
    column = torch.tensor([len(prompts[0])], device=device)
    mask = torch.full((n_rows, 1, 1, n_columns), torch.finfo(dtype).min, dtype=dtype, device=device)
    first_tokens, past, row = [], None, 0
    while row < n_rows:
        some = prompts[row : row + max(1, PREFILL_TOKENS // len(prompts[row]))]
        ids, real = pad_left(some, pad, device)
        output = forward(model, ids, real)
        if past is None:
            past = FixedCache(output.past_key_values, n_rows, n_columns, column)
        past.fill(row, output.past_key_values)
        mask[row : row + len(some), 0, 0, : ids.shape[1]].masked_fill_(real.bool(), 0)
        first_tokens.append(output.logits[:, -1].argmax(dim=-1, keepdim=True))
        row += len(some)
        del output  # its cache: the next forward would be beside it
    written = torch.full((n_rows, max_new), NOT_WRITTEN, device=device)
    ids = torch.cat(first_tokens)
    written[:, :1] = ids
    positions = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    return StaticRows(model, past, mask, ids, positions, written, torch.ones_like(column))


def _record(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step that has run before as a CUDA graph; where that fails, say so and give the step back."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:  # memory is no cause: the steps before had as much
        _tell_once(f"answers are written without CUDA graphs: {str(error).splitlines()[0]}")
        return step
    return graph.replay


def _all_ended(written: Tensor, stops: Tensor) -> bool:
    return bool(torch.isin(written, stops).any(dim=1).all())


@cache
def _tell_once(text: str) -> None:
    logger.info(text)
