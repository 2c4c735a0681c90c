"""The main job in this process, on a machine made smaller or slower, with notes of when what happened.

`python -m benchmarks.rehearsed_job FACTS.json --slow-down 2 --slow-from search -- --time-box 300`

Knows where the job can be held up; not what becomes of the notes. A slow-down of F sleeps F - 1 times as long
as each forward pass of the model, each gradient and each replayed step of an answer took, the device waited
for before and after: the work is the same, the seconds are those of a slower card. Loading, tokenizing, the
optimiser and disks keep their speed.
"""

import argparse
import json
import resource
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT
from llm_merging.model import writing
from search import phases, run, trace
from search.timebox import seconds_of_process

MOMENTS = ("start", "search", "answers")
"""When a slow-down begins: at once, in the middle of the search's time, with the answers."""


class Slowness:
    """How much slower the machine is by now, and the waiting."""

    def __init__(self, factor: float, moments: Sequence[str]) -> None:
        self.factor, self.moments = factor, moments
        self._begun: set[str] = set()
        self._search_half_s = float("inf")
        self._depth = 0
        self.reach("start")

    def reach(self, moment: str) -> None:
        """Slow down from now on, if that was asked for at this moment."""
        if moment in self.moments:
            self._begun.add(moment)

    def search_begins(self, left_s: float) -> None:
        """Slow down after half of the search's seconds, if that was asked for."""
        self._search_half_s = time.monotonic() + left_s / 2

    def now(self) -> float:
        """Return the factor of this moment: each begun slow-down multiplies."""
        if time.monotonic() > self._search_half_s:
            self.reach("search")
        return float(self.factor ** len(self._begun))

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Make what is inside take longer; what is inside of that again is not made longer twice."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        factor = 1.0 if self._depth or capturing or not self.moments else self.now()
        if factor == 1.0:
            yield
            return
        wait_for_device()
        started_s, self._depth = time.monotonic(), self._depth + 1
        try:
            yield
            wait_for_device()
        finally:
            self._depth -= 1
            time.sleep((factor - 1) * (time.monotonic() - started_s))

    def hold_up(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, held up."""

        @wraps(function)
        def slower(*args: Any, **kwargs: Any) -> Any:
            with self.held_up():
                return function(*args, **kwargs)

        return slower


def wait_for_device() -> None:
    """Wait until a CUDA device has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Notes:
    """Seconds since the process began at which something was reached, and the most memory."""

    def __init__(self, started_s: float) -> None:
        """Take the reading of time.monotonic when the process began."""
        self._started_s = started_s
        self.marks: list[tuple[str, float]] = []
        self._peak_bytes = 0
        if torch.cuda.is_available():
            self._reset = torch.cuda.reset_peak_memory_stats
            torch.cuda.reset_peak_memory_stats = self._keep_and_reset

    def mark(self, name: str) -> None:
        """Note that something is done, and say so."""
        self.marks.append((name, round(time.monotonic() - self._started_s, 2)))
        self.tell(name)

    def tell(self, text: str) -> None:
        """Say something, and when."""
        seconds = time.monotonic() - self._started_s
        print(f"[{seconds:8.2f} s] {text}", file=sys.stderr, flush=True)

    def after(self, owner: Any, attribute: str, name: str) -> None:
        """Note when a function, an attribute of `owner`, has returned."""
        function = getattr(owner, attribute)

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.mark(name)
            return result

        setattr(owner, attribute, noted)

    def peak_bytes(self) -> int:
        """Return the most memory: allocated on the device, else of the process."""
        if torch.cuda.is_available():
            return max(self._peak_bytes, torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _keep_and_reset(self, *args: Any, **kwargs: Any) -> None:
        self._peak_bytes = self.peak_bytes()
        self._reset(*args, **kwargs)


def limit_memory(gib: float) -> None:
    """Cap what this process may allocate on the device; a device with less is left as it is."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), 0)


def hold_up_job(slow: Slowness, notes: Notes, stall_s: float) -> None:
    """Put waiting and notes into the job's own modules."""
    merges = import_module("llm_merging.merging.Merges")
    load_base = merges.load_base

    def stalled(*args: Any, **kwargs: Any) -> Any:
        time.sleep(stall_s)
        loaded = load_base(*args, **kwargs)
        notes.mark("base")
        if slow.moments:
            loaded.model.forward = slow.hold_up(loaded.model.forward)
        return loaded

    merges.load_base = stalled  # type: ignore[attr-defined]
    if slow.moments:
        torch.autograd.grad = slow.hold_up(torch.autograd.grad)
        record = writing._record
        writing._record = lambda step: slow.hold_up(record(step))
    notes.after(merges.Merges, "_load_tokenizer", "tokenizer")
    notes.after(merges.Merges, "check_adapters", "adapters checked")
    notes.after(run, "load_setup", "adapters")
    save_model = merges.Merges.save_model

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        save_model(self, *args, **kwargs)
        notes.mark("saved")
        slow.reach("answers")

    merges.Merges.save_model = saved


def follow_search(slow: Slowness, notes: Notes) -> None:
    """Note what the trace is told, and when the search begins."""
    search = phases.Phases._search

    def timed_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        slow.search_begins(self._box.left_s())
        return search(self, *args, **kwargs)

    phases.Phases._search = timed_search
    write_event = trace.TraceWriter.event

    def noted_event(self: Any, event: str, /, **content: Any) -> None:
        write_event(self, event, **content)
        if event != "out_of_memory":
            notes.mark(event)

    trace.TraceWriter.event = noted_event
    write_generation = trace.TraceWriter.generation

    def told_generation(self: Any, generation: Any) -> None:
        write_generation(self, generation)
        best = min(generation.losses)
        notes.tell(f"generation {generation.index}: {generation.seconds:.2f} s, best {best:.4f}")

    trace.TraceWriter.generation = told_generation


def main(argv: Sequence[str]) -> None:
    """Run the job; its exit code is this process's."""
    own, job = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rehearsed_job", description=__doc__)
    parser.add_argument("facts", type=Path, help="JSON file to write")
    parser.add_argument("--slow-down", type=float, default=1.0)
    parser.add_argument("--slow-from", nargs="+", choices=MOMENTS, default=["start"])
    parser.add_argument("--stall", type=float, default=0.0)
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--started", type=float, help="time.monotonic() of whoever began the process")
    arguments = parser.parse_args(own)
    if arguments.memory_gib:
        limit_memory(arguments.memory_gib)
    moments = arguments.slow_from if arguments.slow_down != 1 else ()
    age_s = seconds_of_process()
    started_s = time.monotonic() - age_s if arguments.started is None else arguments.started
    slow, notes = Slowness(arguments.slow_down, moments), Notes(started_s)
    notes.tell(f"of the process's own account {age_s:.2f} s")
    notes.mark("imports")
    hold_up_job(slow, notes, arguments.stall)
    follow_search(slow, notes)
    sys.argv = [str(ROOT / "llm_merging/main.py"), *job]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        notes.mark("answers")
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        facts = {"marks": notes.marks, "peak_bytes": notes.peak_bytes(), "device": device}
        arguments.facts.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
