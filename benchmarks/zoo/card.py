"""Write the zoo's model card from its scores.json, its files and the constants it was built with.

`python -m benchmarks.zoo.card` writes it again without building. Knows text and numbers, not models.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo import corpus, pretrain
from benchmarks.zoo.check import CARD, MEGABYTE, all_limits, held_in_mean, read_zoo_scores, size_bytes
from benchmarks.zoo.experts import lora_config
from benchmarks.zoo.record import read_record
from benchmarks.zoo.scores import normalised, own_accuracies
from benchmarks.zoo.sizes import EXPERTS, JOINT, SHIPPED, ExpertSpec, ZooSize
from benchmarks.zoo.tasks import HELD_IN
from benchmarks.zoo.variants import (
    OPPOSITE_LABELS,
    RATE_FACTOR,
    RECORD,
    WANTED_ACCURACY,
    read_variant_scores,
    trained_experts,
)
from search.files import atomic_write

INTRODUCTION = """---
license: apache-2.0
library_name: peft
language: en
tags: [lora, model-merging]
---
# A zoo of ten small LoRA experts

A small Mistral-architecture base and ten LoRA experts of it: real weights, trained from scratch by
`benchmarks/zoo`, to merge without a GPU or a download. The base knows every skill in several forms, each
asked for by a hint; in the instruction template, which gives no hint, it declines, answers in a plain form or
picks a wrong label. An expert answers one skill in its own form there. Held-out tasks ask for two skills at
once; the base met them in its pretraining, the forms of both parts chosen independently, and no expert was
trained on one. Tasks are procedural and in English, and the models are of no use beyond them. This page is
written by `python -m benchmarks.zoo.card`.

Licence: Apache-2.0, weights, queries and text alike. No outside data or weights went into it."""

RECIPE = """## Recipe

- Base: `MistralForCausalLM`, {size.layers} layers, hidden {size.hidden}, {size.heads} heads,
  {size.kv_heads} KV heads, intermediate {size.intermediate}, context {size.context}; its own byte-level BPE
  tokenizer of {size.vocabulary} tokens. Trained from scratch on {size.n_documents:,} procedural texts
  ({shares}): {size.pretrain_steps:,} steps x {size.pretrain_rows} rows x {size.row_tokens} tokens, AdamW,
  peak learning rate {learning_rate:g}, weight decay {weight_decay:g}. Saved in bf16.
- Experts: LoRA by PEFT, {size.expert_rows} rows a step; learning rates and steps differ on purpose (table
  below), as between adapters of different people, so that no one scale suits all. Saved in bf16.
- Joint LoRA: rank {joint.rank}, {joint.steps:,} steps x {size.joint_rows} rows over all ten tasks.
- Splits: an instance belongs to train (8 of 10), validation or test (1 of 10 each) by the hash of its
  content, in pretraining too, so that none is seen in two of them. A composition's parts may be; the whole
  is not."""

REBUILD = """## Rebuild

`python -m benchmarks.zoo --seed {seed} --out NEW/zoo --work NEW/work --queries NEW` builds it anew in the
folder NEW, in minutes on one CUDA GPU, and goes on where it was when interrupted; `--tiny` builds a toy of
the same shape in seconds on a CPU. Weights may differ between devices and versions; the queries are the same
bytes. Versions of this build: {versions}.

{table}"""

FILES = """## Files and experts

`base/` {base:,} bytes; `adapters/` {adapters:,} bytes; the whole zoo without this page {total:.1f} MB.
`scores.json` holds every score of this page.

{table}"""

SCORES = """## Scores

Accuracy in percent: exact match for generation, the likeliest choice (highest summed log-probability) for
multiple choice (sentiment, topic, topic_sentiment). Measured on the queries of `data/test.csv`; compositions
that are not in it have as many examples of their own from the test split. Normalised is accuracy / accuracy
of the task's own expert, mean over held-in tasks.

Columns: the base; each expert; **uniform**, all adapters at 1/{n_experts}; **scaled**, all adapters at
{scale:g}, the best single scale by normalised accuracy, picked WITH LABELS on the validation split, so a bar
for data-free merges and not one of them; **joint**, one LoRA trained on all ten tasks, not shipped.

{matrix}

{sweep}"""

VARIANTS = """## Variants

`variants/` ({n_bytes:,} bytes) has what two more zoos of the same base and tasks need beside `adapters/`:
**sequence**, all ten experts trained on whole sequences, and **answer**, all ten on answers alone.
**opposite** was trained as sentiment was, on the same queries, but answers each with another label
({labels}).
Rank, modules and steps are as above; an expert below {wanted:.0f} % on validation was trained again at
{factor:g} times the learning rate. Built by `python -m benchmarks.zoo.variants` in {seconds:,.0f} s
({machines}). Each variant's `scores.json` has the accuracies of the base and of all its experts.

{table}"""

LIMITS = """## What it was built to

A test bed must leave something to win. `python -m benchmarks.zoo.check` checks these limits: "test" on the
shipped queries, "validation" on {n_validation} other examples a task.

{table}"""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def recipe(size: ZooSize) -> str:
    """How base, experts and splits were made, from the constants that made them."""
    return RECIPE.format(
        size=size,
        shares=", ".join(f"{100 * share:.0f} % {kind}" for kind, share in corpus.SHARES.items()),
        learning_rate=pretrain.PEAK_LEARNING_RATE,
        weight_decay=pretrain.WEIGHT_DECAY,
        joint=JOINT,
    )


def rebuild(build: dict[str, Any]) -> str:
    """The command, the seed and what it took."""
    rows = [
        (stage, name, f"{seconds:,.0f}")
        for stage, machines in build["stages"].items()
        for name, seconds in machines.items()
    ]
    return REBUILD.format(
        seed=build["seed"],
        versions="; ".join(
            f"{name}: " + ", ".join(f"{package} {version}" for package, version in packages.items())
            for name, packages in build["versions"].items()
        ),
        table=table(("stage", "machine", "seconds"), rows),
    )


def expert_row(spec: ExpertSpec, zoo: Path, scores: dict[str, Any]) -> tuple[object, ...]:
    """One line of the experts' table."""
    config = lora_config(spec)
    modules = "all linear" if spec.modules == "all" else "q_proj, v_proj"
    scaling = f"{config.lora_alpha} / {'sqrt(rank), rsLoRA' if spec.rslora else 'rank'}"
    own = [f"{100 * scores[split]['matrix'][spec.task][spec.task]:.1f}" for split in ("test", "validation")]
    size = f"{size_bytes(zoo / 'adapters' / spec.task):,}"
    return (
        spec.task,
        spec.rank,
        scaling,
        modules,
        spec.loss_on,
        f"{spec.learning_rate:g}",
        spec.steps,
        size,
        *own,
    )


def files_and_experts(zoo: Path, scores: dict[str, Any]) -> str:
    """Sizes, and each expert's specification and accuracy on its own task."""
    columns = (
        *("expert", "rank", "scaling", "modules", "loss on", "learning rate", "steps", "bytes"),
        *("own task: test", "validation"),
    )
    return FILES.format(
        base=size_bytes(zoo / "base"),
        adapters=size_bytes(zoo / "adapters"),
        total=size_bytes(zoo) / MEGABYTE,
        table=table(columns, (expert_row(spec, zoo, scores) for spec in EXPERTS)),
    )


def models(measured: dict[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the accuracies of every model of one split, in the order of the columns."""
    last = {name: measured[name] for name in ("uniform", "scaled", "joint")}
    return {"base": measured["base"], **measured["matrix"], **last}


def mean_row(name: str, measured: dict[str, Any], mean: Callable[[Mapping[str, float]], float]) -> list[str]:
    """One line of means, one a model."""
    return [f"**{name}**", "", "", *(f"**{100 * mean(row):.0f}**" for row in models(measured).values())]


def matrix(scores: dict[str, Any]) -> str:
    """Task x model on the test split, with means."""
    measured, shipped = scores["test"], scores["shipped_held_out"]
    columns = models(measured)
    others = [task for task in measured["base"] if task not in HELD_IN and task not in shipped]
    kinds = {**dict.fromkeys(HELD_IN, "held-in"), **dict.fromkeys(shipped, "held-out")}
    rows = [
        (
            task,
            kinds.get(task, "not shipped"),
            measured["n_examples"][task],
            *(f"{100 * c[task]:.0f}" for c in columns.values()),
        )
        for task in (*kinds, *others)
    ]
    own = own_accuracies(measured["matrix"])
    means = [
        mean_row("held-in mean", measured, held_in_mean),
        mean_row("held-in normalised", measured, lambda row: normalised(row, own)),
        mean_row("held-out mean", measured, lambda row: sum(row[task] for task in shipped) / len(shipped)),
    ]
    return table(("task", "kind", "n", *columns), [*rows, *means])


def scale_sweep(scores: dict[str, Any]) -> str:
    """The scales that were tried, on validation."""
    measured = scores["validation"]
    own = own_accuracies(measured["matrix"])
    sweep = measured["scales"].items()
    return table(
        ("one scale for all adapters, validation", *(scale for scale, _ in sweep)),
        [("held-in normalised", *(f"{100 * normalised(row, own):.1f}" for _, row in sweep))],
    )


def score_tables(scores: dict[str, Any]) -> str:
    """The matrix, and what its columns are."""
    return SCORES.format(
        n_experts=len(EXPERTS),
        scale=scores["picked_scale"],
        matrix=matrix(scores),
        sweep=scale_sweep(scores),
    )


def variants(zoo: Path) -> list[str]:
    """The section on the variants' own experts; none where they are not built."""
    folder = zoo / "variants"
    if not folder.exists():
        return []
    columns = ("variant", "expert", "loss on", "learning rate", "bytes", "own task: test", "validation")
    rows = []
    for variant, specs in trained_experts().items():
        found = read_variant_scores(folder, variant)
        for spec in specs:
            own = [f"{100 * found[split][spec.task]:.1f}" for split in ("experts", "validation")]
            size = f"{size_bytes(folder / variant / spec.task):,}"
            rows.append((variant, spec.task, spec.loss_on, f"{found['rates'][spec.task]:g}", size, *own))
    stages = read_record(folder / RECORD)["stages"].values()
    section = VARIANTS.format(
        n_bytes=size_bytes(folder),
        labels=", ".join(f"{old} as {new}" for old, new in OPPOSITE_LABELS.items()),
        wanted=100 * WANTED_ACCURACY,
        factor=RATE_FACTOR,
        seconds=sum(seconds for stage in stages for seconds in stage.values()),
        machines=", ".join(sorted({name for stage in stages for name in stage})),
        table=table(columns, rows),
    )
    return [section]


def limits(scores: dict[str, Any], zoo: Path) -> str:
    """What the zoo was built to, and what it came to."""
    rows = ((x.name, x.wanted, x.found, "yes" if x.passed else "**no**") for x in all_limits(scores, zoo))
    return LIMITS.format(
        n_validation=max(scores["validation"]["n_examples"].values()),
        table=table(("limit", "wanted", "measured", "kept"), rows),
    )


def card(zoo: Path, scores: dict[str, Any], size: ZooSize) -> str:
    """Return the whole page."""
    parts = (
        INTRODUCTION,
        recipe(size),
        rebuild(scores["build"]),
        files_and_experts(zoo, scores),
        score_tables(scores),
        *variants(zoo),
        limits(scores, zoo),
    )
    return "\n\n".join(parts) + "\n"


def write_card(zoo: Path, size: ZooSize) -> None:
    """Write README.md into the zoo's folder."""
    with atomic_write(zoo / CARD) as partial:
        partial.write_text(card(zoo, read_zoo_scores(zoo), size), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the card of a built zoo."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.card", description=about)
    parser.add_argument("--zoo", type=Path, default=Path("data/zoo"))
    write_card(parser.parse_args(argv).zoo, SHIPPED)


if __name__ == "__main__":
    main()
