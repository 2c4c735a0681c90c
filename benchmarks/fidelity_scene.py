"""What all measurements on one variant of the zoo share: its parts, prompts, folds and right answers.

Prompts come from four sources. "skeleton": the base fills, the expert answers, as the search has it; "free":
each expert writes from the start token; "task": real validation questions, answered by the expert, which
takes data and is the ceiling; "generic": what the base writes, each text given to an expert. Knows files and
models; not which merges are measured, nor objectives.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from benchmarks.environment import ROOT
from benchmarks.truth import Truth
from benchmarks.yardstick import DenseFolds, Yardstick
from benchmarks.zoo.example import Example
from benchmarks.zoo.measure import measured_examples
from benchmarks.zoo.queries import SHIPPED_HELD_OUT, query_examples
from benchmarks.zoo.sets import scores_file
from benchmarks.zoo.sizes import SHIPPED
from benchmarks.zoo.tasks import HELD_IN
from search.config import load_config
from search.drafts import Draft, DraftSettings, DraftWriter
from search.experts import ExpertSignals, TokenBudget, expert_signals
from search.files import write_json
from search.parts import Parts
from search.prompts import PromptRequest, PromptSet, describe_prompts, read_prompts, write_prompts
from search.setup import Setup, load_setup
from search.skeleton import Skeleton
from search.stack import StackedFactors

SOURCES = ("skeleton", "free", "task", "generic")
TASKS = (*HELD_IN, *SHIPPED_HELD_OUT)
ZOO_SEED = 0
"""With which the shipped queries were drawn."""
LONGEST_ANSWER = 64
"""Tokens."""
DEVICE_OVERRIDES = ("base.dtype=float32", "search.space.groups=layer")
"""Whatever the device: accuracies are compared, and coefficients by layer can say what coarser ones can."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A variant of the zoo as it is measured: small, to be sent to processes."""

    experts: str
    config: Path
    """Written by benchmarks.zoo.sets.write_config."""
    folder: Path
    """Gets prompts and arrays."""
    device: str
    n_examples: int
    """Of each task."""

    def prompt_path(self, source: str, per_adapter: int, seed: int) -> Path:
        """Where prompts are kept."""
        return self.folder / f"prompts-{self.experts}-{source}-{per_adapter}-{seed}.json"

    def load(self) -> "LoadedScene":
        """Load it, once in each process."""
        return _load(self)


@cache
def _load(scene: Scene) -> "LoadedScene":
    overrides = [f"device={scene.device}", *DEVICE_OVERRIDES]
    return LoadedScene(scene, load_setup(load_config(scene.config, overrides)))


@dataclass(frozen=True, eq=False)
class LoadedScene:
    """A scene with its models loaded."""

    scene: Scene
    setup: Setup

    @property
    def parts(self) -> Parts:
        """Base and adapters."""
        return self.setup.parts

    @cached_property
    def folds(self) -> DenseFolds:
        """Makes dense weights of coefficients."""
        return DenseFolds(self.parts.model, self.parts.stacked, self.parts.groups)

    @cached_property
    def truth(self) -> Truth:
        """The right answers to the shipped queries and, where these are too few, to validation examples."""
        examples = pick_examples(self.scene.n_examples)
        return Truth(self.parts.base.tokenizer, examples, str(self.parts.model.device))

    @cached_property
    def own(self) -> dict[str, float]:
        """Each expert's accuracy on its own task."""
        scores = json.loads((ROOT / scores_file(self.scene.experts)).read_text(encoding="utf-8"))
        return {task: scores["experts"][task] for task in HELD_IN}

    def weights(self, coefficients: ArrayLike) -> dict[str, Tensor]:
        """Return the weights of coefficients (n_groups, n_adapters)."""
        return self.folds.fold(self.folds.table(coefficients))

    def accuracies(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return the share of right answers by task."""
        return self.truth.marks(self.parts.model, weights).accuracy

    def summarise(self, accuracies: dict[str, float]) -> dict[str, float]:
        """Return held-in N, the worst task's, and the held-out accuracy."""
        shares = [accuracies[task] / self.own[task] for task in HELD_IN]
        held_out = float(np.mean([accuracies[task] for task in SHIPPED_HELD_OUT]))
        return {"held_in_N": float(np.mean(shares)), "worst_task": min(shares), "held_out": held_out}

    def yardstick(self, prompts: PromptSet, *, of_base: bool = False) -> Yardstick:
        """Return the yardstick of agreement with each prompt's expert, or with the base."""
        tokens = 16_384 if self.parts.model.device.type == "cuda" else 1_024
        return Yardstick(self.parts.model, prompts, self._signals(prompts, of_base, tokens), tokens)

    def _signals(self, prompts: PromptSet, of_base: bool, tokens: int) -> ExpertSignals:
        parts = self.parts
        stacked = without_updates(parts.stacked) if of_base else parts.stacked
        return expert_signals(parts.model, stacked, parts.groups, prompts, TokenBudget(tokens))

    def prompts(self, source: str, per_adapter: int, seed: int) -> PromptSet:
        """Return prompts of a source, from their file where they were written before."""
        path = self.scene.prompt_path(source, per_adapter, seed)
        names = self.parts.names
        if not path.exists():
            prompts = self._write(source, per_adapter, seed)
            rows = describe_prompts(prompts, names)
            write_json(path, {"searched": rows, "unseen": [], "sha256": prompts.sha256})
        return read_prompts(json.loads(path.read_text(encoding="utf-8")), names)[0]

    def _write(self, source: str, per_adapter: int, seed: int) -> PromptSet:
        """Write prompts; scored is the answer where there is one, else all."""
        parts, request = self.parts, PromptRequest(per_adapter=per_adapter, seed=seed)
        tokenizer, configs = parts.base.tokenizer, self.setup.adapter_configs
        if source == "task":
            return _answer_questions(parts, per_adapter, seed)
        skeletons = [adapter.skeletons if source == "skeleton" else () for adapter in configs]
        stacked = without_updates(parts.stacked) if source == "generic" else parts.stacked
        return write_prompts(parts.model, tokenizer, stacked, parts.groups, skeletons, request)


@dataclass(frozen=True, slots=True)
class PromptJob:
    """Prompts to write, so that no two processes write the same."""

    scene: Scene
    source: str
    per_adapter: int
    seed: int


def write_scene_prompts(job: PromptJob) -> None:
    """Write prompts into their file, unless it is there."""
    job.scene.load().prompts(job.source, job.per_adapter, job.seed)


def _answer_questions(parts: Parts, per_adapter: int, seed: int) -> PromptSet:
    """Let each expert answer validation questions of its task, greedily."""
    questions = measured_examples(per_adapter, "validation", seed)
    drafts = [
        Draft(adapter, Skeleton(literals=(example.prompt,), slots=()), example.prompt)
        for adapter, task in enumerate(parts.names)
        for example in questions[task]
    ]
    settings = DraftSettings(temperature=0.0, max_slot_tokens=1, max_new_tokens=LONGEST_ANSWER, seed=seed)
    DraftWriter(parts.model, parts.base.tokenizer, parts.stacked, parts.groups, settings).write(drafts)
    return PromptSet(
        ids=tuple((*draft.prompt, *draft.answer) for draft in drafts),
        expert=np.array([draft.adapter for draft in drafts], dtype=np.int64),
        scored=tuple(
            tuple(range(len(draft.prompt) - 1, len(draft.prompt) + len(draft.answer) - 1)) for draft in drafts
        ),
        texts=tuple(draft.full_text for draft in drafts),
        from_skeleton=(False,) * len(drafts),
        n_experts=len(parts.names),
    )


def pick_examples(n: int) -> dict[str, Sequence[Example]]:
    """Return `n` examples of each task: shipped queries first, then validation examples."""
    shipped = query_examples(SHIPPED, ZOO_SEED)
    more = measured_examples(n, "validation", ZOO_SEED)
    return {task: [*shipped[task], *more[task]][:n] for task in TASKS}


def score_everywhere(prompts: PromptSet) -> PromptSet:
    """Return the prompts with all positions scored."""
    return replace(prompts, scored=tuple(tuple(range(len(ids) - 1)) for ids in prompts.ids))


def without_updates(stacked: StackedFactors) -> StackedFactors:
    """Return adapters of the same names that change nothing: what they write or say is the base's."""
    return StackedFactors({}, stacked.names)
