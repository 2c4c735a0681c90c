"""Measure every model of the zoo once and collect the accuracies in scores.json.

Two splits: validation, on which the best single scale is picked (with labels), and test, whose examples are
the shipped queries (and those of compositions that do not ship). Knows builds and accuracies, not training.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from benchmarks.zoo import measure
from benchmarks.zoo.example import Example
from benchmarks.zoo.layout import Build
from benchmarks.zoo.queries import SHIPPED_HELD_OUT, query_examples
from benchmarks.zoo.sizes import EXPERTS, JOINT, ExpertSpec, ZooSize
from benchmarks.zoo.tasks import HELD_IN
from search.files import write_json

Accuracies = dict[str, float]
"""Task -> share of right answers."""
SPLITS = ("validation", "test")


@cache
def split_examples(size: ZooSize, seed: int, split: str) -> dict[str, list[Example]]:
    """Return the examples of every task that models are measured on."""
    if split == "test":
        return query_examples(size, seed)
    return measure.measured_examples(size.n_measured, split, seed)


def measured(
    build: Build,
    name: str,
    make_model: Callable[[], PreTrainedModel],
    splits: Sequence[str] = SPLITS,
) -> dict[str, Accuracies]:
    """Return one model's accuracies by split; each split is measured once and then read from its file."""
    missing = [split for split in splits if not build.measured(name, split).exists()]
    if missing:
        model, tokenizer = make_model(), measure.load(build.base, "cpu")[1]
        groups = {
            (split, task): examples
            for split in missing
            for task, examples in split_examples(build.size, build.seed, split).items()
        }
        found = measure.accuracies(model, tokenizer, groups, build.size.answer_tokens)
        for split in missing:
            write_json(
                build.measured(name, split), {t: value for (s, t), value in found.items() if s == split}
            )
    return {split: json.loads(build.measured(name, split).read_text()) for split in splits}


def measured_adapter(build: Build, spec: ExpertSpec) -> dict[str, Accuracies]:
    """Return the accuracies of one expert, or of the joint LoRA."""

    def make_model() -> PreTrainedModel:
        deltas = measure.summed_deltas(build.base, [build.adapter(spec)])
        return measure.scaled_merge(build.base, deltas, 1.0, build.device)

    return measured(build, spec.task, make_model)


def normalised(accuracies: Accuracies, experts: Accuracies) -> float:
    """Mean over held-in tasks of accuracy / that of the task's own expert, where that is ever right."""
    shares = [accuracies[task] / experts[task] for task in HELD_IN if experts[task] > 0]
    return sum(shares) / len(shares) if shares else 0.0


def own_accuracies(matrix: dict[str, Accuracies]) -> Accuracies:
    """Return each expert's accuracy on its own task."""
    return {task: row[task] for task, row in matrix.items()}


def collect_scores(build: Build) -> dict[str, Any]:
    """Measure what is not measured yet; return the content of scores.json but for the build record.

    "test" and "validation" hold, each by task: base, matrix (one row an expert), uniform, scaled (all
    adapters at picked_scale) and joint. "base" and "experts" repeat, for the scorer, the test accuracies of
    the base and of each task's own expert.
    """
    merged = _merges(build)
    rows = {
        "base": measured(build, "base", lambda: merged(0.0)),
        "uniform": measured(build, "uniform", lambda: merged(1 / len(EXPERTS))),
        "joint": measured_adapter(build, JOINT),
    }
    matrix = {spec.task: measured_adapter(build, spec) for spec in EXPERTS}
    splits: dict[str, dict[str, Any]] = {
        split: {name: row[split] for name, row in rows.items()}
        | {"matrix": {task: row[split] for task, row in matrix.items()}}
        for split in SPLITS
    }
    scales = {
        str(scale): measured(build, f"scale_{scale}", lambda s=scale: merged(s), ["validation"])["validation"]
        for scale in build.size.scales
    }
    experts = own_accuracies(splits["validation"]["matrix"])
    picked = max(scales, key=lambda scale: normalised(scales[scale], experts))
    scaled = measured(build, f"scale_{picked}", lambda: merged(float(picked)))
    for split in SPLITS:
        splits[split]["scaled"] = scaled[split]
    return {
        "base": splits["test"]["base"],
        "experts": own_accuracies(splits["test"]["matrix"]),
        "shipped_held_out": list(SHIPPED_HELD_OUT),
        "picked_scale": float(picked),
        "test": {"n_examples": _counts(build, "test"), **splits["test"]},
        "validation": {"n_examples": _counts(build, "validation"), **splits["validation"], "scales": scales},
    }


def _merges(build: Build) -> Callable[[float], PreTrainedModel]:
    """Return a function from a scale to the base with all adapters added at that scale."""

    @cache
    def deltas() -> dict[str, Any]:
        return measure.summed_deltas(build.base, [build.adapter(spec) for spec in EXPERTS])

    return lambda scale: measure.scaled_merge(build.base, deltas(), scale, build.device)


def _counts(build: Build, split: str) -> dict[str, int]:
    return {task: len(group) for task, group in split_examples(build.size, build.seed, split).items()}
