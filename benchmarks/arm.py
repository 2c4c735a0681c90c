"""Run one arm of a study: the whole search, then the true accuracy of what it found, at checkpoints too.

`python -m benchmarks.arm CONFIG --experts mixed --out measures.json` runs `run_search` as it is shipped, and
holds against the labels what it returned and what it would have returned at each checkpoint. Knows one run,
not what it is compared with.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.labels import ZOO_SEED, Labels
from benchmarks.replay import NO_LIMIT_S, Replay, Stop, count_gradients, stop_by
from benchmarks.truth import Truth
from benchmarks.zoo.queries import SHIPPED_HELD_OUT, query_examples
from benchmarks.zoo.sizes import SHIPPED
from benchmarks.zoo.tasks import HELD_IN
from search.base import LoadedBase, load_base
from search.config import SearchConfig, load_config
from search.outcome import RunResult
from search.recorded import TRACE_FILE
from search.run import run_search
from search.setup import Setup, load_setup
from search.skeleton import parse_skeleton
from search.space import FloatArray
from search.timebox import PROCESS_END_S, SPARE_SHARE
from search.trace import Trace

SHARES = "held_in_N", "worst_task", "held_out"
"""What is measured of a merge at a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where a search is looked at, and which seconds end it."""

    seconds: tuple[float, ...] = ()
    """Of search; the last of them end it."""
    tokens: tuple[int, ...] = ()
    evaluations: tuple[int, ...] = ()

    @property
    def limit_s(self) -> float | None:
        """Seconds that the search has; None where evaluations end it."""
        return max(self.seconds, default=None)

    @property
    def looked_at(self) -> list[tuple[str, float]]:
        """Clock and reading of each, without the end of the search."""
        seconds = sorted(self.seconds)[:-1]
        clocks = {"seconds": seconds, "n_tokens": self.tokens, "evaluations": self.evaluations}
        return [(clock, at) for clock, readings in clocks.items() for at in sorted(readings)]


class Accuracy:
    """The shares of right answers of merges; equal merges are measured once."""

    def __init__(self, experts: str, setup: Setup, n_queries: int | None) -> None:
        """Take at most `n_queries` of the shipped queries a task."""
        self._labels, self._model = Labels(experts, setup, 0), setup.parts.model
        examples = query_examples(SHIPPED, ZOO_SEED)
        shipped = {task: examples[task][:n_queries] for task in (*HELD_IN, *SHIPPED_HELD_OUT)}
        self._truth = Truth(setup.parts.base.tokenizer, shipped, str(self._model.device))
        self._known: dict[bytes, dict[str, Any]] = {}

    def measure(self, table: FloatArray) -> dict[str, Any]:
        """Return the quality benchmark's measures of coefficients (n_groups, n_adapters)."""
        key = np.ascontiguousarray(table).tobytes()
        if key not in self._known:
            marks = self._truth.marks(self._model, self._labels.weights(table))
            self._known[key] = self._labels.summarise(marks.accuracy)
        return self._known[key]

    def shares(self, table: FloatArray) -> dict[str, float]:
        """Return those of SHARES alone."""
        measures = self.measure(table)
        return {name: measures[name] for name in SHARES}


def measure_search(
    config: SearchConfig, experts: str, checkpoints: Checkpoints, n_queries: int | None, folder: Path
) -> dict[str, Any]:
    """Run the search and measure it: at its end, and at each checkpoint that it went past."""
    source = config.base
    base = load_base(source.source, revision=source.revision, device=config.device, dtype=source.dtype)
    if checkpoints.limit_s is not None:
        config = fit_time_box(config, checkpoints.limit_s, base, folder / "rehearsal")
    result = run_search(config, output=folder / "run", base=base)
    trace = Trace.load(folder / "run" / TRACE_FILE)
    setup = load_setup(config, base)
    accuracy = Accuracy(experts, setup, n_queries)
    measures = {**accuracy.measure(result.coefficients), **describe_search(trace, result)}
    measures |= {**describe_answers(trace, config), "checkpoints": []}
    stops = [(clock, at, stop_by(trace, clock, at)) for clock, at in checkpoints.looked_at]
    replay = Replay(setup, trace, folder) if any(stop for *_, stop in stops) else None
    for clock, at, stop in stops:
        if replay and stop:
            shares = {name: accuracy.shares(table) for name, table in replay.tables_at(stop).items()}
            measures["checkpoints"].append({"clock": clock, "at": at, **stop.clocks(trace), **shares})
    return measures


def measure_reference(config: SearchConfig, experts: str, name: str, n_queries: int | None) -> dict[str, Any]:
    """Measure the "uniform" or the "balanced" merge, which need no search."""
    setup = load_setup(config)
    n_adapters = len(setup.parts.names)
    row = {"uniform": np.full(n_adapters, 1 / n_adapters), "balanced": setup.balanced}[name]
    table = np.broadcast_to(row, setup.parts.shape).copy()
    return {**Accuracy(experts, setup, n_queries).measure(table), "evaluations": 0, "n_tokens": 0}


def fit_time_box(config: SearchConfig, limit_s: float, base: LoadedBase, folder: Path) -> SearchConfig:
    """Return the configuration with a time box that leaves so many seconds for search and refinement.

    What the rest takes on this machine is measured on a run of one generation and one gradient step.
    """
    settings = config.search
    steps = min(1, settings.gradient.refine_steps)
    gradient = settings.gradient.model_copy(update={"refine_steps": steps})
    short = {"time_box_s": NO_LIMIT_S, "max_evaluations": settings.n_candidates, "gradient": gradient}
    run_search(_with_search(config, **short), output=folder, base=base)
    trace = Trace.load(folder / TRACE_FILE)
    begun = trace.last("search") or {}
    kept_s = begun["reserves_s"]  # the refinement's is searched in, and what is spare grows with the box
    rest_s = NO_LIMIT_S - begun["left_s"] - kept_s["refine"] - kept_s["spare"]
    return _with_search(config, time_box_s=(rest_s + limit_s + PROCESS_END_S) / (1 - SPARE_SHARE))


def _with_search(config: SearchConfig, **settings: Any) -> SearchConfig:
    return config.model_copy(update={"search": config.search.model_copy(update=settings)})


def describe_search(trace: Trace, result: RunResult) -> dict[str, Any]:
    """Return what search and refinement spent, what ended the search, and what it steered by."""
    clocks = Stop(len(trace.generations), count_gradients(trace)).clocks(trace)
    prompts, signals = trace.last("prompts") or {}, trace.last("signals") or {}
    return {
        "search_s": clocks.pop("seconds"),
        **clocks,
        "refined_s": round((trace.last("refined") or {}).get("seconds", 0.0), 2),
        "generations": len(trace.generations),
        "ended_by": result.ended_by,
        "winner": result.winner,
        "loss": round(result.loss, 4),
        "weak": signals["weak"],
        "prompt_tokens": sum(len(prompt["ids"]) for prompt in prompts["searched"]),
        "prompts_s": round(prompts["seconds"], 1),
    }


def describe_answers(trace: Trace, config: SearchConfig) -> dict[str, Any]:
    """Return how alike the answers to an adapter's prompts are, searched and unseen, where it has skeletons.

    `answers_top_share` is the share of the most frequent answer, `answers_distinct` how many there are.
    """
    event = trace.last("prompts") or {}
    counts = {
        adapter.name: Counter(
            answer_of(prompt["text"], adapter.skeletons)
            for prompt in (*event["searched"], *event["unseen"])
            if prompt["expert"] == adapter.name
        )
        for adapter in config.adapters
        if adapter.skeletons
    }
    known = {name: count for name, count in counts.items() if count}
    return {
        "answers_top_share": {n: round(c.most_common(1)[0][1] / c.total(), 4) for n, c in known.items()},
        "answers_distinct": {name: len(count) for name, count in known.items()},
    }


def answer_of(text: str, skeletons: Sequence[str]) -> str:
    """Return what a prompt's text has after the cue of one of the skeletons that it was written from."""
    cues = [parse_skeleton(skeleton).literals[-1] for skeleton in skeletons]
    ends = [text.find(cue) + len(cue) for cue in cues if cue in text]
    return text[max(ends, default=0) :].strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Run one arm and write its measures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--experts", default="mixed", help="whose expert set the configuration lists")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--seconds", nargs="*", type=float, default=[], help="checkpoints; the last end it")
    parser.add_argument("--tokens", nargs="*", type=int, default=[], help="checkpoints")
    parser.add_argument("--evaluations", nargs="*", type=int, default=[], help="checkpoints")
    parser.add_argument("--queries", type=int, help="at most so many a task (all shipped ones)")
    parser.add_argument("--reference", choices=("uniform", "balanced"), help="in place of a search")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    experts, n_queries = arguments.experts, arguments.queries
    if arguments.reference:
        measures = measure_reference(config, experts, arguments.reference, n_queries)
    else:
        points = {name: tuple(getattr(arguments, name)) for name in ("seconds", "tokens", "evaluations")}
        with TemporaryDirectory() as folder:
            measures = measure_search(config, experts, Checkpoints(**points), n_queries, Path(folder))
    arguments.out.write_text(json.dumps(measures), encoding="utf-8")


if __name__ == "__main__":
    main()
