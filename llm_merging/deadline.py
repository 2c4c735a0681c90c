"""How long answers take, and how much of each may still be written so that all are there in time.

Knows sizes of queries, measured seconds and a clock; not texts, models or memory.

Choices cost seconds by the token read, generations by the token read and the token written. What was measured
is held against what batches take, so that a machine that is slower by now is soon known to be.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from llm_merging.data import GENERATION
from llm_merging.sizing import SizedQuery

LEAST_NEW_TOKENS = 4
"""Of a generation: with fewer, few answers can be right."""
PRIOR_SHARE = 0.1
"""Of a kind's seconds, how many count as taken at the pace known before: batches differ among themselves."""


@dataclass(frozen=True, slots=True)
class AnswerRates:
    """Seconds by the token."""

    choice_s: float
    """Of a prompt read once and of its choices' tokens."""
    read_s: float
    """Of a generation's prompt."""
    write_s: float
    """Of a token written, prompt by prompt."""

    def seconds(self, sized: Sequence[SizedQuery], n_new: int) -> float:
        """Seconds that these take, generations of `n_new` tokens each."""
        written = [s for s in sized if s.query.eval_type == GENERATION]
        n_chosen = sum(choice_tokens(s) for s in sized if s.query.eval_type != GENERATION)
        n_read, n_written = sum(s.n_input for s in written), n_new * len(written)
        return self.choice_s * n_chosen + self.read_s * n_read + self.write_s * n_written


UNKNOWN = AnswerRates(0.0, 0.0, 0.0)


def choice_tokens(sized: SizedQuery) -> int:
    """Tokens that scoring a query's choices reads: the prompt is read once for all of them."""
    return sized.n_input + sized.n_rows * sized.n_answer


@dataclass(slots=True)
class Deadline:
    """Decides for each batch how many queries go into it and how many tokens they may get.

    Example:
        while todo and (batch := deadline.fit(batch, todo)):
            ... answer the batch with at most deadline.n_new new tokens ...
            deadline.learn(batch, seconds)
    """

    left_s: Callable[[], float]
    """Seconds until all answers must be there."""
    rates: AnswerRates
    """As measured before; `UNKNOWN` where nothing was: the first batch of a kind tells then."""
    most_new: int
    """Tokens of a generation when there is time."""
    n_new: int = 0
    """Tokens that a generation of the next batch may have."""
    n_shortened: int = 0
    """Generations answered with fewer tokens."""
    n_guessed: int = 0
    """Queries that no time was left for."""
    _pace: float = 1.0
    """Seconds that the present kind takes over those foreseen; to begin with, as the kind before took."""
    _told: bool = False
    _kind: str = ""
    _known_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Seconds taken, and foreseen, by this kind's batches so far, with some to begin with."""

    def __post_init__(self) -> None:
        self.n_new = self.most_new

    def fit(self, batch: list[SizedQuery], todo: Sequence[SizedQuery]) -> list[SizedQuery]:
        """Return what of a batch is to be answered next, and set `n_new`; nothing when time is over.

        Args:
            batch: what memory has room for, the first of `todo`.
            todo: all that is not answered, choices first, the longest first.
        """
        left_s = self.left_s()
        if math.isinf(left_s) or left_s <= 0:
            return batch if left_s > 0 else []
        self._see_kind(batch[0].query.eval_type, todo)
        n_new = self.most_new
        while n_new > LEAST_NEW_TOKENS and self._seconds(todo, n_new) > left_s:
            n_new = max(LEAST_NEW_TOKENS, n_new // 2)
        self._tell(n_new, batch)
        self.n_new = n_new
        while batch and self._seconds(batch, n_new) > left_s:
            batch = batch[(len(batch) + 1) // 2 :]  # the shorter half: more of them fit
        return batch

    def learn(self, batch: Sequence[SizedQuery], seconds: float) -> None:
        """Take note of what a batch took, and of what it was not given."""
        is_written, foreseen_s = batch[0].query.eval_type == GENERATION, self.rates.seconds(batch, self.n_new)
        if is_written and self.n_new < self.most_new:
            self.n_shortened += len(batch)
        if foreseen_s == 0:  # nothing is known of this kind
            each_s = seconds / max(1, sum(choice_tokens(s) for s in batch))
            known = {"read_s": each_s, "write_s": each_s} if is_written else {"choice_s": each_s}
            self.rates = replace(self.rates, **known)
            return
        self._known_s[0] += seconds
        self._known_s[1] += foreseen_s
        self._pace = self._known_s[0] / self._known_s[1]

    def _see_kind(self, kind: str, todo: Sequence[SizedQuery]) -> None:
        """Where another kind begins, expect the same pace of it until a tenth of it is answered."""
        if kind != self._kind:
            own = [s for s in todo if s.query.eval_type == kind]
            foreseen_s = PRIOR_SHARE * self.rates.seconds(own, self.most_new)
            self._kind, self._known_s = kind, [self._pace * foreseen_s, foreseen_s]

    def _seconds(self, sized: Sequence[SizedQuery], n_new: int) -> float:
        return self._pace * self.rates.seconds(sized, n_new)

    def _tell(self, n_new: int, batch: Sequence[SizedQuery]) -> None:
        if n_new < self.most_new and not self._told and batch[0].query.eval_type == GENERATION:
            self._told = True
            logging.getLogger(__name__).warning(
                "time is short: generations have at most %d new tokens from here on, or fewer", n_new
            )

    def describe(self) -> str:
        """Say how many answers are not what they would have been with more time; "" if all are."""
        found = []
        if self.n_shortened:
            found.append(f"{self.n_shortened} generations were cut below {self.most_new} tokens")
        if self.n_guessed:
            found.append(f"{self.n_guessed} queries were not read and got a placeholder")
        return f"time was short: {', '.join(found)}; a larger --time-box answers them" if found else ""
