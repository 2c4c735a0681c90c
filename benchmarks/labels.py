"""The right answers to a zoo's queries, and what merges lose on them: for whatever may use labels.

Knows examples, merges and the experts' own accuracies; not how a merge is chosen. Nothing of search/ or
llm_merging/ may know this.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.environment import ROOT
from benchmarks.job import measure_tasks
from benchmarks.truth import Marks, Truth
from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.measure import measured_examples
from benchmarks.zoo.queries import SHIPPED_HELD_OUT, query_examples
from benchmarks.zoo.scores import Accuracies, own_accuracies
from benchmarks.zoo.sets import scores_file
from benchmarks.zoo.sizes import SHIPPED
from benchmarks.zoo.tasks import HELD_IN
from search.population import mixed_weights
from search.setup import Setup
from search.space import FloatArray

ZOO_SEED = 0
"""With which the shipped zoo was built."""
TIE_PER_NAT = 1e-4
"""Weight of the right answers' -log p beside accuracy: it orders merges that get equally many right."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The right answers to a variant's validation and test queries."""

    experts: str
    setup: Setup
    n_examples: int
    """A task, to choose by."""

    @cached_property
    def validation(self) -> Truth:
        """To choose by: held-in tasks alone."""
        examples = measured_examples(self.n_examples, "validation", ZOO_SEED)
        return self._truth({task: examples[task] for task in HELD_IN})

    @cached_property
    def test(self) -> Truth:
        """The shipped queries."""
        examples = query_examples(SHIPPED, ZOO_SEED)
        return self._truth({task: examples[task] for task in (*HELD_IN, *SHIPPED_HELD_OUT)})

    def _truth(self, examples: dict[str, Any]) -> Truth:
        base = self.setup.parts.base
        return Truth(base.tokenizer, examples, str(base.model.device))

    @cached_property
    def own(self) -> Accuracies:
        """Each expert's accuracy on its own task, on validation."""
        scores = json.loads((ROOT / scores_file(self.experts)).read_text(encoding="utf-8"))["validation"]
        return own_accuracies(scores["matrix"]) if "matrix" in scores else scores

    def weights(self, coefficients: FloatArray) -> dict[str, Tensor]:
        """Return the weights of a merge by coefficients (n_groups, n_adapters)."""
        parts = self.setup.parts
        table = torch.tensor(coefficients, device=parts.model.device, dtype=parts.model.dtype)
        return mixed_weights(parts.model, parts.stacked, table, parts.groups)

    def losses(self, weights: dict[str, Tensor]) -> FloatArray:
        """Return the share (n_tasks,) of each expert's accuracy that is lost on validation, ties broken."""
        marks = self.validation.marks(self.setup.parts.model, weights)
        return np.array([self._loss(marks, task) for task in HELD_IN])

    def _loss(self, marks: Marks, task: str) -> float:
        return 1 - marks.accuracy[task] / self.own[task] + TIE_PER_NAT * marks.nll[task]

    def measure(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Return the quality benchmark's measures on the shipped queries."""
        return self.summarise(self.test.marks(self.setup.parts.model, weights).accuracy)

    def summarise(self, accuracies: Accuracies) -> dict[str, Any]:
        """Return the measures of accuracies by task."""
        shipped = {task: accuracies[task] for task in (*HELD_IN, *SHIPPED_HELD_OUT)}
        tasks = pd.DataFrame({"accuracy": shipped, "held_out": {t: int(t in HELD_OUT) for t in shipped}})
        return measure_tasks(tasks, ROOT / scores_file(self.experts), tuple(HELD_IN))
