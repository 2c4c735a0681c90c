"""Run things in processes of their own, each pinned to its own cores: the main job, whose answers it scores.

Knows commands, cores and files; not which runs are wanted or how a method works.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd

from benchmarks.environment import ROOT
from benchmarks.score import TARGETS, compare, read_scores, read_table, score_tasks, summarise
from llm_merging.merging.updates import MERGE_FILE
from search.errors import InputError
from search.recorded import COEFFICIENTS_FILE, TRACE_FILE
from search.trace import Trace

LOG_LETTERS = 2000
"""How much of the end of a failed run's log is kept."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
DONE_LINE = re.compile(r"^done in .*?(?:search ended by (\w+))?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the main job."""

    method: str
    experts: str
    """Name of the expert set that `config` lists."""
    seed: int
    config: Path
    scores: Path
    """Accuracies of base and experts, as benchmarks.score reads them."""
    held_in: tuple[str, ...]
    """The tasks that its experts can be asked for."""


Wanted = TypeVar("Wanted")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Wanted]):
    """What became of a job: measures, or how it failed."""

    job: Wanted
    measures: dict[str, Any]
    failure: str = ""


def split_cores(available: Sequence[int], n_jobs: int, n_cores: int) -> list[set[int]]:
    """Return disjoint sets of `n_cores` cores, one for each of `n_jobs` jobs at a time.

    Raises:
        InputError: if there are not so many cores.
    """
    if n_jobs < 1 or n_cores < 1 or n_jobs * n_cores > len(available):
        raise InputError(
            f"{n_jobs} jobs of {n_cores} cores each do not fit on {len(available)} cores. "
            "Choose fewer --jobs or --cores, at least 1 of each."
        )
    cores = sorted(available)
    return [set(cores[start : start + n_cores]) for start in range(0, n_jobs * n_cores, n_cores)]


def run_pinned(
    jobs: Sequence[Wanted],
    core_sets: Sequence[set[int]],
    folder: Path,
    run: Callable[[Wanted, Path, set[int]], Outcome[Wanted]],
) -> Iterator[Outcome[Wanted]]:
    """Run jobs, one on each set of cores at a time; yield each as it ends, whether it worked or not.

    Args:
        run: a job, a folder for it alone, and a set that has the ids of its processes while they run.
    """
    free: SimpleQueue[set[int]] = SimpleQueue()
    for cores in core_sets:
        free.put(cores)

    def pin() -> None:
        os.sched_setaffinity(0, free.get())  # of this thread alone; the processes it starts inherit it

    running: set[int] = set()
    with ThreadPoolExecutor(len(core_sets), initializer=pin) as pool:
        futures = [pool.submit(run, job, folder / f"run-{i}", running) for i, job in enumerate(jobs)]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:  # nothing waits or runs but after Ctrl-C or SIGTERM
            pool.shutdown(wait=False, cancel_futures=True)
            for pid in list(running):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def run_job(job: Job, output: Path, running: set[int]) -> Outcome[Job]:
    """Run one job on the cores of this thread; return its measures and cost, or how it failed.

    Args:
        running: has the process's id while it runs.
    """
    command = [sys.executable, str(ROOT / "llm_merging/main.py"), "-m", job.method]
    command += ["--config", str(job.config), "--seed", str(job.seed), "--output_folder", str(output)]
    log_text, cost, failure = run_process(command, output.with_suffix(".log"), running)
    if failure:
        return Outcome(job, cost, failure)
    try:
        answers = score_answers(output / "test.csv", job.scores, job.held_in)
        return Outcome(job, {**answers, **search_facts(output / job.method, log_text), **cost})
    except InputError as error:
        return Outcome(job, cost, f"{error}")
    finally:
        shutil.rmtree(output)  # megabytes a run


def run_process(
    command: Sequence[str],
    log_path: Path,
    running: set[int],
    environment: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, float], str]:
    """Run a command in the checkout, on the cores of this thread.

    Args:
        environment: `job_environment` when None, which has no GPU.

    Returns:
        What it wrote, its `seconds` and `peak_mb`, and how it failed, "" if it did not.
    """
    started_s = time.monotonic()
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment or job_environment(), stdout=log, stderr=subprocess.STDOUT
        )
        running.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        running.discard(process.pid)
    seconds = round(time.monotonic() - started_s, 1)
    process.returncode = os.waitstatus_to_exitcode(status)
    log_text = log_path.read_text(encoding="utf-8", errors="replace")
    cost = {"seconds": seconds, "peak_mb": round(usage.ru_maxrss / 1000)}
    failure = f"{' '.join(command)} exited with {process.returncode}: {log_text[-LOG_LETTERS:]}"
    return log_text, cost, failure if process.returncode else ""


def job_environment(overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return an environment with a thread for each core of this thread's affinity.

    Without a GPU, unless the overrides ask for one: what is timed on cores must not find one by itself.
    """
    n_cores = str(len(os.sched_getaffinity(0)))
    hidden = {} if any(text.startswith("device=cuda") for text in overrides) else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, n_cores), **hidden}


def score_answers(path: Path, scores: Path, held_in: Sequence[str]) -> dict[str, Any]:
    """Return N and R over the named held-in tasks, the worst, the held-out accuracy and each task's."""
    targets = read_table(ROOT / TARGETS, ["task", "target", "held_out"])
    return measure_tasks(score_tasks(read_table(path, ["prediction"]), targets), scores, held_in)


def measure_tasks(tasks: pd.DataFrame, scores: Path, held_in: Sequence[str]) -> dict[str, Any]:
    """Return the same of tasks, indexed by name, with `accuracy` and `held_out`."""
    found = compare(tasks, read_scores(scores))
    counted = found[(found["held_out"] == 1) | found.index.isin(held_in)]
    own = counted.loc[counted["held_out"] == 0, "N"]
    return {
        **summarise(counted),
        "worst_task": round(float(own.min()), 4),
        "worst_name": str(own.idxmin()),
        "tasks": {str(task): round(float(value), 4) for task, value in found["accuracy"].items()},
    }


def search_facts(folder: Path, log: str) -> dict[str, Any]:
    """Return what is known of a search: its evaluations and end, its seconds, and where its merge lies."""
    facts: dict[str, Any] = {}
    records = [path for name in (COEFFICIENTS_FILE, MERGE_FILE) if (path := folder / name).exists()]
    document = json.loads(records[0].read_text(encoding="utf-8")) if records else {}
    provenance = document.get("provenance", {})
    facts |= {key: provenance[key] for key in ("evaluations", "winner") if key in provenance}
    if (done := DONE_LINE.search(log)) and done[1]:
        facts["ended_by"] = done[1]
    trace_path = folder / TRACE_FILE
    if trace_path.exists() and (generations := Trace.load(trace_path).generations):
        facts["search_s"] = round(sum(generation.seconds for generation in generations), 1)
    if "coefficients" in document:
        names = [adapter["name"] for adapter in document["adapters"]]
        means = np.abs(np.asarray(document["coefficients"])).mean(axis=0).round(4)
        facts["mean_abs_coefficients"] = dict(zip(names, means.tolist(), strict=True))
    return facts
