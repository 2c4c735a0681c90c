"""LoraHub: one weight per adapter, on A and on B, searched without gradients; here without labels, too.

Knows how A and B are summed and what a candidate costs; not prompts, optimisers or how losses come about.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from llm_merging.merging.peft_linear import multiply_sums
from llm_merging.merging.prompted import PromptedSearch, prompted_search
from llm_merging.merging.updates import UpdateMerge
from search.adapters import Adapter
from search.archive import Archive
from search.evaluate import PopulationEvaluator
from search.loop import Scores
from search.merge import touched_modules
from search.objective import objective_label
from search.optimizer import BatchOptimizer
from search.space import FloatArray
from search.stack import at_least_float32

BOUND = 1.5
"""Weights lie in [-1.5, 1.5]."""
PENALTY = 0.05
"""Times mean_i |w_i|, added to the loss."""
OPTIMIZER, SPREAD = "Cobyla", 0.5
"""What nevergrad's NGOpt is in this box for up to some hundred evaluations, and how far it steps at first."""


class LoraHub(UpdateMerge):
    """base + (sum_i w_i s_i B_i)(sum_i w_i A_i), with w = argmin loss(w) + 0.05 mean_i |w_i| in [-1.5, 1.5].

    Huang et al. 2023 (arXiv:2307.13269), section 3, and its released code: start, bounds and penalty are its.
    A and B are summed apart, so an adapter has w_i^2 and every two have cross terms. Not as there:
    - The loss is my_merge's, on the same prompts, since theirs needs labelled examples.
    - Their code keeps the first adapter's alpha for the sum. Scalings differ here, so each goes with its B,
      which is the same where they are equal. They refuse unequal ranks; here zeros fill the smaller ones.
    - Their code's optimiser, nevergrad's NGOpt, chooses by the number of evaluations, 40 there, which a clock
      does not tell, and some of its choices fail with numpy 2. So what it chooses for 40, and up to some
      hundred, is taken: Cobyla, here for as long as the time box and `search.max_evaluations` allow. Every
      candidate is scored on all prompts.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._found: dict[str, Any] = {}
        self._provenance: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """Return the weights that were found, what they were found by, and the method's constants."""
        constants = {"optimizer": OPTIMIZER, "spread": SPREAD, "bound": BOUND, "penalty": PENALTY}
        return {**constants, **self._found}

    def merged_updates(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """Search for the weights; return their update of each touched module.

        Raises:
            InputError: when no candidate has a finite loss.
        """
        with prompted_search(self) as search:
            parts, configured = search.setup.parts, search.setup.config.objective
            sums = CrossSums(parts.adapters, self.base_model)
            weights, penalised, per_expert = search_weights(search, sums)
            objective = {"name": objective_label(search.setup.objective), "combine": configured.combine}
            loss = penalised - penalty(weights)
            self._found = {
                "weights": dict(zip(parts.names, weights.tolist(), strict=True)),
                "objective": {**objective, "loss": loss, "per_expert": per_expert.tolist()},
            }
            self._provenance = search.provenance()
        self.ended_by = search.ended_by or ""
        self.report = f"lorahub: loss {loss:.4f} after {search.evaluations} evaluations on the same prompts"
        return sums.updates(weights)

    def _document(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        document = super()._document(adapters)
        return {**document, "provenance": {**document["provenance"], **self._provenance}}


class CrossSums:
    """(sum_i w_i s_i B_i)(sum_i w_i A_i) of every module, for any weights."""

    def __init__(self, adapters: Sequence[Adapter], model: Any) -> None:
        """Move the factors to the model's device, in float32 at least, scaling multiplied into B."""
        self._pairs: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        for module in touched_modules(adapters):
            own = [(i, f) for i, a in enumerate(adapters) if (f := a.modules.get(module)) is not None]
            self._pairs[module] = [
                (i, _widen(f.A, model.device), f.scaling * _widen(f.B, model.device)) for i, f in own
            ]

    def updates(self, weights: FloatArray) -> dict[str, Tensor]:
        """Return each module's update (d_out, d_in) under weights (n_adapters,)."""
        w = weights.tolist()
        return {
            module: multiply_sums([(w[i] * A, w[i] * B) for i, A, B in pairs])
            for module, pairs in self._pairs.items()
        }


def _widen(matrix: Tensor, device: Any) -> Tensor:
    return matrix.to(device, at_least_float32(matrix.dtype))


def penalty(weights: FloatArray) -> float:
    """Return 0.05 mean_i |w_i| of weights (n_adapters,)."""
    return PENALTY * float(np.abs(weights).mean())


def search_weights(search: PromptedSearch, sums: CrossSums) -> tuple[FloatArray, float, FloatArray]:
    """Ask, evaluate, tell, until the limits or the clock end it.

    Returns:
        The best weights (n_adapters,), their loss with the penalty, and per_expert (n_experts,).

    Raises:
        InputError: when no candidate has a finite loss.
    """
    settings, n_adapters = search.setup.config.search, search.setup.parts.shape[1]
    start, budget = np.zeros(n_adapters), settings.max_evaluations
    optimizer = BatchOptimizer(start, SPREAD, 1, budget, settings.seed, OPTIMIZER)
    evaluator, archive = search.evaluator(), Archive(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Invalid RHOEND")  # nevergrad asks Cobyla for a tolerance of 0
        try:
            while search.may_go_on(1):
                weights = bounce(optimizer.ask())
                scores = score_weights(evaluator, sums, weights[0])
                search.record(weights, scores)
                archive.add(weights, scores.losses, scores.per_expert)
                optimizer.tell(scores.losses)
        finally:
            del optimizer  # with it ends Cobyla's thread, which a process would wait for
    found, losses, per_expert = archive.contents(n_adapters, n_adapters)
    return found[0], float(losses[0]), per_expert[0]


def bounce(weights: FloatArray) -> FloatArray:
    """Fold weights back at the bounds, as nevergrad's bounded arrays do."""
    folded = np.copysign(BOUND - np.abs(np.abs(weights) - BOUND), weights)
    return folded.clip(-BOUND, BOUND)


def score_weights(evaluator: PopulationEvaluator, sums: CrossSums, weights: FloatArray) -> Scores:
    """Score weights (n_adapters,); the loss holds the penalty, per_expert does not."""
    scores = evaluator.score_updates(sums.updates(weights))
    return replace(scores, losses=scores.losses + penalty(weights))
