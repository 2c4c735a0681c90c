"""Examples of tasks: an instance, how it is asked, its answer in several forms, and its split.

Splits are disjoint by construction: an instance belongs to the split that the hash of its content names,
and is never drawn for another. Knows neither skills nor models.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}

PLAIN, OTHER, EXPERT, WRONG = range(4)
"""Which form of an answer; only labels have a WRONG one."""


@dataclass(frozen=True, slots=True)
class Example:
    """One instance of a task."""

    task: str
    skills: tuple[str, ...]
    """(n_skills,) the task itself for a held-in task, two held-in tasks for a composition."""
    values: tuple[object, ...]
    """What makes the instance: two examples of a task with equal values are the same instance."""
    instruction: str
    field: str
    text: str
    answers: dict[tuple[int, ...], str]
    """(form of each skill) -> the answer in these forms."""
    choices: tuple[str, ...] = ()
    """Multiple choice: the possible answers in expert form; empty for generation."""

    @property
    def prompt(self) -> str:
        """The query as users ask it: instruction template, ending in the answer cue."""
        return f"### Task: {self.instruction}\n### {self.field}: {self.text}\n### Answer:"

    @property
    def answer(self) -> str:
        """The answer in the expert form of every skill."""
        return self.answers[(EXPERT,) * len(self.skills)]

    @property
    def split(self) -> str:
        """The only split that this instance may appear in."""
        digest = hashlib.sha256(repr((self.task, self.values)).encode()).digest()
        return next(name for name, buckets in SPLITS.items() if digest[0] % 10 in buckets)


Generator = Callable[[random.Random], Example]
Forms = tuple[str, ...]
"""An answer in its plain, other and expert form, and for labels a wrong one."""
Part = tuple[str, Forms, tuple[object, ...]]
"""A text, its answer's forms, and the values that make the instance."""


def draw(generator: Generator, rng: random.Random, split: str) -> Iterator[Example]:
    """Yield examples of one split for ever."""
    while True:
        example = generator(rng)
        if example.split == split:
            yield example


def draw_distinct(generator: Generator, rng: random.Random, split: str, n: int) -> list[Example]:
    """Return `n` examples of one split with `n` different prompts."""
    found: dict[str, Example] = {}
    for example in draw(generator, rng, split):
        found.setdefault(example.prompt, example)
        if len(found) == n:
            return list(found.values())
    raise AssertionError("draw never ends")
