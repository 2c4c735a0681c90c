"""Sampling many rows on one cache, against one row at a time without a cache."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from search import sampling
from search.errors import InputError
from search.sampling import Decoding, is_loop, sample_rows
from tests.toys import N_VOCAB, make_model, random_ids

EOS = 2
LENGTHS = (3, 9, 1, 6)
PREFIXES = [[1, *random_ids(1, n, seed=n)[0].tolist()] for n in LENGTHS]


def everything(rows):
    return nullcontext()


def decoding(**changes):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": frozenset({EOS})}
    return Decoding(**(settings | changes))


def sample(model, prefixes=PREFIXES, how=None, *, seed=0, under=everything, **kwargs):
    gen = torch.Generator().manual_seed(seed)
    return sample_rows(model, prefixes, under, how or decoding(), gen, **kwargs)


def sample_slowly(model, prefixes, how, seed=0):
    """One row at a time, the whole sequence again for each token."""
    draws = torch.rand(len(prefixes), how.max_new_tokens, generator=torch.Generator().manual_seed(seed))
    rows = []
    for prefix, row_draws in zip(prefixes, draws, strict=True):
        tokens = list(prefix)
        for draw in row_draws:
            logits = model(torch.tensor([tokens])).logits[0, -1].float()
            logits[list(how.banned_ids)] = -torch.inf
            if how.temperature == 0:
                tokens.append(int(logits.argmax()))
            else:
                cumulative = torch.softmax(logits / how.temperature, -1).double().cumsum(-1)
                tokens.append(int((cumulative <= draw.double() * cumulative[-1]).sum()))
            if tokens[-1] in how.stop_ids:
                break
        rows.append(tokens[len(prefix) :])
    return rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_unequal_length_go_on_as_they_would_alone(architecture, temperature):
    model = make_model(architecture, dtype=torch.float32)  # eager attention's mask overflows in float64
    how = decoding(temperature=temperature, banned_ids=(0, 5), stop_ids=frozenset(range(2, N_VOCAB, 5)))
    together = sample(model, how=how)
    assert together == sample_slowly(model, PREFIXES, how)


def test_rows_that_do_not_fit_together_are_written_in_halves(monkeypatch):
    prefixes = [[1, 2, 3], [4], [5, 6], [7, 8], [9]]
    model, tried = make_model("llama", dtype=torch.float32), []
    whole = sample(model, prefixes)
    decode = sampling._decode_until_half_done

    def greedy(batch, new, *rest):
        tried.append(len(batch.rows))
        if len(batch.rows) > 2:
            new[batch.rows[0]].append(0)  # half done when memory runs out
            raise torch.OutOfMemoryError("no memory")
        return decode(batch, new, *rest)

    monkeypatch.setattr(sampling, "_decode_until_half_done", greedy)
    assert sample(model, prefixes) == whole
    assert tried[0] == 5
    assert max(tried[1:]) == 2


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_tokens():
    model = make_model("llama", dtype=torch.float32)
    here = sample(model)
    assert sample(model.to("cuda")) == here


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(toy_model):
    model = toy_model("llama")
    assert sample(model) == sample(model)
    assert sample(model) != sample(model, seed=1)


def test_splitting_the_batch_changes_nothing(toy_model, monkeypatch):
    model = toy_model("llama")
    whole = sample(model)
    monkeypatch.setattr(sampling, "MAX_CACHED_TOKENS", 50)  # two rows at most
    assert sample(model) == whole


def test_a_row_that_is_done_leaves_and_does_not_disturb_the_others(toy_model):
    model = toy_model("llama")
    how = decoding(stop_ids=frozenset())
    undisturbed = sample(model, how=how)
    computed = []

    def under(rows):
        computed.append(list(rows))
        return nullcontext()

    short = sample(
        model, how=how, under=under, ended=lambda row, tokens: row in (0, 2, 3) and len(tokens) == row + 1
    )
    assert short == [row if i == 1 else row[: i + 1] for i, row in enumerate(undisturbed)]
    assert computed == [[0, 1, 2, 3], [1, 3], [1]]


def test_a_stop_token_ends_a_row_and_is_kept(toy_model):
    rows = sample(toy_model("llama"), how=decoding(stop_ids=frozenset(range(20)), max_new_tokens=30))
    assert all(row[-1] < 20 and min(row[:-1], default=20) >= 20 for row in rows)


def test_banned_tokens_are_never_chosen(toy_model):
    how = decoding(banned_ids=tuple(range(2, N_VOCAB)), stop_ids=frozenset())
    for temperature in (0.0, 1.0):
        rows = sample(toy_model("llama"), how=decoding(banned_ids=how.banned_ids, temperature=temperature))
        assert {token for row in rows for token in row} <= {0, 1}


def test_a_row_stops_at_the_models_context(toy_model):
    prefixes = [random_ids(1, 60)[0].tolist(), [1, 3], [1, 4]]
    rows = sample(toy_model("gpt2"), prefixes, decoding(stop_ids=frozenset()))  # 64 positions
    assert [len(row) for row in rows] == [4, 12, 12]


def test_a_prefix_that_fills_the_context_is_refused(toy_model):
    with pytest.raises(InputError, match="64 tokens leaves no room in the model's context of 64"):
        sample(toy_model("llama"), [random_ids(1, 64)[0].tolist()])


def test_no_rows_no_tokens(toy_model):
    assert sample(toy_model("llama"), []) == []


class Constant(nn.Module):
    """Every next token has the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.config = LlamaConfig(max_position_embeddings=64)
        self.device = torch.device("cpu")

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_tokens_come_as_often_as_their_probability_says():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    rows = sample(Constant(probabilities.log().tolist()), [[1]] * 4000, decoding(max_new_tokens=1))
    counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=4)
    assert counts[1] == 0
    torch.testing.assert_close(counts / 4000, probabilities, atol=0.03, rtol=0)


def test_a_draw_of_zero_does_not_choose_an_impossible_token(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.zeros(shape))
    rows = sample(Constant([-torch.inf, 0.0, 0.0]), [[1]], decoding(max_new_tokens=1))
    assert rows == [[1]]


def test_a_lower_temperature_is_surer():
    model = Constant([1.0, 0.0])
    warm, cold = (
        sum(map(sum, sample(model, [[1]] * 500, decoding(temperature=t, stop_ids=frozenset()))))
        for t in (1.0, 0.2)
    )
    assert cold < warm / 5


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        sample(Constant([0.0, float("nan")]))


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([5] * 12, True),
        ([5] * 11, False),  # a short run is not yet a loop
        ([1, 2, 3] * 5, True),
        ([*range(15), *[7, 8] * 8], True),
        ([*range(20), *[7, 8] * 8], False),  # less than half
        (list(range(16)) * 2, False),  # twice only
        (list(range(16)) * 3, True),
        (list(range(17)) * 4, False),  # too long a phrase
        ([token for i in range(20) for token in (i, 98, 99)], False),  # an enumeration
        ([], False),
    ],
)
def test_loops_are_told_from_repetition_that_says_something(tokens, loops):
    assert is_loop(tokens) is loops
