"""Continue many token sequences at once with a causal language model, left-padded, on one cache.

Knows token ids, temperature and the cache; not adapters (the caller sets the model up for the rows that it
is told) nor what the text is for.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from search.errors import InputError
from search.memory import fits_in_memory, largest_batch, sampling_cost

MAX_CACHED_TOKENS = 32_768
"""Rows x tokens decoded together: 4 GiB of cache for a 7B model with 8 key-value heads."""
_MAX_PERIOD = 16
_MIN_STRETCH = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How to continue rows."""

    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    stop_ids: frozenset[int]
    """A row ends with one of these, which is kept."""
    banned_ids: tuple[int, ...] = ()
    """Never chosen."""


Ended = Callable[[int, list[int]], bool]
"""(row, its new tokens) -> is the row done?"""
Under = Callable[[list[int]], AbstractContextManager[object]]
"""rows -> a context in which the model computes exactly those rows, each as it should."""


def encode_input(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an input: with BOS where the tokenizer adds one, never with EOS, never empty."""
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start]


@torch.inference_mode()
def sample_rows(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    under: Under,
    decoding: Decoding,
    gen: torch.Generator,
    *,
    ended: Ended = lambda row, tokens: False,
) -> list[list[int]]:
    """Continue each prefix (n_rows token sequences, none empty) and return the new tokens of each.

    A row's randomness depends on its place and the state of `gen` (on the CPU) alone, not on when other rows
    end. Rows that are done leave the batch when they are half of it.

    Raises:
        InputError: if a prefix fills the model's context.
    """
    if not prefixes:
        return []
    room = _room_left(model, prefixes, decoding.max_new_tokens)
    draws = torch.rand(len(prefixes), decoding.max_new_tokens, generator=gen)
    new: list[list[int]] = [[] for _ in prefixes]

    def is_done(row: int) -> bool:
        tokens = new[row]
        return tokens[-1] in decoding.stop_ids or len(tokens) == room[row] or ended(row, tokens)

    def write(rows: list[int]) -> None:
        for row in rows:
            new[row].clear()  # of a batch that did not fit
        batch = _Batch(model, prefixes, rows)
        while batch.rows:
            with under(batch.rows):
                live = _decode_until_half_done(batch, new, draws, decoding, is_done)
            batch.keep(live)

    n_together = max(1, tokens_together(model) // (max(map(len, prefixes)) + decoding.max_new_tokens))
    left = list(range(len(prefixes)))
    while left:
        rows = left[:n_together]
        if fits_in_memory(write, rows):
            left = left[len(rows) :]
        else:
            n_together = len(rows) // 2
            torch.cuda.empty_cache()
    return new


def tokens_together(model: Any) -> int:
    """Return how many rows x tokens to decode together."""
    return largest_batch(model, sampling_cost, MAX_CACHED_TOKENS)


def _context_of(model: Any) -> int | None:
    """Return how many tokens the model can read; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _room_left(model: nn.Module, prefixes: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Return how many tokens each row may grow by."""
    context = _context_of(model)
    if context is None:
        return [max_new_tokens] * len(prefixes)
    longest = max(map(len, prefixes))
    if longest >= context:
        raise InputError(
            f"a prompt of {longest} tokens leaves no room in the model's context of {context}. "
            "Shorten the adapter's skeleton, or lower prompts.max_slot_tokens."
        )
    return [min(max_new_tokens, context - len(prefix)) for prefix in prefixes]


def _decode_until_half_done(
    batch: "_Batch",
    new: list[list[int]],
    draws: Tensor,
    decoding: Decoding,
    is_done: Callable[[int], bool],
) -> list[int]:
    """Append tokens to `new` until at most half of the batch's rows go on; return those rows' places."""
    live = dict(enumerate(batch.rows))  # place in the batch -> row
    while 2 * len(live) > len(batch.rows):
        step = len(new[next(iter(live.values()))])  # live rows have all grown by as much
        tokens = _choose_tokens(batch.next_logits(), draws[batch.rows, step], decoding)
        chosen = tokens.tolist()
        for place, row in live.items():
            new[row].append(chosen[place])
        batch.feed(tokens)
        live = {place: row for place, row in live.items() if not is_done(row)}
    return list(live)


def _choose_tokens(logits: Tensor, draws: Tensor, decoding: Decoding) -> Tensor:
    """Pick a token per row from logits (n_rows, n_vocab): the largest, or one drawn from their softmax.

    The cumulative probability is inverted on the CPU in float64: the same sum on every run, and no token of
    probability zero is hit.

    Raises:
        InputError: if a row's logits are not finite.
    """
    if decoding.banned_ids:
        logits[:, list(decoding.banned_ids)] = -torch.inf
    if decoding.temperature == 0:
        return logits.argmax(-1).cpu()
    cumulative = torch.softmax(logits / decoding.temperature, -1).cpu().double().cumsum(-1)
    if not cumulative[:, -1].isfinite().all():
        raise InputError("the model's logits are not finite. Use a wider base.dtype (bfloat16 or float32).")
    targets = draws.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _make_cache(model: Any) -> Any:
    """Return an empty cache; None for a model that makes tuples, as GPT-2 did before transformers 4.54."""
    try:
        return DynamicCache(config=model.config)
    except TypeError:
        return DynamicCache() if getattr(model, "_supports_cache_class", True) else None


class _Batch:
    """Rows being decoded together: their cache, padding mask and next input."""

    def __init__(self, model: Any, prefixes: Sequence[Sequence[int]], rows: list[int]) -> None:
        self.model = model
        self.rows = rows
        longest = max(len(prefixes[row]) for row in rows)
        pads = [longest - len(prefixes[row]) for row in rows]
        padded = [[0] * pad + list(prefixes[row]) for pad, row in zip(pads, rows, strict=True)]
        self._input = torch.tensor(padded, device=model.device)
        self._mask = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long().to(model.device)
        self._cache = _make_cache(model)

    def next_logits(self) -> Tensor:
        """Run the model on the pending input; return float32 logits (n_rows, n_vocab) of the next token."""
        last = (_context_of(self.model) or self._mask.shape[1]) - 1  # rows that are done may run past it
        positions = (self._mask.cumsum(-1) - 1).clamp(0, last)[:, -self._input.shape[1] :]
        output = self.model(
            input_ids=self._input,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **({"logits_to_keep": 1} if takes_logits_to_keep(self.model) else {}),
        )
        if not isinstance(self._cache, DynamicCache):
            self._cache = output.past_key_values
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    def feed(self, tokens: Tensor) -> None:
        """Make tokens (n_rows,) the next input."""
        self._input = tokens[:, None].to(self._input.device)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)

    def keep(self, places: list[int]) -> None:
        """Drop the rows at all other places."""
        index = torch.tensor(places, dtype=torch.long, device=self._mask.device)
        self.rows = [self.rows[place] for place in places]
        self._input, self._mask = self._input[index], self._mask[index]
        if isinstance(self._cache, DynamicCache):
            self._cache.batch_select_indices(index)
        else:
            self._cache = tuple(tuple(part[index] for part in layer) for layer in self._cache)


def takes_logits_to_keep(model: Any) -> bool:
    """Whether a model can be told whose logits are wanted; transformers before 4.50 calls it otherwise."""
    return "logits_to_keep" in signature(model.forward).parameters


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether half of the tokens or more are one phrase of at most 16 tokens, three times or more in a row.

    Stretches under 12 tokens do not count: a number may be all zeros, a line all dashes.
    """
    longest = max((_longest_stretch(tokens, period) for period in range(1, _MAX_PERIOD + 1)), default=0)
    return 2 * longest >= len(tokens) and longest >= _MIN_STRETCH


def _longest_stretch(tokens: Sequence[int], period: int) -> int:
    """Length of the longest stretch that repeats with `period`; 0 if the phrase does not come three times."""
    run = longest = 0
    for previous, token in zip(tokens, tokens[period:], strict=False):
        run = run + 1 if token == previous else 0
        longest = max(longest, run)
    return longest + period if longest >= 2 * period else 0
