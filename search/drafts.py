"""Drafts of prompts: the base fills the slots of a skeleton, the expert answers, or the expert writes freely.

Knows models, tokenizer and who writes what; not how many prompts are needed nor which drafts are kept.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from search.groups import Groups
from search.population import population
from search.sampling import Decoding, Ended, encode_input, is_loop, sample_rows
from search.skeleton import Skeleton, cut_slot
from search.stack import StackedFactors


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSettings:
    """How drafts are written."""

    temperature: float
    """Of slots and free text; answers are greedy."""
    max_slot_tokens: int
    max_new_tokens: int
    """Longest answer or free text."""
    seed: int


@dataclass(slots=True)
class Draft:
    """A prompt being written."""

    adapter: int
    skeleton: Skeleton
    text: str
    """Up to where the expert goes on."""
    prompt: list[int] = field(default_factory=list)
    """Its tokens."""
    answer: list[int] = field(default_factory=list)
    full_text: str = ""
    """With the answer."""
    problem: str = ""
    """Why it cannot be used; "" for a good one."""

    @property
    def is_free(self) -> bool:
        """Whether the expert writes all of it."""
        return not self.skeleton.slots


class DraftWriter:
    """The models at work: the base fills, the experts answer or write freely."""

    def __init__(
        self, model: Any, tokenizer: Any, stacked: StackedFactors, groups: Groups, settings: DraftSettings
    ) -> None:
        self._model, self._tokenizer, self._stacked, self._groups = model, tokenizer, stacked, groups
        self._settings = settings
        self._gen = torch.Generator().manual_seed(settings.seed)
        stops = model.generation_config.eos_token_id
        self._stop_ids = frozenset(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
        n_vocab = model.config.get_text_config().vocab_size
        special = sorted(set(tokenizer.all_special_ids) - self._stop_ids)
        self._banned_ids = tuple(
            sorted({i for i in special if i < n_vocab} | set(range(len(tokenizer), n_vocab)))
        )

    def write(self, drafts: Sequence[Draft]) -> None:
        """Write each draft in place, up to its first problem."""
        for slot in range(max((len(draft.skeleton.slots) for draft in drafts), default=0)):
            self._fill([d for d in drafts if not d.problem and slot < len(d.skeleton.slots)], slot)
        ready = [draft for draft in drafts if not draft.problem]
        self.answer([draft for draft in ready if draft.is_free], self._settings.temperature)
        self.answer([draft for draft in ready if not draft.is_free], 0.0)

    def _fill(self, drafts: list[Draft], slot: int) -> None:
        """Let the base write one slot of each draft, until the literal after it comes up."""
        prefixes = [encode_input(self._tokenizer, draft.text) for draft in drafts]
        following = [draft.skeleton.literals[slot + 1] for draft in drafts]

        def reached(row: int, tokens: list[int]) -> bool:
            return following[row] in self._text_after(prefixes[row], tokens)

        base = torch.zeros(len(drafts), len(self._groups.names), self._stacked.n_adapters)
        decoding = self._decoding(self._settings.max_slot_tokens, self._settings.temperature)
        for row, tokens in enumerate(self._sample(prefixes, base, decoding, reached)):
            draft, text = drafts[row], self._text_after(prefixes[row], tokens)
            filling = cut_slot(text, following[row], ended=tokens[-1] in self._stop_ids)
            draft.text += filling + following[row]
            draft.problem = _find_problem(tokens, filling)

    def answer(self, drafts: Sequence[Draft], temperature: float) -> None:
        """Let each draft's expert go on after its text, to its end."""
        experts = torch.zeros(len(drafts), len(self._groups.names), self._stacked.n_adapters)
        for row, draft in enumerate(drafts):
            draft.prompt = encode_input(self._tokenizer, draft.text)
            experts[row, :, draft.adapter] = 1
        decoding = self._decoding(self._settings.max_new_tokens, temperature)
        answers = self._sample([draft.prompt for draft in drafts], experts, decoding, lambda *_: False)
        for draft, tokens in zip(drafts, answers, strict=True):
            written = self._text_after(draft.prompt, tokens)
            draft.answer = tokens
            draft.full_text = draft.text + written
            draft.problem = _find_problem(tokens, written)

    def _decoding(self, max_new_tokens: int, temperature: float) -> Decoding:
        """Greedy rows say what their expert says; sampled ones keep to tokens that are text, or an end."""
        banned = self._banned_ids if temperature else ()
        return Decoding(
            max_new_tokens=max_new_tokens, temperature=temperature, stop_ids=self._stop_ids, banned_ids=banned
        )

    def _sample(
        self, prefixes: list[list[int]], table: Tensor, decoding: Decoding, ended: Ended
    ) -> list[list[int]]:
        """Continue row r under the coefficients table[r], (n_groups, n_adapters)."""

        def under(rows: list[int]) -> AbstractContextManager[object]:
            return population(self._model, self._stacked, table[rows], self._groups)

        return sample_rows(self._model, prefixes, under, decoding, self._gen, ended=ended)

    def _text_after(self, prefix: list[int], tokens: list[int]) -> str:
        """Decode with the token before, since decoders trim the space that a text begins with."""
        context = prefix[-1:]
        return self._decode(context + tokens)[len(self._decode(context)) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def _find_problem(tokens: Sequence[int], text: str) -> str:
    return "looping" if is_loop(tokens) else "blank" if not text.strip() else ""
