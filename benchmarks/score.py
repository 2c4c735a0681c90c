"""How good are the predictions, per task, against the base and the experts?

`python -m benchmarks.score output/test.csv` compares predictions with targets that no part of the method
reads: exact match after stripping, which for multiple choice compares the index of the choice. With A the
accuracy of the merge, B that of the base and E that of a task's own expert it prints A, N = A / E (flatters a
strong base) and R = (A - B) / (E - B) (what was recovered), per task and as means over tasks, then all of it
as one line of JSON.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from search.errors import InputError

TARGETS = Path("data/test_targets.csv")
SCORES = Path("data/zoo/scores.json")
QUERIES = Path("data/test.csv")


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV as text (a prediction may be the word None), indexed by its unique ids.

    Raises:
        InputError: if the file, a column or the uniqueness of the ids is missing.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # not UTF-8, empty and broken files are ValueErrors
        raise InputError(f"{path}: cannot be read as CSV: {str(error).splitlines()[0]}") from error
    missing = [column for column in ("id", *columns) if column not in table]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; found {', '.join(table.columns)}.")
    twice = table["id"][table["id"].duplicated()]
    if len(twice):
        raise InputError(f"{path}: the id {twice.iloc[0]!r} is there twice.")
    return table.set_index("id")


def match_ids(path: Path, found: pd.Index, wanted: pd.Index, wanted_in: Path) -> None:
    """Refuse ids that are missing or too many (InputError)."""
    for ids, what in ((wanted.difference(found), "lacks"), (found.difference(wanted), "has")):
        if len(ids):
            raise InputError(
                f"{path} {what} {len(ids)} ids that {wanted_in} {'has' if what == 'lacks' else 'lacks'}, "
                f"{ids[0]!r} for one. Score the predictions of the same query file."
            )


def score_tasks(predictions: pd.DataFrame, targets: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy, count and held_out per task, held-in tasks first."""
    rows = targets.assign(
        right=predictions["prediction"].reindex(targets.index).str.strip() == targets["target"].str.strip(),
        held_out=targets["held_out"].astype(int),
    )
    tasks = rows.groupby("task").agg(
        n=("right", "size"), accuracy=("right", "mean"), held_out=("held_out", "max")
    )
    return tasks.sort_values("held_out", kind="stable")


def compare(tasks: pd.DataFrame, scores: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Add base, expert, N and R per task; NaN where unknown or divided by zero."""
    base = pd.Series(scores.get("base", {}), dtype=float).reindex(tasks.index)
    expert = pd.Series(scores.get("experts", {}), dtype=float).reindex(tasks.index)
    above_base = expert - base
    return tasks.assign(
        base=base,
        expert=expert,
        N=(tasks["accuracy"] / expert).where(expert > 0),
        R=((tasks["accuracy"] - base) / above_base).where(above_base.abs() > 0),
    )


def summarise(tasks: pd.DataFrame) -> dict[str, float | None]:
    """Means over tasks: accuracies of held-in and held-out, N and R of held-in; None if unknown."""
    held_in, held_out = tasks[tasks["held_out"] == 0], tasks[tasks["held_out"] == 1]
    means = {
        "held_in": held_in["accuracy"].mean(),
        "held_out": held_out["accuracy"].mean(),
        "held_in_base": held_in["base"].mean(),
        "held_out_base": held_out["base"].mean(),
        "held_in_N": held_in["N"].mean(),
        "held_in_R": held_in["R"].mean(),
    }
    return {name: _rounded(value) for name, value in means.items()}


def by_eval_type(predictions: pd.DataFrame, targets: pd.DataFrame, queries: pd.DataFrame) -> dict[str, float]:
    """Accuracy over the rows of each eval_type."""
    right = predictions["prediction"].reindex(targets.index).str.strip() == targets["target"].str.strip()
    means = right.groupby(queries["eval_type"].reindex(targets.index)).mean()
    return {str(name): round(float(value), 4) for name, value in means.items()}


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """Read {"base": {task: accuracy}, "experts": {task: its own expert's}}, accuracies from 0 to 1."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error


def asked_or_default(asked: Path | None, default: Path) -> Path | None:
    """Return what was asked for, which must then exist, or the default where it exists."""
    return asked or (default if default.exists() else None)


def format_table(tasks: pd.DataFrame) -> str:
    """A table with one line a task, accuracies in percent."""
    shown = tasks[["n", "accuracy", "base", "expert", "N", "R"]].copy()
    shown[["accuracy", "base", "expert", "N", "R"]] *= 100
    shown.insert(0, "kind", tasks["held_out"].map({0: "held-in", 1: "held-out"}))
    return shown.to_string(float_format=lambda value: f"{value:.1f}", na_rep="-")


def score(arguments: argparse.Namespace) -> None:
    """Read, compare, print the table and the JSON line."""
    targets = read_table(arguments.targets, ["task", "target", "held_out"])
    if not targets["held_out"].isin(["0", "1"]).all():
        raise InputError(f"{arguments.targets}: held_out is 0 or 1 in every row.")
    predictions = read_table(arguments.predictions, ["prediction"])
    match_ids(arguments.predictions, predictions.index, targets.index, arguments.targets)
    scores_path = asked_or_default(arguments.expert_scores, SCORES)
    tasks = compare(score_tasks(predictions, targets), read_scores(scores_path) if scores_path else {})
    result = {"predictions": str(arguments.predictions), "n": len(targets), **summarise(tasks)}
    if queries_path := asked_or_default(arguments.queries, QUERIES):
        queries = read_table(queries_path, ["eval_type"])
        match_ids(queries_path, queries.index, targets.index, arguments.targets)
        result["eval_types"] = by_eval_type(predictions, targets, queries)
    result["tasks"] = {
        task: {name: _rounded(row[name]) for name in ("accuracy", "base", "expert", "N", "R")}
        for task, row in tasks.iterrows()
    }
    print(format_table(tasks))
    print(json.dumps(result, allow_nan=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, score, and turn bad input into one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score", description=__doc__.splitlines()[0])
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.csv")
    parser.add_argument(
        "--targets", type=Path, default=TARGETS, help="id, task, target, held_out (default %(default)s)"
    )
    parser.add_argument(
        "--expert-scores", type=Path, help=f"accuracies of base and experts (default {SCORES})"
    )
    parser.add_argument("--queries", type=Path, help=f"for accuracy by eval_type (default {QUERIES})")
    try:
        score(parser.parse_args(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


if __name__ == "__main__":
    sys.exit(main())
