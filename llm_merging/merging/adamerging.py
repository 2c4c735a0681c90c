"""AdaMerging: coefficients per adapter and layer that make the merge surest of its answers, by gradient.

Knows prompts, an entropy and its gradient; not what any expert says.
"""

import math

import numpy as np

from llm_merging.merging.coefficients import deliver_coefficients
from llm_merging.merging.Merges import Merges
from llm_merging.merging.prompted import PromptedSearch, prompted_search
from search.errors import InputError
from search.evaluate import Scoring
from search.gradient import Descent, adam_descend
from search.groups import Groups, group_modules
from search.loop import Scores
from search.space import FloatArray

START, LOW, HIGH = 0.3, 0.0, 1.0
"""The first value of every coefficient, and where the authors' code clamps them."""
MAX_STEPS = 500
"""As many as the authors' code takes."""
LEARNING_RATE = 0.02


class AdaMerging(Merges):
    """base + sum_i c[g, i] s_i B_i A_i, with c = argmin mean_i mean_t H(p_m) at expert i's positions t.

    Yang et al. 2023 (arXiv:2310.02575), section 3.2, layer-wise; by Adam from 0.3, in [0, 1], as in its code.
    Not as there: the inputs are not unlabelled test data but the prompts that the experts write for my_merge,
    all of them in each step; a layer is a decoder layer, not one parameter of it; the learning rate is 0.02,
    not 1e-3, as a time box has room for tens to hundreds of steps; and of all visited points the one of
    lowest loss is kept, not the last. Each expert counts the same, however many positions it has.
    """

    def merge(self) -> None:
        """Descend until the time box or the limits end it, write the merge and fold it into the base."""
        self._load_everything()
        with prompted_search(self) as search:
            parts, nats = search.setup.parts, math.log(search.signals.logits.shape[-1])
            groups = group_modules(parts.groups.group_of, "layer")
            descent = descend_entropy(search, groups, nats)
            first, best = descent.losses[0] * nats, descent.best_loss * nats
            deliver_coefficients(
                self,
                parts.adapters,
                descent.best,
                groups,
                objective={"name": "entropy_minimisation", "combine": "mean", "loss": best},
                provenance=search.provenance(),
            )
        self.ended_by = search.ended_by or ""
        steps = len(descent.losses) - 1
        self.report = f"adamerging: mean entropy {best:.4f} nats after {steps} steps, {first:.4f} before"


def descend_entropy(search: PromptedSearch, groups: Groups, floor_nats: float) -> Descent:
    """Minimise the mean entropy, in units of `floor_nats`, over coefficients (n_groups, n_adapters).

    Args:
        floor_nats: the largest entropy that there is. The evaluator divides each expert's mean by the base's,
            but at least by this: so it is the same constant for all, which Adam does not see.

    Raises:
        InputError: if the first loss is not finite.
    """
    tokens_per_forward = search.setup.config.search.tokens_per_forward
    scoring = Scoring(
        objective="entropy_minimisation",
        combine="mean",
        floor_nats=floor_nats,
        tokens_per_forward=tokens_per_forward,
    )
    evaluator = search.evaluator(scoring, groups)

    def gradient_of(coefficients: FloatArray) -> tuple[float, FloatArray]:
        if not search.may_go_on(1):
            return math.nan, coefficients  # ends the descent
        found = evaluator.gradient(coefficients)
        scores = Scores(np.array([found.loss]), found.per_expert[None], found.n_tokens, None)
        search.record(coefficients.reshape(1, -1), scores)
        return found.loss, found.gradient

    start = np.full((len(groups.names), search.setup.parts.shape[1]), START)
    descent = adam_descend(
        gradient_of, start, steps=MAX_STEPS + 1, learning_rate=LEARNING_RATE, low=LOW, high=HIGH
    )
    if not len(descent.losses):
        raise InputError("the first merge gives no finite numbers on the prompts. Use base.dtype: float32.")
    search.ended_by = search.ended_by or "evaluations"
    return descent
