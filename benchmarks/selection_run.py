"""One pool of questions, and one search on what was kept of it, held against the labels at its end.

The search is the shipped one, whole: prompts are put into the trace that it goes on from. Knows one variant
and seed; not what is compared with what.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.arm import Accuracy, describe_answers, describe_search, measure_reference
from benchmarks.selection_criteria import CRITERIA, choose
from benchmarks.selection_pool import write_pool
from search.base import load_base
from search.config import AdapterConfig, SearchConfig, load_config
from search.drafts import DraftSettings
from search.prompts import PromptSet, describe_prompts
from search.recorded import TRACE_FILE
from search.run import run_search
from search.setup import Setup, load_setup
from search.skeleton import parse_skeleton
from search.trace import Trace, TraceWriter

REGIONS = {"free": "objective.weak_signal_nats=0", "confined": "objective.weak_signal_nats=1e9"}
"""Trust region -> setting: no adapter counts as weak, or all do, and stay near the balanced merge."""
UNIFORM, BALANCED = "uniform merge", "balanced merge"
MERGES = {UNIFORM: "uniform", BALANCED: "balanced"}
"""Need no prompts and no search."""
SKELETONS, FREE_TEXT = "own skeletons", "own free text"
"""Prompts that need no pool."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to get prompts, and where coefficients may lie."""

    prompts: str
    """A criterion, SKELETONS, FREE_TEXT, or one of MERGES."""
    region: str = ""
    """A key of REGIONS; "" as configured."""

    @property
    def name(self) -> str:
        """What its lines are called."""
        return f"{self.prompts}, {self.region}" if self.region else self.prompts

    @property
    def is_pooled(self) -> bool:
        """Whether its prompts are kept from a pool."""
        return self.prompts in CRITERIA


@dataclass(frozen=True, slots=True)
class PoolJob:
    """A pool to write, and what all criteria keep of it."""

    experts: str
    seed: int
    config: Path
    overrides: tuple[str, ...]
    template: str
    n_questions: int


@dataclass(frozen=True, slots=True)
class SelectionJob:
    """A search, or a merge without one."""

    arm: Arm
    experts: str
    seed: int
    config: Path
    overrides: tuple[str, ...]
    n_queries: int | None
    prompts: PromptSet | None = None
    """What an arm keeps of a pool."""


def keep_prompts(job: PoolJob) -> dict[str, PromptSet]:
    """Write a pool; return what each criterion keeps, as many as a run needs, by its name."""
    setup = load_setup(load_config(job.config, (*job.overrides, f"search.seed={job.seed}")))
    prompts = setup.config.prompts
    settings = DraftSettings(
        temperature=prompts.temperature,
        max_slot_tokens=prompts.max_slot_tokens,
        max_new_tokens=prompts.max_new_tokens,
        seed=job.seed,
    )
    pool = write_pool(setup.parts, job.template, job.n_questions, settings)
    n_kept = prompts.per_adapter + prompts.unseen_per_adapter
    kept = {}
    for name, criterion in CRITERIA.items():
        chosen = choose(pool.signals, criterion, n_kept)
        in_turn = np.concatenate([chosen[:, ::2], chosen[:, 1::2]], axis=1)  # searched and unseen are alike
        kept[name] = pool.keep(in_turn)
    return kept


def run_arm(job: SelectionJob) -> dict[str, Any]:
    """Return the true measures of what an arm ends with, and what it spent."""
    region = (REGIONS[job.arm.region],) if job.arm.region else ()
    config = load_config(job.config, (*job.overrides, *region, f"search.seed={job.seed}"))
    if job.arm.prompts in MERGES:
        return measure_reference(config, job.experts, MERGES[job.arm.prompts], job.n_queries)
    with TemporaryDirectory() as folder:
        return _measure_search(job, config, Path(folder) / "run")


def _measure_search(job: SelectionJob, config: SearchConfig, output: Path) -> dict[str, Any]:
    source = config.base
    base = load_base(source.source, revision=source.revision, device=config.device, dtype=source.dtype)
    setup = load_setup(config, base)
    if job.prompts is not None:
        _record_prompts(setup, job.prompts, output / TRACE_FILE)
    result = run_search(config, output=output, base=base, resume=True)
    trace = Trace.load(output / TRACE_FILE)
    measures = Accuracy(job.experts, setup, job.n_queries).measure(result.coefficients)
    searched = (trace.last("prompts") or {})["searched"]
    own = {"own_task": own_share(searched, setup.adapter_configs)} if job.prompts is not None else {}
    return {**measures, **describe_search(trace, result), **describe_answers(trace, config), **own}


def _record_prompts(setup: Setup, prompts: PromptSet, path: Path) -> None:
    """Begin a trace with prompts, as if a run that ended right after had written them."""
    searched, unseen = prompts.split(setup.config.prompts.per_adapter)
    names = setup.parts.names
    with TraceWriter(path) as trace:
        trace.header(setup.describe())
        trace.event(
            "prompts",
            sha256=prompts.sha256,
            searched=describe_prompts(searched, names),
            unseen=describe_prompts(unseen, names),
            seconds=0.0,
        )


def own_share(prompts: Sequence[Mapping[str, Any]], adapters: Sequence[AdapterConfig]) -> float:
    """Return the share of prompts that begin as a skeleton of their own expert: a look behind the curtain.

    No criterion can see it. Adapters without skeletons have no share in it.
    """
    openings = {a.name: tuple(parse_skeleton(text).literals[0] for text in a.skeletons) for a in adapters}
    hits = [prompt["text"].startswith(own) for prompt in prompts if (own := openings[prompt["expert"]])]
    return round(float(np.mean(hits)), 4) if hits else 0.0
