"""The best single expert: the one that all experts' prompts disagree with least, picked without labels.

Knows the configured objective through its evaluator; nothing is searched.
"""

import numpy as np

from llm_merging.merging.coefficients import deliver_coefficients
from llm_merging.merging.Merges import Merges
from llm_merging.merging.prompted import prompted_search
from search.finalists import SINGLE
from search.objective import objective_label


class BestSingle(Merges):
    """base + s_i B_i A_i, with i = argmin_i loss(expert i): what one does who takes one adapter and no merge.

    The loss is my_merge's, on the prompts of all experts that my_merge searches on: an expert has none on its
    own prompts, and about 1 on those that it answers as the base does.
    """

    def merge(self) -> None:
        """Score every expert, write the best to `output` as an adapter and fold it into the base."""
        self._load_everything()
        with prompted_search(self) as search:
            setup, parts = search.setup, search.setup.parts
            n_groups, n_experts = parts.shape
            tables = np.repeat(np.eye(n_experts)[:, None], n_groups, axis=1)  # one expert each
            scores = search.evaluator().score(tables)
            search.record(tables.reshape(n_experts, -1), scores)
            best = int(np.argsort(scores.losses, kind="stable")[0])  # NaN last
            winner, loss = SINGLE + parts.names[best], float(scores.losses[best])
            deliver_coefficients(
                self,
                parts.adapters,
                tables[best],
                parts.groups,
                objective={
                    "name": objective_label(setup.objective),
                    "combine": setup.config.objective.combine,
                    "loss": loss,
                    "per_expert": scores.per_expert[best].tolist(),
                },
                provenance={**search.provenance(), "winner": winner},
            )
        listed = ", ".join(
            f"{name} {value:.4f}" for name, value in zip(parts.names, scores.losses.tolist(), strict=True)
        )
        self.report = f"winner: {winner}, loss {loss:.4f} on the prompts of all experts ({listed})"
