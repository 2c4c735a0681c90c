"""Labelled queries of one's own: what is asked, what is right, and whose task it is; read and checked.

Knows files laid out as data/test.csv and data/test_targets.csv, and adapters' names; not models or merges.
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from benchmarks.score import read_table
from llm_merging.data import COLUMNS, Query, read_queries
from search.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What is asked, and what is right."""

    queries: tuple[Query, ...]
    targets: pd.DataFrame
    """task, target and held_out, by id, in the order of `queries`."""

    @property
    def held_out(self) -> dict[str, int]:
        """Task -> 0 where an expert was trained on it, else 1; held-in tasks first."""
        kinds = self.targets.groupby("task", sort=False)["held_out"].max().astype(int)
        return {str(task): int(kind) for task, kind in kinds.sort_values(kind="stable").items()}

    @property
    def held_in(self) -> list[str]:
        """Tasks that an expert was trained on."""
        return [task for task, held_out in self.held_out.items() if not held_out]

    @property
    def sha256(self) -> str:
        """Hash of queries and targets, in their order."""
        content = repr(self.queries) + self.targets.to_csv()
        return hashlib.sha256(content.encode()).hexdigest()

    def of_tasks(self, tasks: Sequence[str]) -> "Question":
        """Return what is asked of these tasks alone."""
        return self._keep(self.targets["task"].isin(tasks))

    def first(self, n: int) -> "Question":
        """Return the first `n` queries of each task (InputError below 1)."""
        if n < 1:
            raise InputError(f"--limit-queries {n}: found {n}, expected at least 1 a task.")
        return self._keep(self.targets.groupby("task").cumcount() < n)

    def _keep(self, kept: "pd.Series[bool]") -> "Question":
        queries = tuple(query for query, keep in zip(self.queries, kept, strict=True) if keep)
        return replace(self, queries=queries, targets=self.targets[kept])

    def write_queries(self, path: Path) -> None:
        """Write the queries as the main job reads them: without targets."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerow(COLUMNS)
            for query in self.queries:
                choices = repr(list(query.answer_choices)) if query.answer_choices else ""
                writer.writerow([query.id, query.input, query.eval_type, choices])


def read_question(queries_path: Path, targets_path: Path) -> Question:
    """Read and check both files.

    Raises:
        InputError: for a damaged file, ids that one file has alone, and targets that are all held-out.
    """
    queries = read_queries(queries_path)
    targets = read_table(targets_path, ["task", "target", "held_out"])
    ids = [query.id for query in queries]
    if odd := sorted({*ids} ^ {*targets.index}):
        raise InputError(
            f"{targets_path}: {len(odd)} ids are only there or only in {queries_path}, {odd[0]!r} for one. "
            "Give each query one target."
        )
    if not targets["held_out"].isin(["0", "1"]).all():
        raise InputError(f"{targets_path}: held_out is 0 or 1 in every row.")
    question = Question(tuple(queries), targets.loc[ids])
    if not question.held_in:
        raise InputError(
            f"{targets_path}: all tasks are held-out, and N is of held-in ones. Write 0 as held_out "
            "where an adapter was trained on the task."
        )
    return question


def match_experts(asked: Sequence[str], names: Sequence[str], held_in: Sequence[str]) -> dict[str, str]:
    """Return each held-in task's adapter: as asked for ("NAME=TASK"), else the one of the task's name.

    Raises:
        InputError: for a name or task that is not there, a task with two experts, and one without.
    """
    experts: dict[str, str] = {}
    for text in dict.fromkeys(asked):
        name, _, task = text.partition("=")
        for what, word, known in (("adapter", name, names), ("held-in task", task, held_in)):
            if word not in known:
                raise InputError(
                    f"--expert {text}: there is no {what} {word!r}, only {', '.join(known)}. "
                    "Expected NAME=TASK."
                )
        if task in experts:
            raise InputError(f"--expert {text}: the task has the expert {experts[task]!r} already. Name one.")
        experts[task] = name
    experts |= {task: task for task in held_in if task in names and task not in experts}
    if missing := [task for task in held_in if task not in experts]:
        raise InputError(
            f"the held-in task {missing[0]!r} has no expert: no adapter has that name. Say whose it is with "
            f"--expert NAME={missing[0]}, or write 1 as held_out of its targets."
        )
    return experts
