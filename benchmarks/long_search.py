"""Searches that go on far longer than useful: does true accuracy still follow, once the loss is small?

CMA-ES as the method has it, without a race; the mean of its distribution is measured with labels at
checkpoints. What only searches for a while gives the merges that searches visit. Knows one variant's parts
and losses; not which searches are wanted.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.fidelity_scene import LoadedScene, Scene, score_everywhere
from benchmarks.yardstick import Means
from search.groups import group_modules
from search.objective import combine_experts, normalise
from search.optimizer import BatchOptimizer
from search.space import FloatArray, Space, make_space

N_CANDIDATES = 16
N_PROMPTS = 8
"""An adapter, the default."""
N_BASE_TEXTS = 4
"""An adapter, for the term that holds a merge to the base."""
FLOOR_NATS = 0.02
COMBINE = "mean_sqrt"
"""How a loss is made of experts, the default."""
CONVERGED = 1e-4
"""The largest standard deviation of a coefficient at which a search ends: what is left to find is not seen in
any answer."""
FIRST_CHECKPOINT, N_CHECKPOINTS = 160, 12


SpaceName = Literal["model", "layer"]
"""One coefficient an adapter, or one an adapter and layer."""


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """One search."""

    objective: str
    space: SpaceName
    seed: int
    evaluations: int
    retention: float = 0.0
    """Weight of KL(base, merge), in nats, on texts that the base wrote."""
    pull: float = 0.0
    """Weight of the mean of squared coefficients."""
    smooth: float = 0.0
    """Weight of coefficients' variance over layers, mean over adapters."""


@dataclass(frozen=True, slots=True)
class SearchJob:
    """A search on a variant of the zoo."""

    scene: Scene
    plan: SearchPlan
    n_prompts: int = N_PROMPTS
    """An adapter."""
    stop_at: float = float("inf")
    """Seconds since the epoch at which it ends, wherever it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What a search did last."""

    evaluations: int
    """So far."""
    tables: FloatArray
    """(n_candidates, n_groups, n_adapters)."""
    losses: FloatArray
    """(n_candidates,)."""
    mean: FloatArray
    """(n_groups, n_adapters) of the search distribution, after it learnt of these."""


def prompts_of_search(n_prompts: int) -> list[tuple[str, int]]:
    """Return the sources of a search's prompts, and how many an adapter it takes from each."""
    return [("skeleton", n_prompts), ("generic", min(n_prompts, N_BASE_TEXTS))]


class SearchLoss:
    """The loss of merges on the prompts of one seed."""

    def __init__(self, loaded: LoadedScene, n_prompts: int, seed: int) -> None:
        """Take signals, of the base's own texts too."""
        self._loaded = loaded
        prompts, texts = (loaded.prompts(source, n, seed) for source, n in prompts_of_search(n_prompts))
        self._yardstick = loaded.yardstick(prompts)
        self._retention = loaded.yardstick(score_everywhere(texts), of_base=True)
        labels = [e for e, scored in zip(prompts.expert, prompts.scored, strict=True) for _ in scored]
        self._by_expert = Means(labels, prompts.n_experts, loaded.parts.model.device)
        self._base: dict[str, Tensor] = {}

    def _distances(self, weights: dict[str, Tensor], objective: str) -> Tensor:
        """Return each expert's mean (n_experts,)."""
        return self._by_expert(self._yardstick.measure(weights, [objective]))[0]

    def losses(self, tables: FloatArray, plan: SearchPlan) -> FloatArray:
        """Return the losses (n_candidates,) of tables (n_candidates, n_groups, n_adapters)."""
        loaded, name = self._loaded, plan.objective
        if name not in self._base:
            self._base[name] = self._distances(loaded.weights(np.zeros(loaded.parts.shape)), name)
        losses = []
        for table in loaded.folds.table(tables):
            weights = loaded.folds.fold(table)
            per_expert = normalise(self._distances(weights, name), self._base[name], FLOOR_NATS)
            loss = combine_experts(per_expert, COMBINE)
            if plan.retention:
                loss = loss + plan.retention * self._retention.measure(weights, ["forward_kl"]).mean()
            losses.append(loss)
        terms = np.array([plan.pull, plan.smooth]) @ penalties(tables)
        return torch.stack(losses).double().cpu().numpy() + terms


def penalties(tables: FloatArray) -> FloatArray:
    """Return (2, n) of tables (n, n_groups, n_adapters): mean square, and mean variance over groups."""
    return np.stack([(tables**2).mean(axis=(1, 2)), tables.var(axis=1).mean(axis=1)])


@cache
def _load_loss(scene: Scene, n_prompts: int, seed: int) -> SearchLoss:
    return SearchLoss(scene.load(), n_prompts, seed)


def plan_space(loaded: LoadedScene, name: SpaceName) -> Space:
    """Return the space of a name over the scene's groups."""
    groups = loaded.parts.groups
    return make_space(groups, len(loaded.parts.names), coarse=group_modules(groups.group_of, name))


def generations(job: SearchJob) -> Iterator[Generation]:
    """Search; yield each generation, before them the start as one of its own without evaluations."""
    loaded, plan = job.scene.load(), job.plan
    loss = _load_loss(job.scene, job.n_prompts, plan.seed)
    space, first = plan_space(loaded, plan.space), loaded.setup.first
    start, spread = space.encode(first.start, first.spread)
    optimizer = BatchOptimizer(start, spread, N_CANDIDATES, budget=plan.evaluations, seed=plan.seed)
    mean = space.to_coefficients(start[None])
    yield Generation(0, mean, loss.losses(mean, plan), mean[0])
    for done in range(N_CANDIDATES, plan.evaluations + 1, N_CANDIDATES):
        genomes = optimizer.ask()
        tables = space.to_coefficients(genomes)
        losses = loss.losses(tables, plan)
        optimizer.tell(losses)
        yield Generation(done, tables, losses, space.to_coefficients(optimizer.mean()[None])[0])
        if optimizer.spread().max() < CONVERGED:
            return


def visited_merges(job: SearchJob) -> FloatArray:
    """Return candidates (n, n_groups, n_adapters) of a search, one drawn of each generation."""
    rng = np.random.default_rng(job.plan.seed)
    return np.stack([found.tables[rng.integers(len(found.tables))] for found in generations(job)])


def checkpoints(evaluations: int) -> list[int]:
    """Return about a dozen numbers of evaluations, ends of generations, evenly spaced in their logarithm."""
    first = FIRST_CHECKPOINT if evaluations > FIRST_CHECKPOINT else N_CANDIDATES
    generation = np.geomspace(first, evaluations, N_CHECKPOINTS) // N_CANDIDATES
    return sorted({int(number) * N_CANDIDATES for number in generation})


def long_search(job: SearchJob) -> dict[str, Any] | None:
    """Search to the end; return the plan and the curve, None if time was up before it began.

    The curve holds, at each checkpoint: evaluations, the mean's loss, its held-in N, worst task's N and held-
    out accuracy, and the mean of its coefficients' magnitudes.
    """
    if time.time() >= job.stop_at:
        return None
    loaded, plan, started_s = job.scene.load(), job.plan, time.monotonic()
    loss, wanted = _load_loss(job.scene, job.n_prompts, plan.seed), checkpoints(plan.evaluations)
    curve: list[dict[str, float]] = []
    is_cut = False
    for found in generations(job):
        is_cut = time.time() >= job.stop_at
        if found.evaluations in (0, *wanted) or is_cut:
            curve.append(_measure(loaded, loss, plan, found))
        if is_cut:
            break
    if curve[-1]["evaluations"] < found.evaluations:
        curve.append(_measure(loaded, loss, plan, found))
    reached = found.evaluations == wanted[-1]
    return {
        **asdict(plan),
        "ended_by": "evaluations" if reached else "seconds" if is_cut else "converged",
        "seconds": round(time.monotonic() - started_s, 1),
        "curve": {name: [round(point[name], 4) for point in curve] for name in curve[0]},
    }


def _measure(loaded: LoadedScene, loss: SearchLoss, plan: SearchPlan, found: Generation) -> dict[str, float]:
    true = loaded.summarise(loaded.accuracies(loaded.weights(found.mean)))
    return {
        "evaluations": found.evaluations,
        "loss": float(loss.losses(found.mean[None], plan)[0]),
        **true,
        "mean_abs": float(np.abs(found.mean).mean()),
    }
