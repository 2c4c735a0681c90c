"""Answer queries in batches that fit in memory, in the order they came, and write the predictions.

Knows queries and the two answering functions of a method; not models, nor how a method merges.
"""

import csv
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from llm_merging.data import GENERATION, MULTIPLE_CHOICE, Query
from llm_merging.deadline import UNKNOWN, AnswerRates, Deadline, choice_tokens
from llm_merging.sizing import (
    SizedQuery,
    batch_cost,
    first_batch,
    longest_first,
    plan_batches,
    size_queries,
)
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
ESTIMATE_MARGIN = 1.05
"""The merged model may write longer answers than the base, on which answering is measured. What takes
longer than foreseen is answered in what the time box has to spare, or with fewer tokens."""
SAMPLED_SHARE = 0.1
"""Of the batches, how many are answered to measure what all take."""

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


def answer_queries(
    method: Answerer,
    queries: Sequence[Query],
    *,
    tokens_per_batch: int | None = None,
    progress: bool = True,
    deadline: Deadline | None = None,
) -> list[str]:
    """Answer all queries, longest first; where memory runs out, batches are halved from there on.

    Args:
        deadline: when all must be there. Generations get fewer tokens where they would not be in time, and
            what no time is left for gets `EMPTY_PREDICTION`, or the first choice, unread.

    Returns:
        Predictions in the order of `queries`: the index of the best choice as text, or the generated text.

    Raises:
        torch.OutOfMemoryError: if a single query does not fit.
    """
    budgets = {kind: tokens_per_batch or _default_budget(method, kind) for kind in KINDS}
    todo = longest_first(_size_for(method, queries))
    deadline = deadline or Deadline(lambda: math.inf, UNKNOWN, method.max_gen_len)
    predictions = [_guess(query) for query in queries]
    with tqdm(total=len(queries), desc="answers", unit="query", disable=not progress) as bar:
        while todo and (batch := deadline.fit(first_batch(todo, budgets[todo[0].query.eval_type]), todo)):
            started_s = time.monotonic()
            texts = _try_batch(method, [s.query for s in batch], deadline.n_new)
            if texts is None:
                budgets[batch[0].query.eval_type] = batch_cost(batch) // 2
                torch.cuda.empty_cache()
                continue
            deadline.learn(batch, time.monotonic() - started_s)
            for sized, text in zip(batch, texts, strict=True):
                predictions[sized.place] = text if text.strip() else EMPTY_PREDICTION
            answered = {sized.place for sized in batch}
            todo = [sized for sized in todo if sized.place not in answered]
            bar.update(len(batch))
    deadline.n_guessed += len(todo)
    return predictions


def measure_rates(method: Answerer, queries: Sequence[Query]) -> AnswerRates:
    """Measure what answering takes by the token, on a tenth of the batches of each kind, evenly spaced.

    Generations are written once in full and once to the first token, which tells reading and writing apart.
    """
    sized = longest_first(_size_for(method, queries))
    choices = [s for s in sized if s.query.eval_type == MULTIPLE_CHOICE]
    written = [s for s in sized if s.query.eval_type == GENERATION]
    choice_s = _foresee(method, choices, 1)
    whole_s, first_s = _foresee(method, written, method.max_gen_len), _foresee(method, written, 1)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what follows wants its own sizes
    return AnswerRates(
        choice_s=choice_s / max(1, sum(map(choice_tokens, choices))),
        read_s=min(first_s, whole_s) / max(1, sum(s.n_input for s in written)),
        write_s=max(0.0, whole_s - first_s) / max(1, len(written) * method.max_gen_len),
    )


def _foresee(method: Answerer, sized: Sequence[SizedQuery], n_new: int) -> float:
    """Answer some batches of one kind, and return the seconds that all of them would take."""
    if not sized:
        return 0.0
    _time_batch(method, [sized[-1]], min(2, n_new))  # what is loaded at the first call
    batches = list(plan_batches(sized, _default_budget(method, sized[0].query.eval_type)))
    n_samples = max(1, round(SAMPLED_SHARE * len(batches)))
    total_s = 0.0
    for sample in range(n_samples):
        begin, end = (len(batches) * (sample + k) // n_samples for k in (0, 1))
        middle, own = batches[(begin + end) // 2], sum(map(batch_cost, batches[begin:end]))
        total_s += _time_batch(method, middle, n_new) * own / batch_cost(middle)
    return total_s


def estimate_seconds(method: Answerer, queries: Sequence[Query], rates: AnswerRates) -> float:
    """Foresee how long answering will take."""
    return ESTIMATE_MARGIN * rates.seconds(_size_for(method, queries), method.max_gen_len)


def _time_batch(method: Answerer, batch: Sequence[SizedQuery], n_new: int) -> float:
    started_s = time.monotonic()
    deadline = Deadline(lambda: math.inf, UNKNOWN, n_new)
    answer_queries(method, [s.query for s in batch], progress=False, deadline=deadline)
    return time.monotonic() - started_s


def _guess(query: Query) -> str:
    return EMPTY_PREDICTION if query.eval_type == GENERATION else "0"


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


def _try_batch(method: Answerer, queries: Sequence[Query], n_new: int) -> list[str] | None:
    """Answer queries of one kind together, or return None if there are several and memory ran out."""
    most = method.max_gen_len
    batch = {"input": [q.input for q in queries], "answer_choices": [list(q.answer_choices) for q in queries]}
    try:
        method.max_gen_len = n_new
        if queries[0].eval_type == GENERATION:
            return list(method.generate(batch)[1])
        return [str(i) for i in method.predict_multiple_choice(batch)[0].tolist()]
    except torch.OutOfMemoryError:
        if len(queries) == 1:
            raise
        return None
    finally:
        method.max_gen_len = most


def _size_for(method: Answerer, queries: Sequence[Query]) -> list[SizedQuery]:
    return size_queries(queries, method.input_tokenizer, method.target_tokenizer, method.max_gen_len)


def _default_budget(method: Answerer, kind: str) -> int:
    """Return how many tokens of a kind of query fit into one batch beside what is in memory."""
    if next(method.base_model.parameters()).device.type != "cuda":
        return TOKENS_PER_BATCH_ELSEWHERE
    return largest_batch(method.base_model, *TOKENS_PER_BATCH[kind])
