"""What a search in the competition's kit steers by: prompts, what the experts say on them, two evaluators.

Knows a run's models and its settings as plain values; not the kit, optimisers or time. The same as
`search.steering`, without resumption.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from search.errors import InputError
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import ExpertSignals, TokenBudget, default_token_budget, expert_signals, plan_budget
from search.finalists import SINGLE, Bounds, make_references, stack_coefficients
from search.groups import Groups
from search.prompts import PromptSet, describe_prompts, write_prompts
from search.space import FloatArray, Space
from search.stack import StackedFactors
from search.timebox import TimeBox
from search.trust import Evidence, weigh


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KitRun:
    """What a search in the kit is made of."""

    model: Any
    tokenizer: Any
    stacked: StackedFactors
    groups: Groups
    skeletons: Sequence[Sequence[str]]
    """(n_adapters,) each adapter's own."""
    settings: Any
    """Sections `search`, `prompts` and `objective`, with the configuration's keys as attributes."""
    box: TimeBox
    trace: Any
    """Has `event(name, **content)` and `write(kind, **content)`."""
    start: FloatArray
    """(n_groups, n_adapters) first coefficients."""
    spread: FloatArray
    """(n_groups, n_adapters) their standard deviations."""
    balanced: FloatArray
    """(n_adapters,) coefficients under which all updates are equally long."""
    has_prior: bool
    make_space: Callable[[FloatArray, FloatArray], Space]
    """From low and high bounds (n_adapters,) to a space."""
    measure_later: Callable[[], float]
    """Measures the seconds that the caller needs after the run."""
    mix: Callable[[FloatArray], object]
    """Merges by coefficients (n_groups, n_adapters). The model stays as it is."""


class KitSteering:
    """Prompts, evaluators on those searched and on unseen ones, references and bounds."""

    def __init__(self, run: KitRun) -> None:
        """Write the prompts, ask the experts, and score the merges that need no search."""
        self._run, self._names, self._log = run, run.stacked.names, logging.getLogger(__name__)
        self._models = run.model, run.stacked, run.groups
        self._log.info("prompts")
        searched, unseen = self._write_prompts()
        self._log.info("signals")
        signals = self._ask_experts(searched, unseen)
        prior = run.start if run.has_prior else None
        self.references = make_references(len(run.groups.names), self._names, run.balanced, prior)
        """Those that concern all experts, then every expert alone."""
        self.bounds = self._weigh(signals, searched)
        general = self.references[: -len(self._names)]
        self.known = self.searched.score(stack_coefficients(general))
        """Scores of the general references on the searched prompts."""
        names = [reference.name for reference in general]
        run.trace.event("references", names=names, losses=self.known.losses, per_expert=self.known.per_expert)

    def _write_prompts(self) -> tuple[PromptSet, PromptSet]:
        run, settings = self._run, self._run.settings.prompts
        n_asked = settings.per_adapter + settings.unseen_per_adapter
        told = {"seed": run.settings.search.seed, "positions": run.settings.objective.positions}
        request: Any = SimpleNamespace(**{**vars(settings), **told, "per_adapter": n_asked})
        prompts = write_prompts(run.model, run.tokenizer, *self._models[1:], run.skeletons, request)
        searched, unseen = prompts.split(settings.per_adapter)
        shown = [describe_prompts(part, self._names) for part in (searched, unseen)]
        run.trace.event("prompts", searched=shown[0], unseen=shown[1])
        return searched, unseen

    def _ask_experts(self, searched: PromptSet, unseen: PromptSet) -> ExpertSignals:
        """Make an evaluator of each set of prompts; return what the experts say on the first."""
        objective, asked = self._run.settings.objective, self._run.settings.search.tokens_per_forward
        budget = TokenBudget(asked or default_token_budget(self._run.model.device), by_memory=asked is None)
        n_kept = sum(len(scored) for prompts in (searched, unseen) for scored in prompts.scored)
        plan_budget(*self._models, searched, budget, n_kept)
        scoring = Scoring(
            objective=objective.name, combine=objective.combine, tokens_per_forward=asked, compiled=False
        )
        signals = [expert_signals(*self._models, prompts, budget) for prompts in (searched, unseen)]
        self.searched, self.unseen = (
            PopulationEvaluator(*self._models, prompts, own, scoring, budget)
            for prompts, own in zip((searched, unseen), signals, strict=True)
        )
        is_finite = np.isfinite([self.searched.base_per_expert, self.unseen.base_per_expert]).all(axis=0)
        if not is_finite.all():
            found = ", ".join(self._names[expert] for expert in np.flatnonzero(~is_finite).tolist())
            raise InputError(
                f"the base gives no finite numbers on prompts of {found}. Leave the adapter out."
            )
        return signals[0]

    def _weigh(self, signals: ExpertSignals, prompts: PromptSet) -> Bounds:
        """Bound the coefficients of adapters whose prompts leave doubt around the balanced merge's."""
        weak_signal_nats = self._run.settings.objective.weak_signal_nats
        rivals = np.full((len(self._names), len(self._names)), np.inf)
        if weak_signal_nats > 0:
            singles = [reference for reference in self.references if reference.name.startswith(SINGLE)]
            rivals = self.searched.score(stack_coefficients(singles)).per_expert
        from_skeleton = np.zeros(len(self._names), dtype=bool)
        from_skeleton[prompts.expert[list(prompts.from_skeleton)]] = True
        evidence = Evidence(
            names=self._names,
            peak_kl=signals.peak_kl,
            entropy_ratio=signals.entropy_ratio,
            from_skeleton=from_skeleton,
            rivals=rivals,
        )
        trust = weigh(evidence, weak_signal_nats, self._run.balanced)
        doubts = {name: why for name, why in zip(self._names, trust.reasons, strict=True) if why}
        shown = {"peak_kl_nats": signals.peak_kl, "low": trust.bounds.low, "high": trust.bounds.high}
        self._run.trace.event("signals", weak=doubts, **shown)
        if doubts:
            self._log.warning("weak signal, kept near the balanced merge: %s", doubts)
        return trust.bounds
