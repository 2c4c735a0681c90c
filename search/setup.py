"""Everything before the search: weights, prior, prompts and what candidates are measured by.

Knows settings and the order of these steps; not the search, the clock or what becomes of the winner.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from search.adapters import Adapter
from search.balance import balanced_coefficients, find_misfits, relative_norms, update_products
from search.base import LoadedBase, load_base
from search.config import AdapterConfig, SearchConfig, config_hash
from search.errors import InputError
from search.evaluate import Scoring
from search.files import sha256_file
from search.objective import Objective, objective_label
from search.parts import Parts, assemble_parts, find_twins, identify_parts, load_adapters
from search.planning import choose_optimizer, finest_grouping, plan_stages
from search.plugin import load_objective
from search.priors import NeutralStart, PriorStart, load_prior, start_from_prior
from search.prompts import PromptRequest
from search.provenance import checkout_commit, library_versions
from search.resume import Record
from search.space import FloatArray
from search.stages import Stage
from search.steering import (
    Steering,
    SteeringRequest,
    WrittenPrompts,
    prepare_prompts,
    prepare_steering,
)
from search.trace import TraceWriter
from search.trust import bound

SPREAD_AT_ZERO = 0.15
"""First spread, in coefficients, around a start of 0, which has no half."""
TWINS = "the same weights under several names, each with a coefficient of its own: %s. Leave all but one out?"


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What a run is made of, checked, before anything is computed or written."""

    config: SearchConfig
    parts: Parts
    objective: Objective
    first: PriorStart
    """First coefficients and their spread; neutral where there is no prior."""
    prior: dict[str, str] | None
    """`source` and `sha256` of the prior's file."""
    balanced: FloatArray
    """(n_adapters,) coefficients under which all updates are equally long."""
    left_out: Mapping[str, str]
    """Name of each adapter that is not in `parts`, though configured, and why."""
    twins: Sequence[str]
    """Names of adapters in `parts` that are the same weights, a text for each set of them."""

    @property
    def adapter_configs(self) -> list[AdapterConfig]:
        """(n_adapters,) what the config says of the adapters in `parts`."""
        return [adapter for adapter in self.config.adapters if adapter.name in self.parts.names]

    def describe(self) -> dict[str, Any]:
        """Return the trace's header: what the run depends on."""
        return {
            "config": self.config.model_dump(mode="json"),
            "config_sha256": config_hash(self.config),
            "folder": str(Path.cwd()),
            "seed": self.config.search.seed,
            "objective": objective_label(self.objective),
            "prior": self.prior,
            "left_out": dict(self.left_out),
            **identify_parts(self.parts),
            "versions": library_versions(),
            "commit": checkout_commit(),
        }

    def describe_prior(self) -> dict[str, Any] | None:
        """Return the prior's file and which adapters it does not know; None where there is no prior."""
        return {**self.prior, "missing": self.first.missing} if self.prior else None

    def write_prompts(self, trace: TraceWriter, record: Record) -> WrittenPrompts:
        """Write the prompts, or take those that an earlier run recorded."""
        settings = self.config.prompts
        request = PromptRequest(
            per_adapter=settings.per_adapter + settings.unseen_per_adapter,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            max_slot_tokens=settings.max_slot_tokens,
            seed=self.config.search.seed,
            positions=self.config.objective.positions,
        )
        skeletons = [adapter.skeletons for adapter in self.adapter_configs]
        recorded = record.event("prompts")
        return prepare_prompts(self.parts, skeletons, request, settings.per_adapter, trace, recorded)

    def steer(self, prompts: WrittenPrompts, trace: TraceWriter, record: Record) -> Steering:
        """Take the experts' signals and score the references."""
        objective = self.config.objective
        scoring = Scoring(
            objective=self.objective,
            combine=objective.combine,
            tokens_per_forward=self.config.search.tokens_per_forward,
            compiled=self.config.search.compile,
            n_ahead=self.config.search.max_evaluations,
        )
        request = SteeringRequest(
            scoring=scoring,
            weak_signal_nats=objective.weak_signal_nats,
            prior=self.first.start if self.prior else None,
            balanced=self.balanced,
            recorded=record.event("signals"),
        )
        return prepare_steering(self.parts, prompts, request, trace)

    def plan(self, steering: Steering) -> list[Stage]:
        """Return the stages of the search."""
        return plan_stages(self.config, self.parts.groups, len(self.parts.names), steering.bounds)


def load_setup(
    config: SearchConfig, base: LoadedBase | None = None, objective: Objective | None = None
) -> Setup:
    """Load adapters, base, prior and objective, and check that they fit and the optimiser can be had.

    Args:
        base: the configured base, if it is loaded already.
        objective: in place of the configured one.

    Raises:
        InputError: for weights, files or settings that do not fit.
    """
    objective = objective or load_objective(config.objective.name)
    adapters, missing = load_adapters(config)
    base = base or load_base(
        config.base.source, revision=config.base.revision, device=config.device, dtype=config.base.dtype
    )
    setup = make_setup(config, base, adapters, objective)
    return replace(setup, left_out={**missing, **setup.left_out})


def make_setup(
    config: SearchConfig, base: LoadedBase, adapters: Sequence[Adapter], objective: Objective
) -> Setup:
    """Check that what is loaded fits, and leave out adapters that no merge can use.

    Raises:
        InputError: for weights, a prior or settings that do not fit.
    """
    parts = _assemble(base, adapters, config)
    if misfits := _find_misfits(parts, config.search.max_relative_norm):
        parts = _assemble(base, [a for a in parts.adapters if a.name not in misfits], config)
    if twins := find_twins(parts.adapters):
        logging.getLogger(__name__).warning(TWINS, "; ".join(twins))
    balanced = balanced_coefficients(update_products(parts.stacked))
    first, prior = _choose_start(config, parts, balanced)
    setup = Setup(config, parts, objective, first, prior, balanced, misfits, twins)
    _check_optimizer(setup)
    return setup


def _assemble(base: LoadedBase, adapters: Sequence[Adapter], config: SearchConfig) -> Parts:
    return assemble_parts(
        base,
        adapters,
        base_name=config.base.name,
        kind=finest_grouping(config.search),
        layers_per_block=config.search.space.layers_per_block,
    )


def _find_misfits(parts: Parts, limit: float | None) -> Mapping[str, str]:
    """Return the adapters that no merge can use and why, with a warning; refuse (InputError) if all are."""
    misfits = find_misfits(parts.names, relative_norms(parts.model, parts.stacked), limit)
    found = "; ".join(f"{name}: {reason}" for name, reason in misfits.items())
    if len(misfits) == len(parts.names):
        raise InputError(f"no adapter can be merged: {found}. Check the files, or search.max_relative_norm.")
    if misfits:
        logging.getLogger(__name__).warning("left out of the merge: %s", found)
    return misfits


def neutral_start(config: SearchConfig, parts: Parts, balanced: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return first coefficients and their spread, both (n_groups, n_adapters), where there is no prior."""
    settings = config.search
    row = balanced if settings.start == "balanced" else np.full(len(balanced), settings.start)
    start: FloatArray = np.broadcast_to(row, parts.shape).copy()
    half = np.where(start == 0, SPREAD_AT_ZERO, np.abs(start) / 2)
    spread: FloatArray = half if settings.sigma is None else np.full(parts.shape, settings.sigma)
    return start, spread


def _choose_start(
    config: SearchConfig, parts: Parts, balanced: FloatArray
) -> tuple[PriorStart, dict[str, str] | None]:
    """Return the neutral start, or the prior's."""
    settings = config.search
    start, spread = neutral_start(config, parts, balanced)
    if settings.prior is None:
        return PriorStart(start, spread, ()), None
    neutral = NeutralStart(
        names=parts.names,
        hashes=[adapter.sha256 for adapter in parts.adapters],
        base_sha256=parts.base.sha256,
        groups=parts.groups.names,
        start=start,
        spread=spread,
    )
    prior = load_prior(path := settings.prior_path)
    first = start_from_prior(prior, neutral, allow_changed=settings.allow_changed_adapters)
    if settings.space.sign == "non_negative":
        first = _lift_to_zero(first)
    return first, {"source": str(path), "sha256": sha256_file(path)}


def _lift_to_zero(first: PriorStart) -> PriorStart:
    """Put a start into a space without negative coefficients: it is scored as a reference, and may win."""
    if n_negative := int((first.start < 0).sum()):
        logging.getLogger(__name__).warning(
            "the prior has %d negative coefficients and the space is `sign: non_negative`: 0 there",
            n_negative,
        )
    return replace(first, start=first.start.clip(min=0.0))


def _check_optimizer(setup: Setup) -> None:
    """Refuse an optimiser that cannot search one of the stages (InputError)."""
    nobody_weak = bound(np.zeros(len(setup.parts.names)), setup.balanced)
    settings = setup.config.search
    for stage in plan_stages(setup.config, setup.parts.groups, len(setup.parts.names), nobody_weak):
        genome = np.zeros(stage.space.n_params)
        choose_optimizer(settings).make(genome, np.ones_like(genome), settings.max_evaluations, 0)
    if settings.gradient.inject_every and not choose_optimizer(settings).takes_injections:
        raise InputError(
            f"search.gradient.inject_every is {settings.gradient.inject_every}, but optimizer "
            f"{settings.optimizer!r} with {settings.n_candidates} candidates takes no injected ones; use CMA "
            "with more candidates, or 0"
        )
