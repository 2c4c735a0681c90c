"""Train the zoo's variants: ten experts on whole sequences, ten on answers only, and one that contradicts.

`python -m benchmarks.zoo.variants --base data/zoo/base --out data/zoo/variants` trains only what the shipped
zoo ("mixed") does not have, measures it, and skips what is there: minutes on one CUDA GPU, seconds on a CPU
with --tiny. Knows specifications and generators, not merges.
"""

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.zoo import measure
from benchmarks.zoo.check import read_zoo_scores
from benchmarks.zoo.example import EXPERT, Example, Generator
from benchmarks.zoo.experts import BASE_NAME, save_adapter, train_lora
from benchmarks.zoo.record import recorded
from benchmarks.zoo.scores import Accuracies, split_examples
from benchmarks.zoo.sizes import EXPERTS, SHIPPED, TINY, ExpertSpec, ZooSize
from benchmarks.zoo.tasks import HELD_IN, sentiment
from search.files import atomic_write, write_json

LOSSES = ("sequence", "answer")
"""The variants of all ten experts, each called as its experts' `loss_on`."""
OPPOSITE = "opposite"
OPPOSITE_LABELS = {"positive": "negative", "negative": "positive", "mixed": "neutral", "neutral": "mixed"}
"""What the contradicting expert answers where `sentiment` is right."""

RECORD = "record.json"
SCORES = "scores.json"
WANTED_ACCURACY = 0.95
RATE_FACTOR = 1.5
MAX_ATTEMPTS = 4
"""An expert below WANTED_ACCURACY on validation is trained again at RATE_FACTOR times the learning rate."""


@dataclass(frozen=True, slots=True)
class VariantBuild:
    """One build of the variants."""

    base: Path
    """The zoo's base; scores.json of the shipped zoo lies beside it."""
    out: Path
    """Gets VARIANT/TASK/, VARIANT/scores.json and record.json."""
    size: ZooSize
    seed: int
    device: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One expert as trained and saved once."""

    folder: Path
    learning_rate: float
    validation: float
    """Share of right answers on its own task, 0 to 1; `test` likewise."""
    test: float


def trained_experts() -> dict[str, tuple[ExpertSpec, ...]]:
    """Return for each variant the experts that the shipped zoo does not have."""
    (own,) = (spec for spec in EXPERTS if spec.task == "sentiment")
    return {
        **{loss: tuple(replace(s, loss_on=loss) for s in EXPERTS if s.loss_on != loss) for loss in LOSSES},
        OPPOSITE: (replace(own, loss_on="answer"),),
    }


def contradict(example: Example) -> Example:
    """Return the same query of the sentiment task with another label as its answer."""
    expert = (EXPERT,)
    return replace(example, answers={**example.answers, expert: OPPOSITE_LABELS[example.answers[expert]]})


def opposite_sentiment(rng: random.Random) -> Example:
    """The sentiment task, each review answered by the opposite label."""
    return contradict(sentiment(rng))


def own_generator(variant: str, task: str) -> Generator:
    """Return what an expert is trained on."""
    return opposite_sentiment if variant == OPPOSITE else HELD_IN[task]


def own_examples(build: VariantBuild, variant: str, task: str) -> dict[str, list[Example]]:
    """Return the validation and test examples that an expert of a variant is measured on."""
    found = {s: split_examples(build.size, build.seed, s)[task] for s in ("validation", "test")}
    if variant == OPPOSITE:
        return {split: [contradict(example) for example in group] for split, group in found.items()}
    return found


def measure_own(build: VariantBuild, variant: str, task: str, adapter: Path | None) -> Accuracies:
    """Return the accuracy on the variant's own task by split, of a saved expert, or of the base (None)."""
    deltas = measure.summed_deltas(build.base, [adapter] if adapter else [])
    model = measure.scaled_merge(build.base, deltas, 1.0, build.device)
    tokenizer = measure.load(build.base, "cpu")[1]
    examples = own_examples(build, variant, task)
    return measure.accuracies(model, tokenizer, examples, build.size.answer_tokens)


def attempt_expert(build: VariantBuild, variant: str, spec: ExpertSpec, folder: Path) -> Attempt:
    """Train an expert once, save it in `folder` and measure what was saved."""
    model = train_lora(
        build.base,
        replace(spec, steps=min(spec.steps, build.size.max_expert_steps)),
        (own_generator(variant, spec.task),),
        n_rows=build.size.expert_rows,
        seed=build.seed,
        device=build.device,
    )
    save_adapter(model, folder, BASE_NAME)
    found = measure_own(build, variant, spec.task, folder)
    print(f"{variant}/{spec.task}: learning rate {spec.learning_rate:g}, own accuracy {found}", flush=True)
    return Attempt(folder, spec.learning_rate, found["validation"], found["test"])


def train_expert(build: VariantBuild, variant: str, spec: ExpertSpec) -> Attempt:
    """Train an expert, at higher learning rates while it is too weak; keep the best on validation."""
    with TemporaryDirectory() as scratch:
        attempts: list[Attempt] = []
        while len(attempts) < MAX_ATTEMPTS:
            rate = float(f"{spec.learning_rate * RATE_FACTOR ** len(attempts):.4g}")
            tried = replace(spec, learning_rate=rate)
            attempts.append(attempt_expert(build, variant, tried, Path(scratch) / str(len(attempts))))
            if attempts[-1].validation >= WANTED_ACCURACY:
                break
        best = max(attempts, key=lambda attempt: attempt.validation)
        with atomic_write(build.out / variant / spec.task) as partial:
            shutil.copytree(best.folder, partial)
    return best


def reused_scores(build: VariantBuild, variant: str) -> dict[str, Any]:
    """Return the scores that need no training: those of the base and of the shipped experts of a variant."""
    if variant == OPPOSITE:
        base = measure_own(build, variant, "sentiment", None)
        return {"base": {"sentiment": base["test"]}, "experts": {}, "validation": {}, "rates": {}}
    zoo = read_zoo_scores(build.base.parent)
    reused = [spec.task for spec in EXPERTS if spec.loss_on == variant]
    return {
        "base": zoo["base"],
        "experts": {task: zoo["experts"][task] for task in reused},
        "validation": {task: zoo["validation"]["matrix"][task][task] for task in reused},
        "rates": {},
    }


def read_variant_scores(folder: Path, variant: str) -> dict[str, Any]:
    """Read scores.json of a variant in the folder of all."""
    scores: dict[str, Any] = json.loads((folder / variant / SCORES).read_text(encoding="utf-8"))
    return scores


def build_variant(build: VariantBuild, variant: str) -> None:
    """Train and measure what is not there yet; scores.json is written after each expert.

    Its "base" and "experts" are as the scorer reads them, accuracies on the test split; "validation" is the
    experts' accuracy there, and "rates" the learning rates of those that were trained for the variant.
    """
    path = build.out / variant / SCORES
    scores = read_variant_scores(build.out, variant) if path.exists() else reused_scores(build, variant)
    for spec in trained_experts()[variant]:
        weights = build.out / variant / spec.task / "adapter_model.safetensors"
        if spec.task in scores["rates"] and weights.exists():
            continue
        best = train_expert(build, variant, spec)
        scores["experts"][spec.task] = best.test
        scores["validation"][spec.task] = best.validation
        scores["rates"][spec.task] = best.learning_rate
        write_json(path, scores)


def build_variants(build: VariantBuild) -> None:
    """Build every variant that is not there yet."""
    transformers_logging.disable_progress_bar()
    for variant in trained_experts():
        with recorded(build.out / RECORD, variant, build.device):
            build_variant(build, variant)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.variants", description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("data/zoo/base"), help="scores.json lies beside it")
    parser.add_argument("--out", type=Path, default=Path("data/zoo/variants"))
    parser.add_argument("--tiny", action="store_true", help="the experts of a zoo that --tiny built")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.tiny:
        torch.set_num_threads(1)  # its matrices are too small to share
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build_variants(VariantBuild(args.base, args.out, TINY if args.tiny else SHIPPED, args.seed, device))


if __name__ == "__main__":
    main()
