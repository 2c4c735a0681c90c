"""What could be had with labels: the best scale of each baseline, the same search on accuracy, and ceilings.

`python -m benchmarks.labelled` adds lines to benchmarks/results/quality.jsonl that benchmarks.quality shows
apart: nothing here is data-free. Choices are made on the validation split, in which no query of data/test.csv
is, and measured on the shipped queries by teacher forcing. What is there already is not done again. Knows
what is tried, not where the labels are from.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import ROOT, code_hash, describe_machine
from benchmarks.label_search import search_labels
from benchmarks.labels import Labels
from benchmarks.quality import OUT, SEEDED
from benchmarks.rows import JOINT, ORACLE, SCALED, SINGLE, append_row, is_done, read_rows
from benchmarks.zoo.sets import VARIANTS, scores_file, write_config
from benchmarks.zoo.tasks import HELD_IN
from llm_merging.merging import METHODS
from llm_merging.merging.updates import UpdateMerge
from search.config import SearchConfig, config_hash, load_config
from search.population import folded_weights
from search.setup import load_setup

SCALES = tuple(2.0**k for k in range(-4, 8))
"""Tried first; then half and quarter steps of a factor of two around the best."""
REFINEMENTS = (2**0.5, 2**0.25)
SAME_SCALED = ("cat", "uniform_average")
"""Task arithmetic at another scale: its best one is theirs."""


def tune_scale(labels: Labels, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Scale a method's update as is best on validation; return what that gives on the shipped queries.

    Args:
        folder: gets what the method writes.

    Raises:
        ValueError: for a method that makes no update.
    """
    parts = labels.setup.parts
    merge = METHODS[method](method, with_seed(labels.setup.config, seed))
    if not isinstance(merge, UpdateMerge):
        raise ValueError(f"{method} has no update to scale; those that do: {', '.join(scalable_methods())}")
    merge.output, merge.loaded_base, merge.base_model = folder, parts.base, parts.model
    with torch.no_grad():
        updates = merge.merged_updates(parts.adapters)

    def weights_at(scale: float) -> dict[str, Tensor]:
        return folded_weights(parts.model, ((name, scale * updates[name]) for name in updates))

    scale, n_tried = best_scale(lambda scale: float(labels.losses(weights_at(scale)).mean()))
    return {"scale": scale, "evaluations": n_tried, **labels.measure(weights_at(scale))}


def best_scale(loss_of: Callable[[float], float]) -> tuple[float, int]:
    """Return the best of SCALES and of finer steps around it, and how many were tried."""
    losses = {scale: loss_of(scale) for scale in SCALES}
    for factor in REFINEMENTS:
        best = min(losses, key=losses.__getitem__)
        losses |= {scale: loss_of(scale) for scale in (best / factor, best * factor)}
    return min(losses, key=losses.__getitem__), len(losses)


def oracle_search(labels: Labels, seed: int, folder: Path) -> dict[str, Any]:
    """Run the configured search on validation accuracy; return what it finds on the shipped queries."""
    setup = replace(labels.setup, config=with_seed(labels.setup.config, seed))
    table, spent = search_labels(
        setup, lambda table: labels.losses(labels.weights(table)), folder / "trace.jsonl"
    )
    return {**spent, **labels.measure(labels.weights(table))}


def best_single(labels: Labels) -> dict[str, Any]:
    """Pick the expert that is best on validation, over all tasks; return what it gives on the queries."""
    n_groups, n_adapters = labels.setup.parts.shape
    tables = [np.tile(row, (n_groups, 1)) for row in np.eye(n_adapters)]
    losses = [labels.losses(labels.weights(table)).mean() for table in tables]
    best = int(np.argmin(losses))
    name = labels.setup.parts.names[best]
    return {"winner": name, "evaluations": n_adapters, **labels.measure(labels.weights(tables[best]))}


def joint_lora(labels: Labels) -> dict[str, Any]:
    """Return how the one LoRA that was trained on all tasks does, as measured when the zoo was built."""
    scores = json.loads((ROOT / scores_file("mixed")).read_text(encoding="utf-8"))
    return labels.summarise(scores["test"]["joint"])


def scalable_methods() -> list[str]:
    """Return the methods whose update has a scale, but for those that are another one's at another scale."""
    return [m for m, kind in METHODS.items() if issubclass(kind, UpdateMerge) and m not in SAME_SCALED]


def with_seed(config: SearchConfig, seed: int) -> SearchConfig:
    """Return the configuration with another seed."""
    return config.model_copy(update={"search": config.search.model_copy(update={"seed": seed})})


def plan_rows(seeds: Sequence[int]) -> Iterator[tuple[str, int, Callable[[Labels, Path], dict[str, Any]]]]:
    """Yield what is to be done on each variant: the line's name, its seed, and a function."""
    yield JOINT, seeds[0], lambda labels, _: joint_lora(labels)
    yield SINGLE, seeds[0], lambda labels, _: best_single(labels)
    for method in scalable_methods():
        for seed in seeds if method in SEEDED else seeds[:1]:
            yield method + SCALED, seed, partial(_tuned, method=method, seed=seed)
    for seed in seeds:
        yield ORACLE, seed, partial(_searched, seed=seed)


def _tuned(labels: Labels, folder: Path, *, method: str, seed: int) -> dict[str, Any]:
    return tune_scale(labels, method, seed, folder)


def _searched(labels: Labels, folder: Path, *, seed: int) -> dict[str, Any]:
    return oracle_search(labels, seed, folder)


def run_variant(arguments: argparse.Namespace, experts: str) -> None:
    """Do and record what is not recorded yet of one variant."""
    rows, machine = read_rows(arguments.out), describe_machine(torch.get_num_threads())
    identity = {
        "benchmark": "labelled",
        "labels": True,
        "experts": experts,
        "config": arguments.config.name,
        "config_sha256": config_hash(load_config(arguments.config)),
        "code_sha256": code_hash(),
        "cores": torch.get_num_threads(),
        "held_in_tasks": list(HELD_IN),
        "n_examples": arguments.examples,
    }
    with TemporaryDirectory() as name:
        config = Path(name) / "config.yaml"
        write_config(config, experts, generated=Path(name), template=arguments.config)
        labels = Labels(experts, load_setup(load_config(config)), arguments.examples)
        for method, seed, measure in plan_rows(arguments.seeds):
            row = {**identity, "method": method, "seed": seed}
            if (arguments.only and method not in arguments.only) or is_done(row, rows):
                continue
            started_s = time.monotonic()
            row |= measure(labels, Path(name))
            row["labelled_s"] = round(time.monotonic() - started_s, 1)
            append_row(arguments.out, {**row, **machine})
            shares = (f"{100 * row[key]:6.1f}" for key in ("held_in_N", "worst_task", "held_out"))
            print(f"{experts:10}{method:28}{seed:>3} N, worst, held-out {' '.join(shares)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Do it for each variant."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labelled", description=__doc__)
    names = [SINGLE, JOINT, ORACLE, *(method + SCALED for method in scalable_methods())]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {'; '.join(names)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml")
    parser.add_argument("--examples", type=int, default=40, help="a task to choose by (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    for experts in arguments.variants:
        run_variant(arguments, experts)


if __name__ == "__main__":
    main()
