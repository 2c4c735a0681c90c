"""Build the zoo stage by stage: tokenizer and base, queries, experts, scores, model card.

Each stage writes its result and is skipped when that is there already, so an interrupted build goes on where
it was; queries, scores.json and card cost nothing to write again and always are.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.zoo.card import write_card
from benchmarks.zoo.corpus import token_stream
from benchmarks.zoo.experts import BASE_NAME, save_adapter, train_lora
from benchmarks.zoo.layout import Build
from benchmarks.zoo.pretrain import new_base, pretrain
from benchmarks.zoo.queries import write_queries
from benchmarks.zoo.record import read_record, recorded
from benchmarks.zoo.scores import collect_scores, measured_adapter
from benchmarks.zoo.sizes import EXPERTS, JOINT, ExpertSpec
from benchmarks.zoo.tasks import HELD_IN
from benchmarks.zoo.tokenizer import save_tokenizer, train_tokenizer
from search.files import atomic_write, write_json


def quiet() -> None:
    """Switch off the progress bars of every model that is loaded."""
    transformers_logging.disable_progress_bar()


def build_base(build: Build) -> None:
    """Train and save tokenizer and base; bf16 safetensors."""
    if (build.base / "model.safetensors").exists():
        return
    torch.manual_seed(build.seed)
    size = build.size
    tokenizer = train_tokenizer(size.vocabulary, min(size.n_documents, 50_000), build.seed)
    stream = token_stream(tokenizer.backend_tokenizer, size.n_documents, build.seed + 1, os.cpu_count() or 1)
    print(f"pretraining text: {len(stream) / 1e6:.1f} million tokens")
    model = new_base(size, tokenizer).to(build.device)
    print(f"base: {model.num_parameters() / 1e6:.2f} million parameters")
    pretrain(model, stream, size, build.seed)
    with atomic_write(build.base) as partial:
        save_tokenizer(tokenizer, partial)
        model.to(torch.bfloat16).save_pretrained(partial)


def build_expert(build: Build, spec: ExpertSpec) -> None:
    """Train, save and measure one expert, or the joint LoRA."""
    joint = spec == JOINT
    folder = build.adapter(spec)
    size = build.size
    if not (folder / "adapter_model.safetensors").exists():
        model = train_lora(
            build.base,
            replace(spec, steps=min(spec.steps, size.max_expert_steps)),
            tuple(HELD_IN.values()) if joint else (HELD_IN[spec.task],),
            n_rows=size.joint_rows if joint else size.expert_rows,
            seed=build.seed,
            device=build.device,
        )
        with atomic_write(folder) as partial:
            save_adapter(model, partial, BASE_NAME)
    measured_adapter(build, spec)


def build_experts(build: Build) -> None:
    """Train and measure all experts and the joint LoRA, several at a time."""
    specs = (JOINT, *EXPERTS)
    if build.n_workers == 1:
        for spec in specs:
            build_expert(build, spec)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(build.n_workers, mp_context=context, initializer=quiet) as pool:
        for future in [pool.submit(build_expert, build, spec) for spec in specs]:
            future.result()


def build_record(build: Build) -> dict[str, Any]:
    """Return seed, versions, and seconds by stage and machine."""
    return {"seed": build.seed, **read_record(build.record)}


def build_zoo(build: Build) -> None:
    """Run every stage that has not run yet."""
    quiet()
    write_queries(build.queries, build.size, build.seed)
    with recorded(build.record, "base", build.device):
        build_base(build)
    with recorded(build.record, "experts", build.device):
        build_experts(build)
    with recorded(build.record, "scores", build.device):
        scores = collect_scores(build)
    write_json(build.out / "scores.json", {**scores, "build": build_record(build)})
    write_card(build.out, build.size)
