"""Does the zoo leave something to win? Compare its scores and sizes with their limits.

`python -m benchmarks.zoo.check` prints every limit with the measured value, scores both on the shipped
queries and on validation, and exits 1 if one is missed. Knows numbers, not how they came about.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.zoo.scores import normalised, own_accuracies
from benchmarks.zoo.tasks import HELD_IN

MEGABYTE = 1_000_000
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit and what was measured."""

    name: str
    measured: float
    limit: float
    at_least: bool
    unit: str
    worst: str = ""
    """The task that decides, where the limit is on every task."""

    @property
    def passed(self) -> bool:
        """Whether the limit is kept."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def wanted(self) -> str:
        """The limit as text."""
        return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}"

    @property
    def found(self) -> str:
        """The measured value as text."""
        return f"{self.measured:.1f} {self.unit}{f' ({self.worst})' if self.worst else ''}"

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{'pass' if self.passed else 'FAIL'}  {self.name:52}{self.wanted:>12}   {self.found}"


def held_in_mean(accuracies: Mapping[str, float]) -> float:
    """Mean accuracy over the held-in tasks, 0 to 1."""
    return sum(accuracies[task] for task in HELD_IN) / len(HELD_IN)


def score_limits(measured: dict[str, Any], shipped_held_out: Sequence[str], split: str) -> list[Limit]:
    """Return the limits on one split's accuracies (a section of scores.json)."""
    matrix, joint = measured["matrix"], measured["joint"]
    own = own_accuracies(matrix)
    single = {task: max(row[task] for row in matrix.values()) for task in shipped_held_out}
    margin = {task: joint[task] - single[task] for task in shipped_held_out}
    weakest = min(own, key=own.__getitem__)
    easiest = max(single, key=single.__getitem__)
    closest = min(margin, key=margin.__getitem__)
    rows = (
        ("base, held-in mean", held_in_mean(measured["base"]), 20, False, ""),
        ("each expert, own task", own[weakest], 95, True, weakest),
        ("uniform average, normalised", normalised(measured["uniform"], own), 50, False, ""),
        ("best label-picked scale, normalised", normalised(measured["scaled"], own), 85, False, ""),
        ("joint LoRA, held-in mean", held_in_mean(joint), 95, True, ""),
        ("best single expert, each held-out task", single[easiest], 60, False, easiest),
        ("joint LoRA above best single expert", margin[closest], 20, True, closest),
    )
    return [
        Limit(f"{split}: {name}", 100 * value, limit, at_least, "%", worst)
        for name, value, limit, at_least, worst in rows
    ]


def size_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, the zoo's card left out (it states this number)."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != CARD)


def size_limits(zoo: Path) -> list[Limit]:
    """Return the limits on the zoo's files."""
    return [
        Limit("base, size", size_bytes(zoo / "base") / MEGABYTE, 12, False, "MB"),
        Limit("whole zoo, size", size_bytes(zoo) / MEGABYTE, 20, False, "MB"),
    ]


def read_zoo_scores(zoo: Path) -> dict[str, Any]:
    """Read scores.json of a zoo."""
    scores: dict[str, Any] = json.loads((zoo / "scores.json").read_text(encoding="utf-8"))
    return scores


def all_limits(scores: dict[str, Any], zoo: Path) -> list[Limit]:
    """Return every limit, those on scores for both splits: test (the shipped queries) and validation."""
    held_out = scores["shipped_held_out"]
    test, validation = (score_limits(scores[split], held_out, split) for split in ("test", "validation"))
    return [*test, *validation, *size_limits(zoo)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each limit; return 1 if one is missed."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.check", description=about)
    parser.add_argument("--zoo", type=Path, default=Path("data/zoo"))
    zoo = parser.parse_args(argv).zoo
    limits = all_limits(read_zoo_scores(zoo), zoo)
    for limit in limits:
        print(limit.line)
    return 0 if all(limit.passed for limit in limits) else 1


if __name__ == "__main__":
    sys.exit(main())
