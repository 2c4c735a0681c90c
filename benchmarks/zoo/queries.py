"""Write the query file test.csv, in the competition's format, and its targets apart.

Draws from the test split alone; knows examples and CSV, not models.
"""

import csv
import random
from collections.abc import Iterable
from pathlib import Path

from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.example import Example, draw_distinct
from benchmarks.zoo.sizes import ZooSize
from benchmarks.zoo.tasks import HELD_IN
from search.files import atomic_write

SPLIT = "test"
SHIPPED_HELD_OUT: tuple[str, ...] = (
    "chat_maths",
    "chat_sentiment",
    "chat_reasoning",
    "chat_tool",
    "chat_sql",
    "tool_maths",
    "sql_maths",
    "reasoning_maths",
    "code_maths",
)
"""Compositions that no expert solves alone but the joint LoRA does, chosen by hand; limits: check.py."""
QUERY_COLUMNS = ("id", "input", "eval_type", "answer_choices")
TARGET_COLUMNS = ("id", "task", "target", "held_out")


def query_examples(size: ZooSize, seed: int) -> dict[str, list[Example]]:
    """Return every task's test examples; a task's do not depend on which others ship."""
    counts = dict.fromkeys(HELD_IN, size.held_in_queries) | dict.fromkeys(HELD_OUT, size.held_out_queries)
    generators = {**HELD_IN, **HELD_OUT}
    return {
        task: draw_distinct(generators[task], random.Random(f"{seed} {task} queries"), SPLIT, n)
        for task, n in counts.items()
    }


def shipped_examples(size: ZooSize, seed: int) -> list[Example]:
    """Return the examples of the query file in its order: held-in tasks and shipped compositions, mixed.

    Raises:
        ValueError: if two of them have the same prompt, so that one answer would be graded twice.
    """
    by_task = query_examples(size, seed)
    examples = [example for task in (*HELD_IN, *SHIPPED_HELD_OUT) for example in by_task[task]]
    if len({example.prompt for example in examples}) < len(examples):
        raise ValueError("two tasks share a prompt: give them different instructions in their generators")
    random.Random(f"{seed} order").shuffle(examples)
    return examples


def query_row(number: int, example: Example) -> tuple[object, ...]:
    """One row of test.csv."""
    eval_type = "multiple_choice" if example.choices else "generation"
    return number, example.prompt, eval_type, str(list(example.choices)) if example.choices else ""


def target_row(number: int, example: Example) -> tuple[object, ...]:
    """One row of test_targets.csv; the target of a multiple choice is the index of the right one."""
    target = example.choices.index(example.answer) if example.choices else example.answer
    return number, example.task, target, int(example.task in HELD_OUT)


def write_queries(folder: Path, size: ZooSize, seed: int) -> None:
    """Write both files into `folder`: the same bytes for the same size and seed."""
    examples = shipped_examples(size, seed)
    _write_csv(folder / "test.csv", QUERY_COLUMNS, (query_row(i, e) for i, e in enumerate(examples)))
    _write_csv(
        folder / "test_targets.csv", TARGET_COLUMNS, (target_row(i, e) for i, e in enumerate(examples))
    )


def _write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
