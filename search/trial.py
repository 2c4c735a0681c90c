"""Try a run on a few prompts, up to where its search would begin, and time what the search would do.

Knows the phases and what to measure in each; not what a run of full size makes of it.
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from search.delivery import rehearse_merge
from search.evaluate import PopulationEvaluator
from search.forecast import Cost, Timing, fit_cost
from search.memory import host_peak
from search.parts import Parts
from search.recorded import TRACE_FILE
from search.resume import Record
from search.setup import Setup
from search.space import FloatArray
from search.steering import Steering, WrittenPrompts
from search.trace import Trace, TraceWriter

_Made = TypeVar("_Made")

FEW_SEARCHED, FEW_UNSEEN = 2, 1
"""Prompts an adapter to try on: from one block of prompts to two is what each further one costs."""

LONG_S = 5.0
"""What has taken so long is not timed again."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """What was measured on few prompts."""

    prompts: WrittenPrompts
    prompts_s: float
    steering: Steering
    signals_s: float
    """With the references' scores."""
    peak_kl_nats: FloatArray
    entropy_ratio: FloatArray
    """(n_adapters,) as the trace has it; NaN where it is not finite."""
    cost: Cost
    gradient_s: float | None
    """Of one step; None where none is configured."""
    rehearsal_s: float
    peak_bytes: int
    """On the device of a GPU, else of the process since its start."""


def try_run(setup: Setup, folder: Path) -> Trial:
    """Go through the phases before a search, and score a few candidates; all files go to `folder`.

    Raises:
        InputError: as a run would.
        torch.OutOfMemoryError: if one prompt does not fit into memory.
    """
    logger, model = logging.getLogger(__name__), setup.parts.model
    config = setup.config
    few = {"per_adapter": FEW_SEARCHED, "unseen_per_adapter": FEW_UNSEEN}
    prompt_settings = config.prompts.model_copy(update=few)
    small = replace(setup, config=config.model_copy(update={"prompts": prompt_settings}))
    with TraceWriter(path := folder / TRACE_FILE) as trace:
        trace.header({})
        logger.info("writing %d prompts an adapter", sum(few.values()))
        prompts, prompts_s = _timed(lambda: small.write_prompts(trace, Record()))
        peaks = [_peak_memory(model.device)]
        logger.info("asking the experts, and timing candidates")
        steering, signals_s = _timed(lambda: small.steer(prompts, trace, Record()))
        peaks.append(_peak_memory(model.device))
    cost = _time_candidates(steering.searched, setup.parts, config.search.n_candidates)
    peaks.append(_peak_memory(model.device))
    uniform = steering.references[1].coefficients
    gradient_s = _time_gradient(setup, steering, uniform)
    peaks.append(_peak_memory(model.device))
    logger.info("rehearsing the merge")
    signals = Trace.load(path).last("signals") or {}
    return Trial(
        prompts=prompts,
        prompts_s=prompts_s,
        steering=steering,
        signals_s=signals_s,
        peak_kl_nats=np.array(signals["peak_kl_nats"], dtype=np.float64),  # null becomes NaN
        entropy_ratio=np.array(signals["entropy_ratio"], dtype=np.float64),
        cost=cost,
        gradient_s=gradient_s,
        rehearsal_s=rehearse_merge(setup.parts, uniform, config.base.name, folder),
        peak_bytes=max(peaks),
    )


def _time_candidates(evaluator: PopulationEvaluator, parts: Parts, n_candidates: int) -> Cost:
    """Time one candidate, and a generation on one block of prompts and on two, where there are two."""

    def measure(n: int, n_blocks: int) -> Timing:
        n_tokens = 0

        def score() -> None:
            nonlocal n_tokens
            n_tokens = evaluator.score_blocks(uniform[:n], range(n_blocks)).n_tokens

        seconds = _median_seconds(score)
        return Timing(n, n_tokens // n, seconds)

    uniform = np.full((n_candidates, *parts.shape), 1 / len(parts.names))
    many = measure(n_candidates, 1)
    more = measure(n_candidates, 2) if evaluator.n_blocks > 1 else many
    return fit_cost(measure(1, 1), many, more)


def _time_gradient(setup: Setup, steering: Steering, at: FloatArray) -> float | None:
    settings = setup.config.search.gradient
    if not settings.refine_steps and not settings.inject_every:
        return None
    return _median_seconds(lambda: steering.searched.gradient(at))


def _timed(step: Callable[[], _Made]) -> tuple[_Made, float]:
    """Return what a step makes, and its seconds."""
    started_s = time.monotonic()
    return step(), time.monotonic() - started_s


def _median_seconds(step: Callable[[], object]) -> float:
    """Median of three, or of fewer that are long."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < LONG_S:
        seconds.append(_timed(step)[1])
    return statistics.median(seconds)


def _peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU since an evaluator last reset the count, else of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host_peak()
