"""A small finished run of the main job, answers included, for the tests of what is done with such a run."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llm_merging import main as program
from tests.test_merges import save_toy_zoo

RUN = "output/my_merge"
QUERIES = [
    ["id", "input", "eval_type", "answer_choices"],
    ["first", "a, b?", "generation", ""],
    ["2", "which", "multiple_choice", "['a', 'b']"],
    ["third", "say\nmore", "generation", ""],
]
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "base": "base",
    "adapters": "adapters",
    "search": {
        "max_evaluations": 18,
        "n_candidates": 6,
        "n_finalists": 3,
        "time_box_s": 86400,  # from the import of the program on: a suite of tests takes a while
        "race_keep": 0.5,
        "gradient": {"refine_steps": 2},
    },
    "prompts": {"per_adapter": 2, "unseen_per_adapter": 2, "max_new_tokens": 8},
    "objective": {"weak_signal_nats": 100},  # all stay near the balanced merge: no single expert wins
}


def make_work(folder: Path, **search: Any) -> Path:
    """Lay out base, adapters, queries and a configuration with relative paths; return the folder."""
    save_toy_zoo(folder)
    settings = {**SETTINGS, "search": {**SETTINGS["search"], **search}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with (folder / "queries.csv").open("w", newline="") as file:
        csv.writer(file).writerows(QUERIES)
    return folder


def run_job(folder: Path, *arguments: str) -> int:
    """Run the main job in the folder; return its exit code."""
    before = Path.cwd()
    try:
        os.chdir(folder)
        defaults = ["--config", "config.yaml", "--dataset_filepaths", "queries.csv"]
        return program.main([*defaults, *arguments])
    finally:
        os.chdir(before)


def copy_work(folder: Path, to: Path) -> Path:
    """Copy a folder with its run, whose trace then says that it was made there; return the run's folder."""
    shutil.copytree(folder, to)
    trace = to / RUN / "trace.jsonl"
    trace.write_text(trace.read_text().replace(json.dumps(str(folder)), json.dumps(str(to)), 1))
    return to / RUN


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=1) + "\n")


def edit_line(run: Path, kind: str, change: Callable[[dict[str, Any]], Any], place: int = 0) -> None:
    """Change a line of a run's trace: the header, an event by its name, or a generation by its place."""
    path = run / "trace.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change([line for line in lines if kind in (line["kind"], line.get("event"))][place])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
