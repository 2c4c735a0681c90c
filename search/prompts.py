"""The prompts that a search runs on, written by the models themselves: no row of anyone's data.

Knows what is asked for, kept and scored; not how a draft is written, nor what it is scored with.

With a skeleton the base fills the slots and the expert answers, since an expert trained on answers alone
cannot write questions; without, the expert writes freely. (The idea: Magpie, arxiv.org/abs/2406.08464.)
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from search.drafts import Draft, DraftSettings, DraftWriter
from search.errors import InputError
from search.groups import Groups
from search.skeleton import Skeleton, normal_form, parse_skeleton
from search.stack import StackedFactors

_ROUNDS = 6
_FREE_TEXT = Skeleton(literals=("",), slots=())


@dataclass(frozen=True, slots=True, eq=False)
class PromptSet:
    """Token sequences to score, each by the expert that wrote its answer."""

    ids: tuple[tuple[int, ...], ...]
    """(n_prompts,) token ids from the start token to the last answer token."""
    expert: NDArray[np.int64]
    """(n_prompts,) adapter index."""
    scored: tuple[tuple[int, ...], ...]
    """(n_prompts,) positions t whose prediction of token t + 1 is scored."""
    texts: tuple[str, ...]
    """(n_prompts,) the same sequences as text."""
    from_skeleton: tuple[bool, ...]
    """(n_prompts,) filled and answered (True), or free text (False)."""
    n_experts: int

    @property
    def n_prompts(self) -> int:
        """Number of sequences."""
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences."""
        return sum(map(len, self.ids))

    @property
    def sha256(self) -> str:
        """Hash of the tokens, experts and scored positions."""
        content = json.dumps([self.ids, self.expert.tolist(), self.scored, self.n_experts])
        return sha256(content.encode()).hexdigest()

    def select(self, indices: Sequence[int]) -> "PromptSet":
        """Return the prompts at `indices`."""
        return PromptSet(
            ids=tuple(self.ids[i] for i in indices),
            expert=self.expert[list(indices)],
            scored=tuple(self.scored[i] for i in indices),
            texts=tuple(self.texts[i] for i in indices),
            from_skeleton=tuple(self.from_skeleton[i] for i in indices),
            n_experts=self.n_experts,
        )

    def split(self, per_adapter: int) -> tuple["PromptSet", "PromptSet"]:
        """Return two disjoint sets: the first `per_adapter` prompts of each expert, and the rest.

        An expert that has no more prompts than that leaves one for the second set.
        """
        first: list[int] = []
        rest: list[int] = []
        for expert in range(self.n_experts):
            own = np.flatnonzero(self.expert == expert).tolist()
            n_first = min(per_adapter, len(own) - 1)
            first += own[:n_first]
            rest += own[n_first:]
        return self.select(first), self.select(rest)


def describe_prompts(prompts: PromptSet, names: Sequence[str]) -> list[dict[str, object]]:
    """Return what the trace says of each prompt; `names` (n_experts,) are the adapters'."""
    own = [names[expert] for expert in prompts.expert.tolist()]
    rows = zip(own, prompts.texts, prompts.ids, prompts.scored, prompts.from_skeleton, strict=True)
    fields = "expert", "text", "ids", "scored", "from_skeleton"
    return [dict(zip(fields, row, strict=True)) for row in rows]


def read_prompts(event: Mapping[str, Any], names: Sequence[str]) -> tuple[PromptSet, PromptSet]:
    """Rebuild the searched and the unseen set from the trace's event `prompts`.

    Raises:
        InputError: if they do not have the hash that is recorded with them.
    """
    rows = [*event["searched"], *event["unseen"]]
    experts = [names.index(row["expert"]) for row in rows]
    prompts = PromptSet(
        ids=tuple(tuple(row["ids"]) for row in rows),
        expert=np.array(experts, dtype=np.int64),
        scored=tuple(tuple(row["scored"]) for row in rows),
        texts=tuple(row["text"] for row in rows),
        from_skeleton=tuple(row["from_skeleton"] for row in rows),
        n_experts=len(names),
    )
    by_adapter = prompts.select(np.argsort(prompts.expert, kind="stable").tolist())  # as they were written
    if by_adapter.sha256 != event["sha256"]:
        raise InputError(
            f"the trace's prompts have hash {by_adapter.sha256[:12]}, not {event['sha256'][:12]} as it says: "
            "its line was changed. Restore the file, or choose another --out."
        )
    n_searched = len(event["searched"])
    return prompts.select(range(n_searched)), prompts.select(range(n_searched, len(rows)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """What to write, and how."""

    per_adapter: int
    """Prompts of each adapter, searched on and unseen together."""
    temperature: float = 1.0
    max_new_tokens: int = 64
    """Longest answer or free text."""
    max_slot_tokens: int = 64
    seed: int = 0
    positions: Literal["auto", "all", "answer"] = "auto"
    """`all`, or the answer's alone; `auto` is the answer's where there is a skeleton, else all."""


def draft_settings(request: PromptRequest) -> DraftSettings:
    """Return how the drafts of the prompts are written."""
    return DraftSettings(
        temperature=request.temperature,
        max_slot_tokens=request.max_slot_tokens,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
    )


def write_prompts(
    model: nn.Module,
    tokenizer: Any,
    stacked: StackedFactors,
    groups: Groups,
    skeletons: Sequence[Sequence[str]],
    request: PromptRequest,
) -> PromptSet:
    """Write `request.per_adapter` different prompts for each adapter; all adapters' in one batch.

    Unusable ones (blank, looping, seen before) are replaced in a few more rounds; a shortage is logged.
    Seeded: the same request on the same device gives the same prompts. They come ordered by adapter.

    Args:
        skeletons: (n_adapters,) each adapter's own, which take turns; none for free text.

    Raises:
        InputError: if a skeleton is bad, or an adapter gives no usable prompt (one, where more are asked).
    """
    parsed = [tuple(parse_skeleton(text) for text in texts) or (_FREE_TEXT,) for texts in skeletons]
    if len(parsed) != stacked.n_adapters:
        raise ValueError(f"skeletons for {len(parsed)} adapters, expected {stacked.n_adapters}")
    writer = DraftWriter(model, tokenizer, stacked, groups, draft_settings(request))
    desks = [
        _Desk(i, name, own, request.per_adapter)
        for i, (name, own) in enumerate(zip(stacked.names, parsed, strict=True))
    ]
    seen: set[str] = set()
    for n_spare in range(_ROUNDS):
        drafts = [draft for desk in desks for draft in desk.next_drafts(n_spare)]
        writer.write(drafts)
        for draft in drafts:
            desks[draft.adapter].judge(draft, seen)
    for desk in desks:
        desk.check_enough()
    return _collect([draft for desk in desks for draft in desk.kept], request.positions, len(desks))


@dataclass(slots=True)
class _Desk:
    """One adapter's prompts: how many are still to write, from which skeleton, what was kept."""

    adapter: int
    name: str
    skeletons: tuple[Skeleton, ...]
    n_wanted: int
    kept: list[Draft] = field(default_factory=list)
    n_tried: int = 0
    problems: Counter[str] = field(default_factory=Counter)

    def next_drafts(self, n_spare: int) -> list[Draft]:
        """Start a draft for each prompt that is missing, and some to spare."""
        n_missing = self.n_wanted - len(self.kept)
        turns = range(self.n_tried, self.n_tried + (n_missing and n_missing + n_spare))
        self.n_tried = turns.stop
        skeletons = [self.skeletons[turn % len(self.skeletons)] for turn in turns]
        return [Draft(self.adapter, skeleton, skeleton.literals[0]) for skeleton in skeletons]

    def judge(self, draft: Draft, seen: set[str]) -> None:
        """Keep a draft that has no problem, is wanted and not in `seen`, the texts kept by all adapters."""
        text = normal_form(draft.full_text if draft.is_free else draft.text)
        problem = draft.problem or ("duplicate" if text in seen else "")
        if problem:
            self.problems[problem] += 1
        elif len(self.kept) < self.n_wanted:
            self.kept.append(draft)
            seen.add(text)

    def check_enough(self) -> None:
        """Log a shortage; refuse to go on with nothing to search on, or nothing unseen."""
        if len(self.kept) == self.n_wanted:
            return
        reasons = ", ".join(f"{count} {problem}" for problem, count in self.problems.most_common())
        found = (
            f"adapter {self.name!r}: {len(self.kept)} usable of {self.n_tried} written prompts ({reasons})"
        )
        if len(self.kept) < min(2, self.n_wanted):
            raise InputError(
                f"{found}, expected {self.n_wanted}. Give the adapter (other) `skeletons:` in the config, "
                "raise prompts.temperature, or leave the adapter out."
            )
        logging.getLogger(__name__).warning(
            "%s, %d were asked for; going on with these", found, self.n_wanted
        )


def _collect(drafts: Sequence[Draft], positions: str, n_experts: int) -> PromptSet:
    ids = tuple((*draft.prompt, *draft.answer) for draft in drafts)
    starts = [0 if positions == "all" else len(draft.prompt) - 1 for draft in drafts]  # free text: 0
    return PromptSet(
        ids=ids,
        expert=np.array([draft.adapter for draft in drafts], dtype=np.int64),
        scored=tuple(tuple(range(start, len(row) - 1)) for start, row in zip(starts, ids, strict=True)),
        texts=tuple(draft.full_text for draft in drafts),
        from_skeleton=tuple(not draft.is_free for draft in drafts),
        n_experts=n_experts,
    )
