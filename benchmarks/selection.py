"""Can prompts be chosen without knowing what an adapter is for?

`python -m benchmarks.selection --variants answer mixed --seeds 0 1` lets the base write a pool of questions
in TEMPLATE, the same for all, every slot filled by the base. Each expert answers all of them and keeps some,
by a criterion that looks at models only. A search on what was kept starts from the balanced merge, free or
held near it; the truth about its result is one line of JSON. Knows criteria; search, objective and the
truth are others'.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import ROOT, describe_machine
from benchmarks.rows import append_row
from benchmarks.score import read_scores
from benchmarks.truth import Truth
from benchmarks.zoo.queries import SHIPPED_HELD_OUT, query_examples
from benchmarks.zoo.sets import scores_file, write_config
from benchmarks.zoo.sizes import SHIPPED
from benchmarks.zoo.tasks import HELD_IN
from search.config import load_config
from search.drafts import Draft, DraftSettings, DraftWriter
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import expert_signals, scored_logp
from search.objective import disagreement, entropy
from search.optimizer import BatchOptimizer
from search.population import mixed_weights, population
from search.prompts import PromptSet
from search.setup import Setup, load_setup
from search.skeleton import parse_skeleton
from search.space import FloatArray

TEMPLATE = "### Task:{task}\n### Input:{input}\n### Answer:"
OUT = ROOT / "benchmarks/results/selection.jsonl"
REGIONS = {"free": np.inf, "near": 0.5}
"""How far a coefficient may be from the balanced merge's, as a share of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """What all experts answer to a pool of questions; arrays are (n_experts, n_questions)."""

    drafts: list[list[Draft]]
    divergence: FloatArray
    """Largest KL(expert || base) at a position of the answer, in nats."""
    entropy: FloatArray
    """Mean entropy of the expert over its answer, in nats."""
    n_agreeing: FloatArray
    """How many other experts give the same answer."""


Criterion = Callable[[Answered], FloatArray]
"""Larger is kept: (n_experts, n_questions)."""


def _ranks(values: FloatArray) -> FloatArray:
    """Ranks along the questions, 0 to 1."""
    return values.argsort(1).argsort(1) / max(1, values.shape[1] - 1)


def _owned(found: Answered) -> FloatArray:
    """How much more an expert diverges than the one that diverges most beside it."""
    others = np.stack([np.delete(found.divergence, i, 0).max(0) for i in range(len(found.divergence))])
    return found.divergence - others


CRITERIA: Mapping[str, Criterion] = {
    "any": lambda found: np.zeros_like(found.divergence),
    "divergence": lambda found: found.divergence,
    "ownership": _owned,
    "sure and divergent": lambda found: np.minimum(_ranks(found.divergence), _ranks(-found.entropy)),
    "sure, divergent, alone": lambda found: (
        np.minimum(_ranks(found.divergence), _ranks(-found.entropy)) - found.n_agreeing
    ),
    "sure, divergent, joined": lambda found: (
        np.minimum(_ranks(found.divergence), _ranks(-found.entropy)) + (found.n_agreeing > 0)
    ),
}


def answer_pool(setup: Setup, n_questions: int, seed: int) -> Answered:
    """Let the base write questions and every expert answer them."""
    parts = setup.parts
    settings = DraftSettings(temperature=1.0, max_slot_tokens=48, max_new_tokens=48, seed=seed)
    writer = DraftWriter(parts.model, parts.base.tokenizer, parts.stacked, parts.groups, settings)
    skeleton = parse_skeleton(TEMPLATE)
    first = [Draft(0, skeleton, skeleton.literals[0]) for _ in range(n_questions)]
    writer.write(first)
    questions = [d.text for d in first if not d.problem or d.text.endswith(skeleton.literals[-1])]
    drafts = []
    for expert in range(len(parts.names)):
        own = [Draft(expert, skeleton, question) for question in dict.fromkeys(questions)]
        writer.answer(own, 0.0)
        drafts.append(own)
    return _measure(setup, drafts)


def _measure(setup: Setup, drafts: list[list[Draft]]) -> Answered:
    shape = len(drafts), len(drafts[0])
    divergence, uncertainty = np.zeros(shape), np.zeros(shape)
    for expert, own in enumerate(drafts):
        prompts = collect(own, expert, len(drafts))
        for start in range(0, len(own), 64):
            rows = list(range(start, min(start + 64, len(own))))
            base, merged = _both(setup, prompts, rows, expert)
            kl = disagreement("forward_kl", base, merged, torch.zeros(len(base)))
            counts = [len(prompts.scored[row]) for row in rows]
            divergence[expert, rows] = [part.max().item() for part in kl.split(counts)]
            uncertainty[expert, rows] = [part.mean().item() for part in entropy(merged).split(counts)]
    answers = np.array([[str(draft.answer) for draft in own] for own in drafts])
    agreeing = (answers[:, None] == answers[None]).sum(1) - 1.0
    return Answered(drafts, divergence, uncertainty, agreeing)


@torch.no_grad()
def _both(setup: Setup, prompts: PromptSet, rows: list[int], expert: int) -> tuple[Any, Any]:
    """Log-probabilities of base and expert at the answers' positions."""
    parts = setup.parts
    one_hot = torch.zeros(len(rows), len(parts.groups.names), len(parts.names))
    one_hot[:, :, expert] = 1
    base = scored_logp(parts.model, prompts, rows)
    with population(parts.model, parts.stacked, one_hot, parts.groups):
        return base, scored_logp(parts.model, prompts, rows)


def collect(drafts: Sequence[Draft], expert: int, n_experts: int) -> PromptSet:
    """Make one expert's answered drafts a prompt set, answers scored."""
    return PromptSet(
        ids=tuple((*draft.prompt, *draft.answer) for draft in drafts),
        expert=np.full(len(drafts), expert, dtype=np.int64),
        scored=tuple(tuple(range(len(d.prompt) - 1, len(d.prompt) + len(d.answer) - 1)) for d in drafts),
        texts=tuple(draft.full_text for draft in drafts),
        from_skeleton=(True,) * len(drafts),
        n_experts=n_experts,
    )


def select(found: Answered, criterion: Criterion, per_adapter: int) -> PromptSet:
    """Return each expert's best questions, those with a usable answer first."""
    value = criterion(found)
    sets = []
    for expert, own in enumerate(found.drafts):
        order: list[int] = sorted(range(len(own)), key=lambda q: (bool(own[q].problem), -value[expert, q]))
        sets.append(collect([own[q] for q in order[:per_adapter]], expert, len(found.drafts)))
    return PromptSet(
        ids=sum((part.ids for part in sets), ()),
        expert=np.concatenate([part.expert for part in sets]),
        scored=sum((part.scored for part in sets), ()),
        texts=sum((part.texts for part in sets), ()),
        from_skeleton=sum((part.from_skeleton for part in sets), ()),
        n_experts=len(sets),
    )


def hit_rate(prompts: PromptSet, names: Sequence[str], instructions: Mapping[str, str]) -> float:
    """Share of kept questions that carry their expert's own instruction: a look behind the curtain."""
    hits = [instructions[names[e]] in t for e, t in zip(prompts.expert.tolist(), prompts.texts, strict=True)]
    return float(np.mean(hits))


def search_on(setup: Setup, prompts: PromptSet, region: float, seed: int) -> FloatArray:
    """Search from the balanced merge, coefficients within a share of it; return the distribution's mean."""
    parts, settings = setup.parts, setup.config.search
    signals = expert_signals(parts.model, parts.stacked, parts.groups, prompts)
    evaluator = PopulationEvaluator(parts.model, parts.stacked, parts.groups, prompts, signals, Scoring())
    start, reach = setup.balanced, region * setup.balanced
    optimizer = BatchOptimizer(
        start, start / 2, n_candidates=settings.n_candidates, budget=settings.max_evaluations, seed=seed
    )
    shape = parts.shape
    for _ in range(settings.max_evaluations // settings.n_candidates):
        rows = np.clip(optimizer.ask(), start - reach, start + reach)
        tables = np.broadcast_to(rows[:, None], (len(rows), *shape))
        optimizer.tell(evaluator.score(np.ascontiguousarray(tables)).losses)
    mean = np.clip(optimizer.mean(), start - reach, start + reach)
    return np.broadcast_to(mean, shape).copy()


def run(job: tuple[str, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every criterion and region for one variant and seed."""
    variant, seed = job
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        write_config(path, variant, generated=Path(folder) / "generated")
        setup = load_setup(load_config(path, [f"search.seed={seed}", *options.overrides]))
    names, tokenizer = setup.parts.names, setup.parts.base.tokenizer
    examples = {task: query_examples(SHIPPED, 0)[task] for task in (*HELD_IN, *SHIPPED_HELD_OUT)}
    truth = Truth(tokenizer, examples, setup.parts.model.device)
    expert = read_scores(scores_file(variant))["experts"]

    def tell(what: str, region: str, table: FloatArray, **more: Any) -> dict[str, Any]:
        accuracy = truth.marks(setup.parts.model, fold(setup, table)).accuracy
        shares = [accuracy[task] / expert[task] for task in HELD_IN]
        held_out = float(np.mean([accuracy[task] for task in SHIPPED_HELD_OUT]))
        row = {
            "benchmark": "selection",
            "experts": variant,
            "seed": seed,
            "criterion": what,
            "region": region,
        }
        measures = {"held_in_N": float(np.mean(shares)), "worst_task": min(shares), "held_out": held_out}
        return {**row, **{k: round(v, 4) for k, v in measures.items()}, **more}

    shape = setup.parts.shape
    rows = [tell("uniform merge", "", np.full(shape, 1 / len(names)))]
    rows.append(tell("balanced merge", "", np.broadcast_to(setup.balanced, shape).copy()))
    found = answer_pool(setup, options.questions, seed)
    instructions = {task: query_examples(SHIPPED, 0)[task][0].instruction for task in HELD_IN}
    for (what, criterion), (region, reach) in product(CRITERIA.items(), REGIONS.items()):
        prompts = select(found, criterion, setup.config.prompts.per_adapter)
        own = round(hit_rate(prompts, names, instructions), 4)
        rows.append(tell(what, region, search_on(setup, prompts, reach, seed), own_task=own))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def fold(setup: Setup, table: FloatArray) -> dict[str, Any]:
    """Return the merge's weights by name."""
    parts = setup.parts
    mixture = torch.tensor(table, dtype=parts.model.dtype, device=parts.model.device)
    return mixed_weights(parts.model, parts.stacked, mixture, parts.groups)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the jobs, print and record a line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["answer", "mixed"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    jobs = list(product(options.variants, options.seeds))
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(run, jobs, [options] * len(jobs)):
            for row in rows:
                append_row(options.out, {**row, **describe_machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
