"""Answers of the zoo's base in float32, on prompts of mixed lengths: batched, and one query at a time."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_merging.data import MULTIPLE_CHOICE, read_queries
from llm_merging.evaluation import answer_queries
from llm_merging.merging.Merges import DEMO_CONFIG, Merges
from llm_merging.model.decoder_functions import encode_choice, encode_input, score_choices
from search.config import load_config

QUERIES = Path(__file__).parents[1] / "data/test.csv"
MANY_TOKENS = 100_000


@pytest.fixture(scope="module")
def method():
    method = Merges("zoo", load_config(DEMO_CONFIG, ["base.dtype=float32", "device=cpu"]))
    method._load_base_model()
    method._load_tokenizer()
    method.max_gen_len = 12
    return method


@pytest.fixture(scope="module")
def queries():
    """A few of both kinds; every third is as long as several, so that lengths differ by a factor of ten."""
    shipped = read_queries(QUERIES)
    kinds = [[q for q in shipped if (q.eval_type == MULTIPLE_CHOICE) is choice] for choice in (True, False)]
    few = [query for kind in kinds for query in kind[:: len(kind) // 8][:8]]
    return [replace(query, input=query.input * (5 if i % 3 == 0 else 1)) for i, query in enumerate(few)]


def tokens_of(method, queries):
    """Token ids of prompts, and of each one's choices."""
    prompts = [encode_input(method.tokenizer, query.input) for query in queries]
    choices = [[encode_choice(method.tokenizer, text) for text in query.answer_choices] for query in queries]
    return prompts, choices


def test_answers_in_batches_are_those_of_one_query_at_a_time(method, queries):
    alone = answer_queries(method, queries, tokens_per_batch=1, progress=False)
    assert answer_queries(method, queries, tokens_per_batch=MANY_TOKENS, progress=False) == alone
    assert answer_queries(method, queries, tokens_per_batch=1500, progress=False) == alone
    assert len(set(alone)) > 6


def test_scores_with_a_shared_prompt_are_those_of_whole_rows(method, queries):
    """The oracle reads prompt and choice together for each choice, without cache or padding."""
    prompts, choices = tokens_of(method, [q for q in queries if q.eval_type == MULTIPLE_CHOICE])
    choices = [[*texts, texts[0][:1] * 3] for texts in choices]  # choices of unequal lengths too
    for skip_first in (False, True):
        scores = score_choices(method.base_model, prompts, choices, pad=2, skip_first=skip_first)
        for prompt, texts, row in zip(prompts, choices, scores, strict=True):
            for text, score in zip(texts, row.tolist(), strict=False):
                logits = method.base_model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
                logp = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])[skip_first:]
                assert score == pytest.approx(logp.sum().item(), abs=1e-4)


def test_each_prompt_is_read_once_however_many_choices_it_has(method, queries):
    prompts, choices = tokens_of(method, [q for q in queries if q.eval_type == MULTIPLE_CHOICE])
    seen = []
    hook = method.base_model.register_forward_pre_hook(
        lambda _, args, options: seen.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    score_choices(method.base_model, prompts, choices, pad=2, skip_first=False)
    hook.remove()
    rows = list(itertools.chain.from_iterable(choices))
    assert seen == [(len(prompts), max(map(len, prompts))), (len(rows), max(map(len, rows)))]
