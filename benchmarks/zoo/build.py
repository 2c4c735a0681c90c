"""Build the zoo stage by stage: tokenizer and base, experts, scores.

Each stage writes its result and is skipped when that is there already, so an interrupted build goes on where it was.
"""

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.zoo import measure
from benchmarks.zoo.corpus import token_stream
from benchmarks.zoo.experts import save_adapter, train_lora
from benchmarks.zoo.pretrain import new_base, pretrain
from benchmarks.zoo.sizes import EXPERTS, ExpertSpec, ZooSize
from benchmarks.zoo.tasks import HELD_IN
from benchmarks.zoo.tokenizer import save_tokenizer, train_tokenizer

JOINT = ExpertSpec("joint", 32, "all", "answer")
SCALES = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
BASE_NAME = "data/zoo/base"


@dataclass(frozen=True, slots=True)
class Build:
    """Where a build lives and how it runs."""

    out: Path
    """Gets base/, adapters/ and scores.json."""
    work: Path
    """Gets what is not shipped: the joint LoRA and each model's scores."""
    size: ZooSize
    seed: int
    device: str
    n_workers: int


def _measured(build: Build, name: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the scores of one model, from its file where that is there."""
    path = build.work / "measured" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = compute()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(scores))
        partial.rename(path)
    result: dict[str, float] = json.loads(path.read_text())
    return result


def build_base(build: Build) -> None:
    """Train and save tokenizer and base; bf16 safetensors."""
    folder = build.out / "base"
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(build.seed)
    size = build.size
    tokenizer = train_tokenizer(size.vocabulary, min(size.n_documents, 50_000), build.seed)
    stream = token_stream(tokenizer.backend_tokenizer, size.n_documents, build.seed + 1, os.cpu_count() or 1)
    print(f"pretraining text: {len(stream) / 1e6:.1f} million tokens")
    model = new_base(size, tokenizer).to(build.device)
    print(f"base: {model.num_parameters() / 1e6:.2f} million parameters")
    pretrain(model, stream, size, build.seed)
    save_tokenizer(tokenizer, folder)
    model.to(torch.bfloat16).save_pretrained(folder)


def build_expert(build: Build, spec: ExpertSpec) -> None:
    """Train, save and measure one expert, or the joint LoRA."""
    joint = spec.task == JOINT.task
    folder = (build.work if joint else build.out / "adapters") / spec.task
    size = build.size
    if not (folder / "adapter_model.safetensors").exists():
        model = train_lora(
            build.out / "base",
            spec,
            tuple(HELD_IN.values()) if joint else (HELD_IN[spec.task],),
            steps=size.joint_steps if joint else size.expert_steps,
            rows=size.joint_rows if joint else size.expert_rows,
            seed=build.seed,
            device=build.device,
        )
        save_adapter(model, folder, BASE_NAME)
    _measured(build, spec.task, lambda: _measure_adapter(build, folder))


def _measure_adapter(build: Build, folder: Path) -> dict[str, float]:
    deltas = measure.summed_deltas(build.out / "base", [folder])
    return _measure_scale(build, deltas, 1.0)


def _measure_scale(build: Build, deltas: dict[str, torch.Tensor], scale: float) -> dict[str, float]:
    base = build.out / "base"
    model = measure.scaled_merge(base, deltas, scale, build.device)
    examples = measure.measured_examples(build.size.n_measured, "validation", build.seed)
    return measure.accuracies(model, measure.load(base, "cpu")[1], examples)


def build_experts(build: Build) -> None:
    """Train and measure all experts and the joint LoRA, several at a time."""
    specs = (JOINT, *EXPERTS)
    if build.n_workers == 1:
        for spec in specs:
            build_expert(build, spec)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(build.n_workers, mp_context=context) as pool:
        for future in [pool.submit(build_expert, build, spec) for spec in specs]:
            future.result()


def build_scores(build: Build) -> None:
    """Measure base, uniform average and one scale for all; collect every score in scores.json."""
    folders = [build.out / "adapters" / spec.task for spec in EXPERTS]
    deltas = measure.summed_deltas(build.out / "base", folders)
    matrix = {spec.task: _measured(build, spec.task, dict) for spec in EXPERTS}
    scores = {
        "n_examples": build.size.n_measured,
        "split": "validation",
        "base": _measured(build, "base", lambda: _measure_scale(build, deltas, 0.0)),
        "experts": {task: row[task] for task, row in matrix.items()},
        "matrix": matrix,
        "uniform": _measured(build, "uniform", lambda: _measure_scale(build, deltas, 1 / len(EXPERTS))),
        "scales": {
            str(scale): _measured(build, f"scale_{scale}", lambda s=scale: _measure_scale(build, deltas, s))
            for scale in SCALES
        },
        "joint": _measured(build, JOINT.task, dict),
    }
    (build.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
