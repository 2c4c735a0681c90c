"""A dry run: try a configuration on a few prompts, and foresee from that what the whole run would take.

Knows a run's settings and how each phase grows with them; searches nothing, writes only to a temporary
folder, and leaves judgement and wording to others.
"""

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from search.base import LoadedBase
from search.config import SearchConfig
from search.diagnosis import (
    AdapterFacts,
    BaseFacts,
    Diagnosis,
    PriorFacts,
    PromptFacts,
    StageFacts,
)
from search.ending import estimate_finalists_s
from search.errors import InputError
from search.footprint import foresee_memory
from search.forecast import SearchPlan, Timetable, forecast_search, race_seconds
from search.parts import Parts, identify_parts
from search.plain_cma import DIAGONAL_ABOVE
from search.planning import list_spaces
from search.racing import plan_race
from search.setup import Setup, load_setup
from search.steering import Steering
from search.trial import FEW_SEARCHED, FEW_UNSEEN, Trial, try_run


def examine(config: SearchConfig, base: LoadedBase | None = None, *, reserve_s: float = 0.0) -> Diagnosis:
    """Foresee a run of this configuration, at the cost of loading it and of a few candidates.

    Args:
        base: the configured base, if it is loaded already.
        reserve_s: seconds of the time box that are the caller's, as for a run.

    Raises:
        InputError: for what a run would refuse, or where one prompt alone does not fit into memory.
    """
    started_s = time.monotonic()
    logging.getLogger(__name__).info("loading the base and %d adapters", len(config.adapters))
    try:
        setup = load_setup(config, base)
        load_s = time.monotonic() - started_s
        with tempfile.TemporaryDirectory(prefix="concord-doctor-") as folder:
            trial = try_run(setup, Path(folder))
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"memory ran out before a single candidate was scored ({str(error).splitlines()[0]}). Free the "
            "device, choose a narrower base.dtype, or lower prompts.max_new_tokens."
        ) from error
    return _diagnose(setup, trial, reserve_s, load_s)


def _diagnose(setup: Setup, trial: Trial, reserve_s: float, load_s: float) -> Diagnosis:
    settings, prompts = setup.config.search, _describe_sizes(setup, trial)
    gradient_s = trial.gradient_s and trial.gradient_s * prompts.searched / FEW_SEARCHED
    times = replace(
        _foresee_times(setup, trial, prompts, gradient_s or 0.0), caller_s=reserve_s, load_s=load_s
    )
    plan = SearchPlan(
        n_candidates=settings.n_candidates,
        max_evaluations=settings.max_evaluations,
        shares=tuple(share for _, share in list_spaces(settings)),
    )
    return Diagnosis(
        base=_describe_base(setup.parts),
        adapters=_describe_adapters(setup, trial),
        left_out=dict(setup.left_out),
        weak_signal_nats=setup.config.objective.weak_signal_nats,
        groups=setup.parts.groups.names,
        stages=_describe_stages(setup, trial.steering),
        prior=PriorFacts(setup.prior["source"], setup.first.missing) if setup.prior else None,
        prompts=prompts,
        candidate_s=trial.cost.seconds(1, prompts.tokens_per_candidate),
        gradient_s=gradient_s,
        race_keep=settings.race_keep,
        n_finalists=settings.n_finalists,
        times=times,
        plan=plan,
        forecast=forecast_search(times, plan),
        memory=foresee_memory(setup, trial, prompts),
    )


def _describe_base(parts: Parts) -> BaseFacts:
    computes = identify_parts(parts)
    return BaseFacts(
        id=parts.base.source,
        n_parameters=sum(parameter.numel() for parameter in parts.model.parameters()),
        dtype=computes["dtype"],
        device=computes["device"],
        device_name=computes["device_name"],
    )


def _describe_adapters(setup: Setup, trial: Trial) -> tuple[AdapterFacts, ...]:
    facts = []
    reasons = dict(zip(trial.steering.weak, trial.steering.reasons, strict=True))
    signals = trial.peak_kl_nats.tolist(), trial.entropy_ratio.tolist()
    for adapter, settings, peak, ratio in zip(
        setup.parts.adapters, setup.adapter_configs, *signals, strict=True
    ):
        ranks = [factors.A.shape[0] for factors in adapter.modules.values()]
        scalings = [factors.scaling for factors in adapter.modules.values()]
        facts.append(
            AdapterFacts(
                name=adapter.name,
                n_modules=len(adapter.modules),
                ranks=(min(ranks), max(ranks)),
                scalings=(min(scalings), max(scalings)),
                sha256=adapter.sha256,
                has_skeletons=bool(settings.skeletons),
                peak_kl_nats=peak,
                entropy_ratio=ratio,
                weak_reason=reasons.get(adapter.name, ""),
            )
        )
    return tuple(facts)


def _describe_stages(setup: Setup, steering: Steering) -> tuple[StageFacts, ...]:
    name = setup.config.search.optimizer
    spaces = [space for space, _ in list_spaces(setup.config.search)]
    facts = []
    for space, stage in zip(spaces, setup.plan(steering), strict=True):
        n_params = stage.space.n_params
        kind = "diagonal" if n_params > DIAGONAL_ABOVE else "full"
        facts.append(
            StageFacts(
                groups=space.groups,
                genome=space.genome,
                n_params=n_params,
                optimizer=f"{name}, {kind} covariance" if name == "CMA" else name,
            )
        )
    return tuple(facts)


def _describe_sizes(setup: Setup, trial: Trial) -> PromptFacts:
    settings = setup.config.prompts
    written = trial.prompts.searched, trial.prompts.unseen
    return PromptFacts(
        n_adapters=len(setup.parts.names),
        searched=settings.per_adapter,
        unseen=settings.unseen_per_adapter,
        tried_searched=FEW_SEARCHED,
        tried_unseen=FEW_UNSEEN,
        tokens_per_prompt=sum(part.n_tokens for part in written) / sum(part.n_prompts for part in written),
    )


def _foresee_times(setup: Setup, trial: Trial, prompts: PromptFacts, gradient_s: float) -> Timetable:
    """Scale what was measured up to all prompts; the caller's and loading are left at 0.

    Args:
        gradient_s: one step, on all searched prompts.
    """
    settings, steps, cost = setup.config.search, setup.config.search.gradient, trial.cost
    block_tokens = prompts.tokens_per_candidate / prompts.searched
    rungs = plan_race(settings.n_candidates, prompts.searched, settings.race_keep)
    # a descent takes one gradient more than steps
    injection_s = gradient_s * (steps.inject_steps + 1) / steps.inject_every if steps.inject_every else 0.0
    refine_s = gradient_s * (steps.refine_steps + 1) if steps.refine_steps else 0.0
    together = len(trial.steering.references) + settings.n_finalists
    unseen_s = cost.seconds(together, prompts.unseen * block_tokens) / together
    judge_s = estimate_finalists_s(replace(trial.steering, unseen_candidate_s=unseen_s), settings.n_finalists)
    return Timetable(
        time_box_s=settings.time_box_s,
        caller_s=0.0,
        load_s=0.0,
        prompts_s=prompts.growth * trial.prompts_s,
        signals_s=prompts.growth * trial.signals_s,
        rehearsal_s=trial.rehearsal_s,
        generation_s=race_seconds(cost, rungs, block_tokens) + injection_s,
        finalists_s=refine_s + judge_s,
        merge_s=trial.rehearsal_s + cost.seconds(1, prompts.tokens_per_candidate),
    )
