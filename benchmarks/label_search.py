"""The search of the method, steered by labels in place of the objective: what its space holds at most.

Knows spaces, optimisers and losses a task; not where the labels are from.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.loop import SearchTools
from search.planning import choose_optimizer, plan_stages, set_limits
from search.racing import BlockScores
from search.resume import Record
from search.setup import Setup
from search.space import FloatArray
from search.stages import Found, StagedSearch, run_stages
from search.timebox import TimeBox
from search.trace import TraceWriter
from search.trust import bound

NO_LIMIT_S = 1e9

LossesOf = Callable[[FloatArray], FloatArray]
"""From coefficients (n_groups, n_adapters) to losses (n_tasks,)."""


class LabelEvaluator:
    """Gives losses a task as if tasks were experts with one prompt each, and their mean as the loss."""

    n_blocks = 1

    def __init__(self, losses_of: LossesOf) -> None:
        self._losses_of = losses_of

    def score_blocks(self, coefficients: FloatArray, blocks: Sequence[int]) -> BlockScores:
        """Score coefficients (n_candidates, n_groups, n_adapters) on all there is."""
        losses = np.stack([self._losses_of(table) for table in coefficients])
        n_tasks = losses.shape[1]
        return BlockScores(
            sums=losses,
            counts=np.ones(n_tasks),
            prompts=np.arange(n_tasks),
            prompt_means=losses,
            n_tokens=0,
            peak_bytes=None,
        )

    def combine(self, sums: FloatArray, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean losses (n_candidates,) and those a task (n_candidates, n_tasks)."""
        per_task = sums / counts
        return per_task.mean(axis=1), per_task


def search_labels(setup: Setup, losses_of: LossesOf, path: Path) -> tuple[FloatArray, dict[str, Any]]:
    """Search the configured space with as many evaluations as configured, from the same start and seed.

    Not raced and not ended by the clock: labels are cheap to look at again.

    Args:
        path: of the trace.

    Returns:
        Coefficients (n_groups, n_adapters) of the best of archive and mean, and what the search spent.
    """
    free = bound(np.zeros(len(setup.parts.names)), setup.balanced)
    evaluator = LabelEvaluator(losses_of)
    with TraceWriter(path) as trace:
        trace.header(setup.describe())
        search = StagedSearch(
            stages=plan_stages(setup.config, setup.parts.groups, len(setup.parts.names), free),
            choice=choose_optimizer(setup.config.search),
            limits=set_limits(setup.config.search),
            evaluator=evaluator,
            search_s=NO_LIMIT_S,
            past_of=Record().past,
            inject_every=0,
            improve=lambda mean: mean,
        )
        tools = SearchTools(trace=trace, timebox=TimeBox(NO_LIMIT_S))
        found = run_stages(search, setup.first.start, setup.first.spread, tools)
    return _choose(found, losses_of), {"evaluations": found.evaluations, "ended_by": found.ended_by}


def _choose(found: Found, losses_of: LossesOf) -> FloatArray:
    candidates: list[FloatArray] = [*found.archive[:1], found.mean]
    return min(candidates, key=lambda table: float(losses_of(table).mean()))
