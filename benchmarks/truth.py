"""True accuracy of a merge in one forward pass a query, by teacher forcing, instead of token by token.

A greedy answer is right exactly where the model's top token is the right one at every position of the right
answer, the end token included: nothing has to be generated. Multiple choice is scored as the main job scores
it. Uses labels, so nothing in search/ or llm_merging/ may know it. Knows examples and models, not merges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor
from torch.func import functional_call

from benchmarks.zoo.example import Example


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence: a query with its right answer, or with one of its choices."""

    ids: tuple[int, ...]
    first: int
    """Position of the answer's first token."""
    query: int


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """How a model did."""

    accuracy: dict[str, float]
    """Task -> share of right answers."""
    nll: dict[str, float]
    """Task -> mean over queries of -log p(right answer), in nats: what a tie can be broken by."""


class Truth:
    """The right answers to some queries, ready to be compared with a model's."""

    def __init__(
        self,
        tokenizer: Any,
        examples: Mapping[str, Sequence[Example]],
        device: torch.device | str = "cpu",
        tokens_per_forward: int | None = None,
    ) -> None:
        """Tokenise each task's examples.

        Args:
            tokens_per_forward: padding included; by device when None.
        """
        self._device = torch.device(device)
        self._tokens_per_forward = tokens_per_forward or (32_768 if self._device.type == "cuda" else 2_048)
        self._queries = [example for group in examples.values() for example in group]
        self._task_of = [task for task, group in examples.items() for _ in group]
        rows = []
        for query, example in enumerate(self._queries):
            prompt = tokenizer(example.prompt).input_ids
            for text in example.choices or (example.answer,):
                answer = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                rows.append(_Row((*prompt, *answer), len(prompt), query))
        self._n_rows = len(rows)
        self._batches = [self._pad(rows, batch) for batch in self._pack(rows)]
        self._query_of = np.array([row.query for row in rows])
        self._first_row = np.searchsorted(self._query_of, np.arange(len(self._queries)))
        self._choice_of = np.arange(len(rows)) - self._first_row[self._query_of]
        self._is_choice = np.array([bool(example.choices) for example in self._queries])
        self._target = np.array([e.choices.index(e.answer) if e.choices else 0 for e in self._queries])

    def marks(self, model: Any, weights: dict[str, Tensor] | None = None) -> Marks:
        """Compare a model's answers, with `weights` (by name) in place of its own where given."""
        row_logp, is_top = (found.numpy() for found in self._score(model, weights))
        logp = np.full((len(self._queries), self._choice_of.max() + 1), -np.inf)
        logp[self._query_of, self._choice_of] = row_logp
        right = np.where(self._is_choice, logp.argmax(1) == self._target, is_top[self._first_row])
        of_target = logp[np.arange(len(logp)), self._target]
        nll = np.where(self._is_choice, logsumexp(logp, axis=1), 0.0) - of_target
        return Marks(self._task_means(right), self._task_means(nll))

    def _task_means(self, values: NDArray[Any]) -> dict[str, float]:
        tasks = list(dict.fromkeys(self._task_of))
        index = np.array([tasks.index(task) for task in self._task_of])
        means = np.bincount(index, values) / np.bincount(index)
        return dict(zip(tasks, means.tolist(), strict=True))

    def _pack(self, rows: Sequence[_Row]) -> list[list[int]]:
        """Split rows, longest first, into batches that keep to the tokens of a forward pass."""
        left = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
        batches = []
        while left:
            n_rows = max(1, self._tokens_per_forward // len(rows[left[0]].ids))
            batches.append(left[:n_rows])
            left = left[n_rows:]
        return batches

    def _pad(self, rows: Sequence[_Row], batch: list[int]) -> dict[str, Any]:
        """Return a batch's ids (n_rows, longest), and where its answers' tokens are predicted."""
        longest = len(rows[batch[0]].ids)
        ids = torch.tensor([[*rows[row].ids, *[0] * (longest - len(rows[row].ids))] for row in batch])
        places = [
            (i, t - 1) for i, row in enumerate(batch) for t in range(rows[row].first, len(rows[row].ids))
        ]
        row_of, position = (torch.tensor(part) for part in zip(*places, strict=True))
        columns, column = torch.unique(position, return_inverse=True)
        placed = {"ids": ids, "row_of": row_of, "column": column, "columns": columns}
        placed["next_tokens"] = ids[row_of, position + 1]
        return {"rows": batch, **{name: tensor.to(self._device) for name, tensor in placed.items()}}

    @torch.no_grad()
    def _score(self, model: Any, weights: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return each row's log-probability (n_rows,) and whether every token is the top one (n_rows,)."""
        logp, is_top = torch.zeros(self._n_rows), torch.zeros(self._n_rows, dtype=torch.bool)
        for batch in self._batches:
            inputs = {"input_ids": batch["ids"], "logits_to_keep": batch["columns"], "use_cache": False}
            if weights is None:
                logits = model(**inputs).logits
            else:
                logits = functional_call(model, weights, (), inputs, tie_weights=False).logits
            scored = logits[batch["row_of"], batch["column"]].float()  # (n_scored, n_vocab)
            token_logp = scored.log_softmax(-1).gather(1, batch["next_tokens"][:, None])[:, 0]
            misses = (scored.argmax(-1) != batch["next_tokens"]).to(token_logp.dtype)
            sums = torch.zeros(2, len(batch["rows"]), device=self._device)
            sums.index_add_(1, batch["row_of"], torch.stack([token_logp, misses]))
            logp[batch["rows"]], is_top[batch["rows"]] = sums[0].cpu(), (sums[1] == 0).cpu()
        return logp, is_top
