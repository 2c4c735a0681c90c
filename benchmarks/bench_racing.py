"""Does racing save tokens? Best loss against tokens, raced and not, over seeds of the embedded zoo.

`python -m benchmarks.bench_racing --seeds 0 1 2 3 4 5 6 7 8 9` searches with `configs/demo.yaml`, once
scoring every candidate on all prompts and once for each share in --keep, with the same prompts, first
distribution and tokens. Counted are losses on all searched prompts. Prints a line a search, then medians over
seeds, and appends one line of JSON to benchmarks/results.jsonl. Knows searches, not how one is raced.
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
from search.racing import BlockScores
from search.resume import Record
from search.setup import Setup, load_setup
from search.space import FloatArray
from search.stages import StagedSearch, run_stages
from search.steering import Steering
from search.timebox import TimeBox
from search.trace import Trace, TraceWriter

NO_LIMIT_S = 1e6
MOST_EVALUATIONS = 20
"""A raced search may ask for so many times the candidates of one that is not; its tokens end it before."""


class CountingEvaluator:
    """Forwards, and counts tokens."""

    def __init__(self, steering: Steering) -> None:
        self._evaluator = steering.searched
        self.n_blocks = steering.searched.n_blocks
        self.combine = steering.searched.combine
        self.n_tokens = 0

    def score_blocks(self, coefficients: FloatArray, blocks: Sequence[int]) -> BlockScores:
        """Score coefficients (n_candidates, n_groups, n_adapters) on some blocks."""
        scores = self._evaluator.score_blocks(coefficients, blocks)
        self.n_tokens += scores.n_tokens
        return scores


def compare_races(seed: int, config: SearchConfig, keeps: Sequence[float | None]) -> list[dict[str, Any]]:
    """Search once for each share kept (None first), on the same prompts and with the same tokens."""
    torch.set_num_threads(1)
    search = config.search.model_copy(update={"seed": seed})
    setup = load_setup(config.model_copy(update={"search": search}))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, TraceWriter(Path(folder) / "prompts.jsonl") as trace:
        trace.header({})
        prompts = setup.write_prompts(trace, Record())
        steering = setup.steer(prompts, trace, Record())
        n_tokens = search.max_evaluations * prompts.searched.n_tokens
        for keep in keeps:
            path = Path(folder) / f"{keep}.jsonl"
            search_once(setup, steering, keep, n_tokens, path)
            rows.append({"seed": seed, "keep": keep, **read_curve(Trace.load(path))})
    return rows


def search_once(setup: Setup, steering: Steering, keep: float | None, n_tokens: int, path: Path) -> None:
    """Run one search into a trace, until so many tokens are spent."""
    most = setup.config.search.max_evaluations * (1 if keep is None else MOST_EVALUATIONS)
    settings = setup.config.search.model_copy(update={"race_keep": keep, "max_evaluations": most})
    evaluator = CountingEvaluator(steering)
    with TraceWriter(path) as trace:
        trace.header({})
        search = StagedSearch(
            stages=setup.plan(steering),
            choice=choose_optimizer(settings),
            limits=set_limits(settings),
            evaluator=evaluator,
            search_s=NO_LIMIT_S,
            past_of=Record().past,
            inject_every=0,
            improve=lambda mean: mean,
        )
        tools = SearchTools(
            trace=trace,
            timebox=TimeBox(NO_LIMIT_S),
            interrupted=lambda: evaluator.n_tokens >= n_tokens,
        )
        run_stages(search, steering.confine(setup.first.start), setup.first.spread, tools)


def read_curve(trace: Trace) -> dict[str, list[float]]:
    """Return tokens spent, and the best loss on all prompts by then, after each generation."""
    tokens = np.cumsum([generation.n_tokens for generation in trace.generations])
    full = [g.losses[g.rungs[-1]["candidates"]] for g in trace.generations]
    best = np.minimum.accumulate([np.nanmin(losses) for losses in full])
    return {"tokens": tokens.tolist(), "best": best.round(6).tolist()}


def tokens_to(curve: dict[str, Any], loss: float) -> float:
    """Return the tokens after which a search had this loss, infinite if it never had."""
    return next((n for n, best in zip(curve["tokens"], curve["best"], strict=True) if best <= loss), np.inf)


def relate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each raced search with its seed's plain one, at the plain one's end."""
    plain_of = {row["seed"]: row for row in rows if row["keep"] is None}
    related = []
    for row in rows:
        plain = plain_of[row["seed"]]
        goal, budget = plain["best"][-1], plain["tokens"][-1]
        within = [loss for n, loss in zip(row["tokens"], row["best"], strict=True) if n <= budget]
        ratio = tokens_to(plain, goal) / tokens_to(row, goal)
        related.append(
            {"seed": row["seed"], "keep": row["keep"], "loss": within[-1], "tokens_saved": round(ratio, 3)}
        )
    return related


def summarise_keeps(related: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return median, least and most over seeds, for each share kept."""
    summary = []
    for keep in dict.fromkeys(row["keep"] for row in related):
        own = [row for row in related if row["keep"] == keep]
        spreads = {
            name: [round(float(f([row[name] for row in own])), 4) for f in (np.median, min, max)]
            for name in ("loss", "tokens_saved")
        }
        summary.append({"keep": keep, "n_seeds": len(own), **spreads})
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_racing", description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    keeps: list[float | None] = [None, *arguments.keep]
    rows: list[dict[str, Any]] = []
    compare = partial(compare_races, config=config, keeps=keeps)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for found in pool.map(compare, arguments.seeds):
            rows += found
            for row in relate(found):
                saved = f"tokens saved {row['tokens_saved']:.2f}x"
                print(
                    f"seed {row['seed']}  keep {row['keep']!s:5} loss {row['loss']:.4f}  {saved}", flush=True
                )
    summary = summarise_keeps(relate(rows))
    print("median, least and most over seeds")
    for row in summary:
        print(f"keep {row['keep']!s:5} loss {row['loss']}, tokens saved {row['tokens_saved']}")
    result = {"benchmark": "bench_racing", "config": arguments.config.name, "overrides": arguments.overrides}
    result |= {**describe_machine(), "jobs": arguments.jobs, "summary": summary, "seeds": relate(rows)}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
