"""Skeletons: prompts with named slots, as text.

Knows strings, not models, tokens or adapters.
"""

import re
from dataclasses import dataclass

from search.errors import InputError

_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
_WHITESPACE_RUN = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """`literals[0] {slots[0]} literals[1] ... {slots[-1]} literals[-1]`; the last is the answer cue."""

    literals: tuple[str, ...]
    """(n_slots + 1,) the fixed text; only the first may be empty."""
    slots: tuple[str, ...]
    """(n_slots,) their names."""


def parse_skeleton(text: str) -> Skeleton:
    """Split a skeleton into literals and {slots}; a brace that does not hold one plain name is literal text.

    Raises:
        InputError: if there is no slot, a name comes twice, or no text follows a slot.
    """
    *pairs, last = _SLOT.split(text)
    skeleton = Skeleton(literals=(*pairs[::2], last), slots=tuple(pairs[1::2]))
    if not skeleton.slots:
        raise InputError(
            f"skeleton {text!r}: no slot. Put a name in braces where text varies, e.g. {{input}}."
        )
    twice = [name for i, name in enumerate(skeleton.slots) if name in skeleton.slots[:i]]
    if twice:
        raise InputError(f"skeleton {text!r}: slot {{{twice[0]}}} comes twice. Give each slot its own name.")
    for name, literal in zip(skeleton.slots, skeleton.literals[1:], strict=True):
        if not literal.strip():
            raise InputError(
                f"skeleton {text!r}: no text after slot {{{name}}}. A slot ends where the next text begins, "
                'and the expert answers after the last text: add it, e.g. "\\n### Answer:".'
            )
    return skeleton


def cut_slot(sampled: str, following: str, *, ended: bool) -> str:
    """Return what fills a slot: the sampled text up to the literal that follows it; "" where that is blank.

    Where the literal never comes, a text that the model `ended` itself is taken whole, another up to its last
    line end, else its last space.
    """
    found = sampled.find(following)
    if found >= 0:
        slot = sampled[:found]
    elif ended:
        slot = sampled
    else:
        slot = _before_last(sampled, "\n") or _before_last(sampled, " ")
    return slot if slot.strip() else ""


def _before_last(text: str, mark: str) -> str:
    before, _, _ = text.rpartition(mark)
    return before if before.strip() else ""


def normal_form(text: str) -> str:
    """Return the text that decides whether two prompts are the same: every run of whitespace as one space."""
    return _WHITESPACE_RUN.sub(" ", text).strip()
