"""Answer queries in batches that fit in memory, in the order they came, and write the predictions.

Knows queries and the two answering functions of a method; not models, and not how a method merges.
"""

import csv
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from llm_merging.data import GENERATION, MULTIPLE_CHOICE, Query, check_lengths
from llm_merging.model.decoder_functions import encode_choice, encode_input
from search.files import atomic_write
from search.memory import (
    ANSWER_TOKENS_ELSEWHERE,
    MOST_TOKENS,
    MOST_WRITTEN_TOKENS,
    choosing_cost,
    largest_batch,
    writing_cost,
)

TOKENS_PER_BATCH = {
    MULTIPLE_CHOICE: (choosing_cost, MOST_TOKENS),
    GENERATION: (writing_cost, MOST_WRITTEN_TOKENS),
}
"""On a CUDA device: what a batch of so many tokens, rows x longest row, takes, and the most tokens."""
TOKENS_PER_BATCH_ELSEWHERE = ANSWER_TOKENS_ELSEWHERE
KINDS = (MULTIPLE_CHOICE, GENERATION)
EMPTY_PREDICTION = "unknown"
"""Written for an empty answer: the leaderboard refuses empty cells."""
ESTIMATE_MARGIN = 1.5
"""The merged model may write longer answers than the base, on which the time to answer is measured."""

_LONE_RETURN = re.compile(r"\r(?!\n)")

Batch = Mapping[str, Sequence[Any]]


class Answerer(Protocol):
    """What answering needs of a merge method: `Merges` has it, loaded."""

    base_model: Any
    input_tokenizer: Any
    target_tokenizer: Any
    max_gen_len: int

    def predict_multiple_choice(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index of each query's best choice (n_queries,), and scores."""
        ...

    def generate(self, batch: Batch) -> tuple[list[list[int]], list[str]]:
        """Return the new token ids and the text written for each query."""
        ...


@dataclass(frozen=True, slots=True)
class SizedQuery:
    """A query with what it costs: `n_rows` rows of at most `n_input + n_answer` tokens."""

    query: Query
    place: int
    n_rows: int
    n_input: int
    n_answer: int

    @property
    def n_tokens(self) -> int:
        """Length of the query's longest row."""
        return self.n_input + self.n_answer


def size_queries(
    queries: Sequence[Query], input_tokenizer: Any, target_tokenizer: Any, max_gen_len: int
) -> list[SizedQuery]:
    """Count tokens, in the order given: prompt, and the longest choice or `max_gen_len`."""

    def size(place: int, query: Query) -> SizedQuery:
        n_input = len(encode_input(input_tokenizer, query.input))
        if query.eval_type == GENERATION:
            return SizedQuery(query, place, 1, n_input, max_gen_len)
        n_answer = max(len(encode_choice(target_tokenizer, text)) for text in query.answer_choices)
        return SizedQuery(query, place, len(query.answer_choices), n_input, n_answer)

    return [size(place, query) for place, query in enumerate(queries)]


def check_sizes(sized: Sequence[SizedQuery], context: int) -> None:
    """Refuse queries that do not fit the model's context with their answers (InputError)."""
    check_lengths([s.query for s in sized], [s.n_input for s in sized], [s.n_answer for s in sized], context)


def answer_queries(
    method: Answerer, queries: Sequence[Query], *, tokens_per_batch: int | None = None, progress: bool = True
) -> list[str]:
    """Answer all queries, longest first; where memory runs out, batches are halved from there on.

    Returns:
        Predictions in the order of `queries`: the index of the best choice as text, or the generated text.

    Raises:
        torch.OutOfMemoryError: if a single query does not fit.
    """
    budgets = {kind: tokens_per_batch or _default_budget(method, kind) for kind in KINDS}
    todo = _longest_first(_size_for(method, queries))
    predictions = [""] * len(queries)
    with tqdm(total=len(queries), desc="answers", unit="query", disable=not progress) as bar:
        while todo:
            kind = todo[0].query.eval_type
            batch = _first_batch(todo, budgets[kind])
            texts = _try_batch(method, [s.query for s in batch])
            if texts is None:
                budgets[kind] = _cost(batch) // 2
                torch.cuda.empty_cache()
                continue
            for sized, text in zip(batch, texts, strict=True):
                predictions[sized.place] = text if text.strip() else EMPTY_PREDICTION
            todo = todo[len(batch) :]
            bar.update(len(batch))
    return predictions


def estimate_seconds(method: Answerer, queries: Sequence[Query]) -> float:
    """Measure how long answering will take: the middle batch of each kind, times their number.

    A middle batch with less than its share of the tokens, as the last of two may be, counts by its tokens.
    """
    sized = _longest_first(_size_for(method, queries))
    total_s = 0.0
    for kind in KINDS:
        batches = list(_plan([s for s in sized if s.query.eval_type == kind], _default_budget(method, kind)))
        if batches:
            middle = batches[len(batches) // 2]
            started_s = time.monotonic()
            answer_queries(method, [s.query for s in middle], progress=False)
            share = max(len(batches), sum(map(_cost, batches)) / _cost(middle))
            total_s += (time.monotonic() - started_s) * share
    return total_s * ESTIMATE_MARGIN


def write_predictions(path: Path, queries: Sequence[Query], predictions: Sequence[str]) -> None:
    """Write `id,prediction,dummy_field`, whole or not at all.

    Raises:
        InputError: if the file cannot be written.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "prediction", "dummy_field"])
        texts = [_LONE_RETURN.sub("\n", text) for text in predictions]  # csv would leave it unquoted
        writer.writerows([q.id, text, 0] for q, text in zip(queries, texts, strict=True))


def _try_batch(method: Answerer, queries: Sequence[Query]) -> list[str] | None:
    """Answer queries of one kind together, or return None if there are several and memory ran out."""
    batch = {"input": [q.input for q in queries], "answer_choices": [list(q.answer_choices) for q in queries]}
    try:
        if queries[0].eval_type == GENERATION:
            return list(method.generate(batch)[1])
        return [str(i) for i in method.predict_multiple_choice(batch)[0].tolist()]
    except torch.OutOfMemoryError:
        if len(queries) == 1:
            raise
        return None


def _size_for(method: Answerer, queries: Sequence[Query]) -> list[SizedQuery]:
    return size_queries(queries, method.input_tokenizer, method.target_tokenizer, method.max_gen_len)


def _longest_first(sized: Sequence[SizedQuery]) -> list[SizedQuery]:
    """Sort by kind, then by length: neighbours waste little padding, and too little memory shows at once."""
    return sorted(sized, key=lambda s: (s.query.eval_type, -s.n_tokens, s.place))


def _plan(sized: Sequence[SizedQuery], budget: int) -> Iterator[list[SizedQuery]]:
    while sized:
        batch = _first_batch(sized, budget)
        yield batch
        sized = sized[len(batch) :]


def _first_batch(sized: Sequence[SizedQuery], budget: int) -> list[SizedQuery]:
    """Take queries of the first one's kind while rows x longest row stay within the budget; at least one."""
    n_taken, n_rows = 1, sized[0].n_rows
    for candidate in sized[1:]:
        n_rows += candidate.n_rows
        if candidate.query.eval_type != sized[0].query.eval_type or n_rows * sized[0].n_tokens > budget:
            break
        n_taken += 1
    return list(sized[:n_taken])


def _cost(batch: Sequence[SizedQuery]) -> int:
    return sum(s.n_rows for s in batch) * batch[0].n_tokens


def _default_budget(method: Answerer, kind: str) -> int:
    """Return how many tokens of a kind of query fit into one batch beside what is in memory."""
    if next(method.base_model.parameters()).device.type != "cuda":
        return TOKENS_PER_BATCH_ELSEWHERE
    return largest_batch(method.base_model, *TOKENS_PER_BATCH[kind])
