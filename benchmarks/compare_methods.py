"""Does the search beat the average, and how much does its seed matter?

`python -m benchmarks.compare_methods --seeds 0 1 2 3 4` runs the whole main job for every method and seed,
each in a process of its own, scores the answers with `benchmarks.score`, prints a line a run, and appends one
line of JSON with summary, commit, versions and machine to benchmarks/results.jsonl. Nothing else should run
meanwhile: seconds are wall-clock. Knows commands and scores, not how a method works.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.score import SCORES, TARGETS, compare, read_scores, read_table, score_tasks, summarise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results.jsonl"
MEASURES = ("held_in_N", "held_in_R", "worst_task", "held_out", "seconds", "peak_mb")
PACKAGES = ("torch", "transformers", "peft", "nevergrad", "cma", "numpy")


def run_job(method: str, seed: int, config: Path, output: Path) -> dict[str, Any]:
    """Run the main job; return its scores, wall-clock seconds and peak resident megabytes.

    Raises:
        RuntimeError: if it fails, with the end of what it printed.
    """
    command = [sys.executable, str(ROOT / "llm_merging/main.py"), "-m", method, "--config", str(config)]
    command += ["--seed", str(seed), "--output_folder", str(output)]
    started = time.monotonic()
    log_path = output.with_suffix(".log")
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)} exited with {process.returncode}: {log_path.read_text()[-2000:]}"
        )
    return {
        "method": method,
        "seed": seed,
        **score_answers(output / "test.csv"),
        **search_facts(output / method / "coefficients.json"),
        "seconds": round(time.monotonic() - started, 1),
        "peak_mb": round(usage.ru_maxrss / 1000),
    }


def score_answers(path: Path) -> dict[str, Any]:
    """Return N and R of the held-in tasks, the worst held-in task and the held-out accuracy."""
    targets = read_table(ROOT / TARGETS, ["task", "target", "held_out"])
    tasks = compare(score_tasks(read_table(path, ["prediction"]), targets), read_scores(ROOT / SCORES))
    held_in = tasks[tasks["held_out"] == 0]
    return {**summarise(tasks), "worst_task": round(float(held_in["N"].min()), 4)}


def search_facts(path: Path) -> dict[str, Any]:
    """Return what ended the search and after how many evaluations, where there was one."""
    provenance = json.loads(path.read_text())["provenance"]
    return {key: provenance[key] for key in ("evaluations", "ended_by", "winner") if key in provenance}


def describe_machine() -> dict[str, Any]:
    """Return what the seconds depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or None,
        "versions": {package: version(package) for package in PACKAGES},
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
    }


def format_run(row: dict[str, Any]) -> str:
    """One line of the table of runs, shares in percent."""
    shares = (f"{100 * row[name]:6.1f}" for name in MEASURES[:4])
    cost = f"{row['seconds']:7.0f} {row['peak_mb']:7} {row.get('ended_by', '-')}"
    return f"{row['method']:16}{row['seed']:>5} {' '.join(shares)} {cost}"


def summarise_runs(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean, least and most of each measure over the seeds, by method."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        summary[method] = {
            name: {
                "mean": round(sum(run[name] for run in own) / len(own), 4),
                "min": min(run[name] for run in own),
                "max": max(run[name] for run in own),
            }
            for name in MEASURES
        }
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_methods", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["uniform_average", "my_merge"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml")
    arguments = parser.parse_args(argv)
    print(f"{'method':16}{'seed':>5} {'N':>6} {'R':>6} {'worst':>6} {'out':>6} {'s':>7} {'MB':>7} ended by")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            for seed in arguments.seeds:
                output = Path(folder) / f"{method}-{seed}"
                runs.append(run_job(method, seed, arguments.config.absolute(), output))
                print(format_run(runs[-1]), flush=True)
    result = {
        "benchmark": "compare_methods",
        "config": arguments.config.name,
        **describe_machine(),
        "summary": summarise_runs(runs),
        "runs": runs,
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
