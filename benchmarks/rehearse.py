"""Does the whole job end in its time box, with little of it unused? Rehearsals of main.py.

`python -m benchmarks.rehearse --config configs/dummy-7b.yaml --queries test.csv --time-box 300 --runs 3`

Each run is a fresh process (benchmarks/rehearsed_job.py, which also says how a machine is made slower), whose
seconds are counted from outside, from its start to its end. A line of JSON is kept of each, and beside them
in a folder its log, with the second at which each line came, its trace and its answers. Exit code 0 if all
runs worked, ended in time and answered everything, with 3 to 10 % of the box unused; runs that had no room
for a search, or whose search its evaluations ended, may leave more.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code
from benchmarks.environment import ROOT, describe_machine
from benchmarks.rehearsed_job import MOMENTS
from benchmarks.rows import Row, append_row, read_rows
from benchmarks.sections import replace_section
from llm_merging.evaluation import EMPTY_PREDICTION
from search.errors import InputError
from search.trace import Trace

OUT = ROOT / "benchmarks/results/rehearsals.jsonl"
DOCUMENT = ROOT / "docs/SCALING.md"
LEAST_UNUSED, MOST_UNUSED = 0.03, 0.10
PHASES = tuple(
    "imports tokenizer base adapters prompts signals references search search_ended refined finalists merged "
    "saved answers".split()
)
"""Marks in the order in which they are reached; a phase is what ends with its mark."""
NAMES = {
    "search": "rehearsal",
    "search_ended": "search",
    "refined": "refine",
    "merged": "merge",
    "saved": "fold",
}
"""What a phase is called where its mark is called otherwise."""
PATIENCE = 3
"""A run is killed after so many time boxes, and five minutes."""
TRACE = "my_merge/trace.jsonl"


def rehearse(arguments: argparse.Namespace) -> int:
    """Run all; print a table, keep the lines; return how many runs were not as they should be."""
    if not arguments.queries.exists():
        raise InputError(f"{arguments.queries}: cannot be read. Give --queries a CSV file of queries.")
    rows = []
    for number in range(arguments.runs):
        seed = arguments.seeds[number % len(arguments.seeds)]
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        kept = arguments.out.parent / "rehearsals" / f"{arguments.config.stem}-{stamp}-{number}"
        kept.mkdir(parents=True)
        print(f"run {number + 1} of {arguments.runs}, seed {seed}: {kept}/log.txt", flush=True)
        row = run_once(arguments, seed, kept)
        append_row(arguments.out, row)
        rows.append(row)
        print(show_timeline(row), flush=True)
    print("\n" + make_table(rows))
    return sum(bool(row["verdict"]) for row in rows)


def run_once(arguments: argparse.Namespace, seed: int, kept: Path) -> Row:
    """Run the job in a process of its own, and return its line."""
    with tempfile.TemporaryDirectory(prefix="concord-rehearsal-") as name:
        output, facts_path = Path(name) / "output", Path(name) / "facts.json"
        command = make_command(arguments, seed, output, facts_path)
        code, seconds = run_logged(command, kept / "log.txt", PATIENCE * arguments.time_box + 300)
        answers_path = output / arguments.queries.name
        for path in (output / TRACE, answers_path):
            if path.exists():
                shutil.copy(path, kept / path.name)
        facts = json.loads(facts_path.read_text(encoding="utf-8")) if facts_path.exists() else {}
        row = {
            "config": arguments.config.name,
            "box_s": arguments.time_box,
            "seed": seed,
            "slow_down": arguments.slow_down,
            "slow_from": arguments.slow_from if arguments.slow_down != 1 else [],
            "stall_s": arguments.stall,
            "memory_gib": arguments.memory_gib,
            "exit_code": code,
            "seconds": round(seconds, 2),
            "unused_share": round(1 - seconds / arguments.time_box, 4),
            "timeline": read_timeline(facts.get("marks", [])),
            "peak_gib": round(facts.get("peak_bytes", 0) / 2**30, 2),
            "device": facts.get("device", ""),
            **read_search(output / TRACE),
            **read_answers(answers_path, arguments.queries),
            "log": str(kept / "log.txt"),
            **describe_machine(),
        }
    return {**row, "verdict": judge(row)}


def make_command(arguments: argparse.Namespace, seed: int, output: Path, facts: Path) -> list[str]:
    """Return the command of one run."""
    held_up = ["--slow-down", arguments.slow_down, "--slow-from", *arguments.slow_from]
    held_up += ["--stall", arguments.stall, "--started", time.monotonic()]
    if arguments.memory_gib:
        held_up += ["--memory-gib", arguments.memory_gib]
    job = ["--config", arguments.config, "--dataset_filepaths", arguments.queries, "--seed", seed]
    job += ["--time-box", arguments.time_box, "--output_folder", output]
    command = [sys.executable, "-m", "benchmarks.rehearsed_job", facts, *held_up, "--", *job]
    return [str(word) for word in command]


def run_logged(command: Sequence[str], log_path: Path, most_s: float) -> tuple[int, float]:
    """Run a command, killed after `most_s`; write what it prints and when; return exit code and seconds."""
    started_s = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (
        log_path.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        killer = threading.Timer(most_s, process.kill)
        killer.start()
        log.write(" ".join(command) + "\n")
        for line in process.stdout or ():
            if line.strip():
                log.write(f"{time.monotonic() - started_s:8.2f}  {line.rstrip()}\n")
                log.flush()
        killer.cancel()
    return process.returncode, time.monotonic() - started_s


def read_timeline(marks: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Return the second at which each phase ended, by its name."""
    last = {str(name): float(seconds) for name, seconds in marks}
    first = {str(name): float(seconds) for name, seconds in reversed(marks)}
    chosen = {**last, "tokenizer": first.get("tokenizer", 0.0)}  # it is asked for again later
    return {NAMES.get(name, name): chosen[name] for name in PHASES if name in last}


def read_search(path: Path) -> dict[str, Any]:
    """Return what the trace says of the search."""
    if not path.exists():
        return {}
    trace = Trace.load(path)
    merged, refined = trace.last("merged") or {}, trace.last("refined") or {}
    judged, begun = trace.last("finalists") or {}, trace.last("search") or {}
    ended = trace.last("search_ended") or {}
    return {
        "evaluations": sum(len(generation.genomes) for generation in trace.generations),
        "generations": len(trace.generations),
        "ended_by": "no room" if trace.last("search_skipped") else merged.get("ended_by", ""),
        "winner": merged.get("winner", ""),
        "gradients": len(refined.get("losses", ())),
        "finalists": len(judged.get("names", ())),
        "finalists_on": judged.get("prompts", ""),
        "reserved_at_start_s": begun.get("reserves_s", {}),
        "reserved_at_end_s": ended.get("reserves_s", {}),
    }


def read_answers(path: Path, queries: Path) -> dict[str, int]:
    """Count queries, rows that are not empty, and placeholders among them."""
    csv.field_size_limit(sys.maxsize)
    with queries.open(encoding="utf-8", newline="") as file:
        n_queries = sum(1 for _ in csv.DictReader(file))
    predictions = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            predictions = [row["prediction"] for row in csv.DictReader(file)]
    return {
        "queries": n_queries,
        "answered": sum(bool(text.strip()) for text in predictions),
        "placeholders": sum(text == EMPTY_PREDICTION for text in predictions),
    }


def judge(row: Mapping[str, Any]) -> str:
    """Say what is wrong with a run, "" for nothing."""
    unused, may_leave_more = row["unused_share"], row.get("ended_by") in ("no room", "evaluations")
    if row["exit_code"]:
        return f"failed with exit code {row['exit_code']}"
    if row["answered"] < row["queries"]:
        return f"{row['queries'] - row['answered']} queries without an answer"
    if unused < 0:
        return f"{-unused * row['box_s']:.1f} s late"
    if unused < LEAST_UNUSED:
        return f"less than {LEAST_UNUSED:.0%} unused"
    return f"more than {MOST_UNUSED:.0%} unused" if unused > MOST_UNUSED and not may_leave_more else ""


def show_timeline(row: Row) -> str:
    """Return a line for each phase: its seconds, and when it ended."""
    lines, before = [], 0.0
    for name, at in row["timeline"].items():
        lines.append(f"  {name:<11} {at - before:8.2f} s, to {at:8.2f} s")
        before = at
    lines.append(f"  {'process':<11} {row['seconds'] - before:8.2f} s, to {row['seconds']:8.2f} s")
    reserved = ", ".join(f"{k} {v:.1f}" for k, v in row.get("reserved_at_end_s", {}).items())
    lines.append(f"  reserved when the search ended (s): {reserved}")
    return "\n".join(lines)


def make_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table, a line a run."""
    heads = [
        "config",
        "box (s)",
        "slowed",
        "stall (s)",
        "seconds",
        "unused",
        "load (s)",
        "prompts, signals (s)",
    ]
    heads += ["search (s)", "refine, finalists (s)", "answers (s)", "evaluations", "gradients", "ended by"]
    heads += ["answered", "placeholders", "peak GiB", "device", "verdict"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        at = row["timeline"]
        loaded, asked = at.get("adapters", 0.0), at.get("rehearsal", at.get("adapters", 0.0))
        searched = at.get("search", asked)
        judged, saved = at.get("finalists", searched), at.get("fold", 0.0)
        slowed = f"{row['slow_down']:g} from {', '.join(row['slow_from'])}" if row["slow_from"] else "-"
        cells = [row["config"], f"{row['box_s']:g}", slowed, f"{row['stall_s']:g}", f"{row['seconds']:.1f}"]
        cells += [f"{100 * row['unused_share']:.1f} %", f"{loaded:.1f}", f"{asked - loaded:.1f}"]
        cells += [
            f"{searched - asked:.1f}",
            f"{judged - searched:.1f}",
            f"{at.get('answers', 0) - saved:.1f}",
        ]
        cells += [str(row.get("evaluations", "-")), str(row.get("gradients", "-")), row.get("ended_by", "-")]
        cells += [f"{row['answered']} of {row['queries']}", str(row["placeholders"])]
        cells += [f"{row['peak_gib']:.1f}", row["device"], row["verdict"] or "in time"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(out: Path, document: Path = DOCUMENT) -> int:
    """Put the table of all runs so far into the document, where it has the markers; return 0."""
    if document.exists() and "<!-- rehearsals:begin -->" in document.read_text(encoding="utf-8"):
        replace_section(document, "rehearsals", make_table(read_rows(out)))
        print(f"written: {document}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rehearse", description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/dummy-tiny.yaml")
    parser.add_argument("--queries", type=Path, default=ROOT / "data/test.csv")
    parser.add_argument("--time-box", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--slow-down", type=float, default=1.0, metavar="F", help="times as long, 1 or more")
    parser.add_argument("--slow-from", nargs="+", choices=MOMENTS, default=["start"], help="each multiplies")
    parser.add_argument(
        "--stall", type=float, default=0.0, metavar="SECONDS", help="before the base is loaded"
    )
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="cap on the device's memory")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines; logs lie beside (%(default)s)")
    parser.add_argument("--report", action="store_true", help="write the table of all lines, run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; return 0, 1 if a run was not as it should be, 2 for bad input, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    if arguments.report:
        return exit_code(lambda: write_report(arguments.out))
    return exit_code(lambda: 1 if rehearse(arguments) else 0)


if __name__ == "__main__":
    sys.exit(main())
