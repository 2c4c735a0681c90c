"""Does a prior save time? Seconds of search to the loss that a minute without a prior reaches, over seeds.

`python -m benchmarks.bench_priors PRIOR... --seeds 0 1 2 3 4 5 6 7 8 9` searches `configs/demo.yaml` for
--seconds without a prior and with each of the given ones, on the same prompts, and prints which share of the
time each took to the loss that the first ended with. Appends one line of JSON to benchmarks/results.jsonl.
Knows searches and priors, not how one is learnt.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import RESULTS, ROOT, describe_machine
from search.config import SearchConfig, load_config
from search.loop import SearchTools
from search.planning import choose_optimizer, set_limits
from search.resume import Record
from search.setup import Setup, load_setup
from search.stages import StagedSearch, run_stages
from search.steering import Steering
from search.timebox import TimeBox
from search.trace import Trace, TraceWriter

NO_LIMIT = 10**6


def compare_starts(
    seed: int, config: SearchConfig, priors: Sequence[str], seconds: float, threads: int
) -> list[dict[str, Any]]:
    """Search without a prior and with each, on the same prompts, for so many seconds."""
    torch.set_num_threads(threads)
    neutral = with_settings(config, seed=seed)
    setup = load_setup(neutral)
    rows = []
    with tempfile.TemporaryDirectory() as folder, TraceWriter(Path(folder) / "prompts.jsonl") as trace:
        trace.header({})
        prompts = setup.write_prompts(trace, Record())
        steering = setup.steer(prompts, trace, Record())
        for prior in [None, *priors]:
            started = load_setup(with_settings(neutral, prior=prior), setup.parts.base)
            path = Path(folder) / "search.jsonl"
            search_for(started, steering, seconds, path)
            rows.append({"seed": seed, "prior": prior and Path(prior).stem, **read_seconds(Trace.load(path))})
    return [compare_to_neutral(row, rows[0]) for row in rows]


def with_settings(config: SearchConfig, **settings: Any) -> SearchConfig:
    """Return a configuration with other settings of the search."""
    return config.model_copy(update={"search": config.search.model_copy(update=settings)})


def search_for(setup: Setup, steering: Steering, seconds: float, path: Path) -> None:
    """Search from the setup's start into a trace, for so many seconds."""
    settings = setup.config.search.model_copy(update={"max_evaluations": NO_LIMIT})
    with TraceWriter(path) as trace:
        trace.header({})
        search = StagedSearch(
            stages=setup.plan(steering),
            choice=choose_optimizer(settings),
            limits=set_limits(settings),
            evaluator=steering.searched,
            search_s=seconds,
            past_of=Record().past,
            inject_every=0,
            improve=lambda mean: mean,
        )
        tools = SearchTools(trace=trace, timebox=TimeBox(seconds))
        run_stages(search, steering.confine(setup.first.start), setup.first.spread, tools)


def read_seconds(trace: Trace) -> dict[str, list[float]]:
    """Return seconds, and the best loss on all prompts by then, after each generation."""
    full = [g.losses[g.rungs[-1]["candidates"]] for g in trace.generations]
    best = np.minimum.accumulate([np.nanmin(losses) for losses in full])
    return {"seconds": [g.elapsed_s for g in trace.generations], "best": best.tolist()}


def compare_to_neutral(row: dict[str, Any], neutral: dict[str, Any]) -> dict[str, Any]:
    """Return which share of the neutral search's seconds this one took to its last loss, None for never."""
    goal, whole_s = neutral["best"][-1], neutral["seconds"][-1]
    reached = [s for s, loss in zip(row["seconds"], row["best"], strict=True) if loss <= goal]
    share = round(reached[0] / whole_s, 4) if reached else None
    ends = {"first_loss": round(row["best"][0], 4), "loss": round(row["best"][-1], 4)}
    return {"seed": row["seed"], "prior": row["prior"], **ends, "share_of_time": share}


def summarise_priors(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return median, least and most over seeds for each prior; a goal never reached counts as infinite."""
    summary = []
    for prior in dict.fromkeys(row["prior"] for row in rows):
        own = [row for row in rows if row["prior"] == prior]
        shares = [np.inf if row["share_of_time"] is None else row["share_of_time"] for row in own]
        losses = [row["loss"] for row in own]
        summary.append(
            {
                "prior": prior,
                "n_seeds": len(own),
                "share_of_time": [round(float(f(shares)), 4) for f in (np.median, np.min, np.max)],
                "loss": [round(float(f(losses)), 4) for f in (np.median, np.min, np.max)],
            }
        )
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_priors", description=__doc__)
    parser.add_argument("priors", nargs="+", metavar="PRIOR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each search")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.set)
    compare = partial(
        compare_starts,
        config=config,
        priors=arguments.priors,
        seconds=arguments.seconds,
        threads=arguments.threads,
    )
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for found in pool.map(compare, arguments.seeds):
            rows += found
            for row in found:
                print(json.dumps(row), flush=True)
    summary = summarise_priors(rows)
    print("median, least and most over seeds")
    for row in summary:
        print(f"{row['prior']!s:12} share of time {row['share_of_time']}, loss {row['loss']}")
    result = {"benchmark": "bench_priors", "config": arguments.config.name, "seconds": arguments.seconds}
    result |= {
        **describe_machine(),
        "set": arguments.set,
        "jobs": arguments.jobs,
        "threads": arguments.threads,
        "summary": summary,
        "seeds": rows,
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result).replace("Infinity", "null") + "\n")


if __name__ == "__main__":
    main()
