"""Scoring and writing: a hand-computed case, and batches against the slow obvious version."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llm_merging.model.decoder_functions import (
    encode_choice,
    encode_input,
    end_ids,
    generate,
    predict_multiple_choice,
    score_choices,
)
from tests.test_base import CHARACTERS, make_toy_model, make_toy_tokenizer
from tests.toys import make_model

TEXTS = ["what is 2 + 2?\nanswer:", "a", "", "the fox (jumps) over it: 123."]
CHOICES = [["4", "four", "22"], ["yes", "no"], ["", "some text"], ["a", "b", "c", "a long choice."]]


class ChainModel(nn.Module):
    """Next-token logits depend on the last token alone: log p is a table, so scores can be summed by hand."""

    def __init__(self, probabilities):
        super().__init__()
        self.log_probabilities = nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log())

    def forward(self, input_ids, attention_mask, past_key_values, use_cache):
        cache = SimpleNamespace(batch_select_indices=lambda indices: None)
        return SimpleNamespace(logits=self.log_probabilities[input_ids], past_key_values=cache)


class WordTokenizer:
    """Splits at spaces; ids: 0 BOS, 1 EOS, 2 x, 3 y."""

    bos_token_id, eos_token_id, pad_token_id, eos_token = 0, 1, 1, "</s>"

    def __call__(self, text, add_special_tokens=True):
        ids = [{"x": 2, "y": 3}[word] for word in text.split()]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


TABLE = [
    [0.1, 0.1, 0.4, 0.4],  # after BOS
    [0.25, 0.25, 0.25, 0.25],  # after EOS
    [0.1, 0.6, 0.1, 0.2],  # after x
    [0.1, 0.3, 0.5, 0.1],  # after y
]


def test_both_choice_scorings_equal_the_sums_done_by_hand():
    batch = {"input": ["x", "y"], "answer_choices": [["x", "y x", "y"], ["x", "y"]]}
    args = (ChainModel(TABLE), WordTokenizer(), WordTokenizer(), batch)
    best, scores = predict_multiple_choice(*args)
    by_hand = [[0.1 * 0.6, 0.2 * 0.5 * 0.6, 0.2 * 0.3], [0.5 * 0.6, 0.1 * 0.3, 0.0]]
    torch.testing.assert_close(scores.exp(), torch.tensor(by_hand, dtype=torch.float64))
    assert best.tolist() == [0, 0]  # the first query is a three-way tie

    best, scores = predict_multiple_choice(*args, skip_first=True)
    by_hand = [[0.6, 0.5 * 0.6, 0.3], [0.6, 0.3, 0.0]]
    torch.testing.assert_close(scores.exp(), torch.tensor(by_hand, dtype=torch.float64))
    assert best.tolist() == [0, 0]
    assert scores[1, 2] == -math.inf


def test_a_tie_is_a_tie_although_its_sums_round_differently():
    """By hand, after x: "x x" has 0.3 x 0.3 x 0.2, "y" has 0.1 x 0.18."""
    table = [TABLE[0], TABLE[1], [0.4, 0.2, 0.3, 0.1], [0.1, 0.18, 0.5, 0.22]]
    choices = ["x x", "y"]
    args = (ChainModel(table), WordTokenizer(), WordTokenizer())
    scores = predict_multiple_choice(*args, {"input": ["x"], "answer_choices": [choices]})[1][0]
    rising = [choices[i] for i in scores.argsort().tolist()]
    assert scores.unique().numel() == 2
    best, scores = predict_multiple_choice(*args, {"input": ["x"], "answer_choices": [rising]})
    assert scores[0, 1] > scores[0, 0]
    assert best.tolist() == [0]


def test_the_first_token_decides_where_it_should():
    """By hand: after BOS x has 0.4 and y 0.4, but y ends with 0.3 where x ends with 0.6."""
    table = [[0.1, 0.1, 0.1, 0.7], *TABLE[1:]]
    args = (
        ChainModel(table),
        WordTokenizer(),
        WordTokenizer(),
        {"input": [""], "answer_choices": [["x", "y"]]},
    )
    assert predict_multiple_choice(*args)[0].tolist() == [1]  # 0.06 against 0.21
    assert predict_multiple_choice(*args, skip_first=True)[0].tolist() == [0]  # 0.6 against 0.3


def make_toy(architecture):
    """A random model, loud enough for varied text, in float64, which Gemma2's attention does not keep."""
    model = make_model(architecture, dtype=torch.float32 if architecture == "gemma2" else torch.float64)
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return model


def one_forward_each(model, ids, choice_ids):
    """Sum the log-probabilities of a choice's tokens in one plain forward, without cache or padding."""
    logp = model(torch.tensor([ids + choice_ids])).logits[0].log_softmax(-1)
    return sum(logp[len(ids) - 1 + k, token].item() for k, token in enumerate(choice_ids))


def test_scores_in_a_batch_equal_plain_forwards(architecture):
    model, tokenizer = make_toy(architecture), make_toy_tokenizer()
    prompts = [encode_input(tokenizer, text) for text in TEXTS]
    choices = [[encode_choice(tokenizer, text) for text in texts] for texts in CHOICES]
    scores = score_choices(model, prompts, choices, pad=2, skip_first=False)
    assert scores.shape == (4, 4)
    for p, texts in enumerate(choices):
        expected = [one_forward_each(model, prompts[p], c) for c in texts] + [-math.inf] * (4 - len(texts))
        torch.testing.assert_close(scores[p], torch.tensor(expected, dtype=model.dtype))


def test_generation_strips_special_tokens_and_stops_at_the_limit():
    tokenizer, model = make_toy_tokenizer(), make_toy_model()
    ids, texts = generate(model, tokenizer, tokenizer, {"input": TEXTS}, 7)
    assert all(len(row) <= 7 for row in ids)
    assert any(len(row) == 7 for row in ids)
    assert all(set(text) <= set(CHARACTERS) for text in texts)


def test_every_configured_end_token_ends_an_answer():
    model, tokenizer = make_toy_model(), make_toy_tokenizer()
    model.generation_config.eos_token_id = [2, 40]
    assert end_ids(model, tokenizer) == {2, 40}
    model.generation_config.eos_token_id = None
    assert end_ids(model, tokenizer) == {2}
    assert end_ids(nn.Linear(1, 1), tokenizer) == {2}


def test_inputs_get_bos_and_choices_get_eos():
    tokenizer = make_toy_tokenizer()
    assert encode_input(tokenizer, "ab") == [1, 3, 4]
    assert encode_choice(tokenizer, "ab") == [3, 4, 2]
    assert encode_choice(tokenizer, "") == [2]


def test_an_empty_input_still_has_a_token_and_an_added_eos_is_removed():
    bare = make_toy_tokenizer(adds_bos=False)
    assert encode_input(bare, "") == [1]
    tokenizer = WordTokenizer()
    tokenizer.__class__ = type(
        "Ends", (WordTokenizer,), {"__call__": lambda self, text: {"input_ids": [0, 2, 1]}}
    )
    assert encode_input(tokenizer, "x") == [0, 2]


def test_scores_that_overflow_are_an_error_and_not_choice_zero():
    model, tokenizer = make_toy_model(), make_toy_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        predict_multiple_choice(model, tokenizer, tokenizer, {"input": ["a"], "answer_choices": [["b", "c"]]})
