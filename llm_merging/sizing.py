"""What a query costs before it is answered: rows and tokens, and batches that stay within a budget of them.

Knows texts, tokenizers and lengths; not models, memory or time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_merging.data import GENERATION, Query, check_lengths
from llm_merging.model.decoder_functions import encode_choice, encode_input


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


def longest_first(sized: Sequence[SizedQuery]) -> list[SizedQuery]:
    """Sort by kind, then by length: neighbours waste little padding, and too little memory shows at once.

    Choices come first: what is left of the time then is for generations, which can be made shorter.
    """
    return sorted(sized, key=lambda s: (s.query.eval_type == GENERATION, -s.n_tokens, s.place))


def plan_batches(sized: Sequence[SizedQuery], budget: int) -> Iterator[list[SizedQuery]]:
    """Split sorted queries into batches."""
    while sized:
        batch = first_batch(sized, budget)
        yield batch
        sized = sized[len(batch) :]


def first_batch(sized: Sequence[SizedQuery], budget: int) -> list[SizedQuery]:
    """Take queries of the first one's kind while rows x longest row stay within the budget; at least one."""
    n_taken, n_rows = 1, sized[0].n_rows
    for candidate in sized[1:]:
        n_rows += candidate.n_rows
        if candidate.query.eval_type != sized[0].query.eval_type or n_rows * sized[0].n_tokens > budget:
            break
        n_taken += 1
    return list(sized[:n_taken])


def batch_cost(batch: Sequence[SizedQuery]) -> int:
    """Rows times the longest row."""
    return sum(s.n_rows for s in batch) * batch[0].n_tokens
