"""How much memory a CUDA device has left, what a token takes of it, and how many tokens to compute at once.

Knows bytes, a model's shape and how to measure a step; not prompts, adapters or answers. What is picked is a
power of two, so that a little more or less memory gives the same batches, and with them the same bits.
"""

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MOST_TOKENS = 16_384
"""Of one forward: more fill a card no better."""
MEASURED_TOKENS = 256
"""Of the forward that tells what a token takes: few enough that a gradient's graph fits."""
RESERVED_SHARE = 0.05
"""Of the limit, left free: memory comes in blocks that do not fill up, and libraries take some."""
MOST_WRITTEN_TOKENS = 65_536
"""Rows x tokens written together. Writing wants 64 rows even of prompts of 1,000 tokens: a step reads all
weights, however few the rows."""
ANSWER_TOKENS_ELSEWHERE = 4096
"""In a batch of answers where there is no CUDA device."""
PREFILL_TOKENS = 4096
"""Of one forward over prompts that are to be continued: enough to keep a card busy, and as few as that, since
prompts read together are padded to the longest of them."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A device's memory in bytes, as a process sees it."""

    free: int
    """Of the device; what this process holds, be it used or not, is not free."""
    total: int
    held: int
    """By this process, used or kept for later use."""
    used: int
    """By tensors of this process."""
    fraction: float = 1.0
    """Of the total that this process may hold."""

    @property
    def limit(self) -> int:
        """What this process may come to hold."""
        return max(0, min(self.free + self.held, int(self.total * self.fraction)))

    @property
    def available(self) -> int:
        """What may be used beside what is, with the reserve left free."""
        return max(0, usable_bytes(self.limit) - self.used)


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory follows from in a decoder model; counts of numbers, and bytes of one."""

    n_layers: int
    d_hidden: int
    d_inner: int
    """Width inside the MLP."""
    d_attention: int
    """All heads' queries together."""
    d_cached: int
    """All heads' keys together."""
    n_vocab: int
    n_bytes: int
    """Of one number."""

    @property
    def cache(self) -> int:
        """Bytes of keys and values for a token."""
        return 2 * self.n_layers * self.d_cached * self.n_bytes

    @property
    def forward(self) -> int:
        """Bytes for a token at the widest place of a layer, norms in float32; without a graph."""
        return self.n_bytes * (6 * self.d_hidden + 3 * self.d_inner) + 8 * self.d_hidden

    @property
    def graph(self) -> int:
        """Bytes that a graph keeps of a token: frozen weights need no inputs, norms, attention and MLP do."""
        kept = self.n_bytes * (4 * self.d_attention + 3 * self.d_inner) + 20 * self.d_hidden
        return self.n_layers * kept + self.forward + self.logits(4)

    def logits(self, n_float32: int) -> int:
        """Bytes of a position's logits, and of as many things of that size in float32."""
        return self.n_vocab * (self.n_bytes + 4 * n_float32)


def usable_bytes(limit: int) -> int:
    """Return a limit less the reserve."""
    return int(limit * (1 - RESERVED_SHARE))


def largest_fit(available: float, cost: Callable[[int], float], most: int) -> int:
    """Return the largest power of two, at most `most`, whose cost is available; 1 where none is.

    Args:
        cost: bytes of so many tokens; grows with them.
    """
    tokens = 1 << max(0, most.bit_length() - 1)
    while tokens > 1 and cost(tokens) > available:
        tokens //= 2
    return tokens


def pick_tokens(available: float, bytes_per_token: float, most: int = MOST_TOKENS) -> int:
    """Return how many tokens, a power of two, go into one forward; 1, which means one row, at least."""
    return largest_fit(available, lambda tokens: tokens * bytes_per_token, most)


def tokens_that_fit(device: torch.device, bytes_per_token: float, kept_bytes: int) -> int:
    """Return how many tokens go into one forward on a CUDA device, beside what is there and is to be kept."""
    reading = read_memory(device)
    return pick_tokens(reading.available - kept_bytes if reading else 0, bytes_per_token)


def densest_rows(lengths: Sequence[int], n_scored: Sequence[int], n_tokens: int) -> list[int]:
    """Return rows of at most `n_tokens` together, one at least: those with most scored positions a token.

    What a token takes is most there; elsewhere it is no more.
    """
    order = sorted(range(len(lengths)), key=lambda row: -n_scored[row] / lengths[row])
    rows = order[:1]
    for row in order[1:]:
        if sum(lengths[own] for own in [*rows, row]) <= n_tokens:
            rows.append(row)
    return rows


def writing_cost(shape: Shape, n_tokens: int) -> int:
    """Bytes of a batch being written: its cache, a layer's of every head, and the prompts' forward."""
    prefill = min(n_tokens, PREFILL_TOKENS)
    each = shape.cache + 4 * shape.d_attention * shape.n_bytes
    return n_tokens * each + prefill * (shape.cache + shape.forward)


def sampling_cost(shape: Shape, n_tokens: int) -> int:
    """Bytes of rows being written over a cache that grows, all prompts read at once."""
    return n_tokens * (shape.cache + 4 * shape.d_attention * shape.n_bytes + shape.forward)


def choosing_cost(shape: Shape, n_tokens: int) -> int:
    """Bytes of a batch of choices being scored: the prompts' cache, its copy for every choice, and logits."""
    return n_tokens * (2 * shape.cache + shape.forward + shape.logits(2))


def shape_of(model: Any) -> Shape:
    """Read a model's shape from its configuration; what that lacks is as in most models."""
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    return Shape(
        n_layers=config.num_hidden_layers,
        d_hidden=hidden,
        d_inner=getattr(config, "intermediate_size", None) or 4 * hidden,
        d_attention=heads * head,
        d_cached=(getattr(config, "num_key_value_heads", None) or heads) * head,
        n_vocab=config.vocab_size,
        n_bytes=model.dtype.itemsize,
    )


def read_memory(device: torch.device) -> Reading | None:
    """Read a CUDA device's memory; None elsewhere, where batches do not follow from it."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    return Reading(
        free=free,
        total=total,
        held=torch.cuda.memory_reserved(index),
        used=torch.cuda.memory_allocated(index),
        fraction=torch.cuda.get_per_process_memory_fraction(index),
    )


def largest_batch(model: Any, cost: Callable[[Shape, int], int], most: int) -> int:
    """Return how many tokens of a batch fit beside what is there; `most` where that is not known."""
    reading = read_memory(model.device)
    if reading is None:
        return most
    shape = shape_of(model)
    return largest_fit(reading.available, lambda tokens: cost(shape, tokens), most)


def fits_in_memory(step: Callable[[list[int]], None], rows: list[int]) -> bool:
    """Do a step for some rows; say whether memory sufficed, once what it had made is free again.

    Raises:
        torch.OutOfMemoryError: if one row alone does not fit.
    """
    try:
        step(rows)
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise
        return False  # outside the except block the failed step's tensors are free
    return True


def measure_peak(device: torch.device, step: Callable[[], object]) -> int:
    """Return the bytes that a step takes on a CUDA device at its peak, above what was used before it.

    It runs twice: at the first call libraries take workspaces that they keep.
    """
    step()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    reset_peak(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


_highest_bytes = 0


def reset_peak(device: torch.device) -> None:
    """Count a CUDA device's peak anew from here on; `highest_peak` remembers what was counted."""
    global _highest_bytes
    _highest_bytes = max(_highest_bytes, torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)


def highest_peak(device: torch.device) -> int | None:
    """Return the most bytes of tensors on a CUDA device since the process began; None for another device."""
    if device.type != "cuda":
        return None
    return max(_highest_bytes, torch.cuda.max_memory_allocated(device))


def host_peak() -> int:
    """Return the most bytes of the host's memory that this process had since it began."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
