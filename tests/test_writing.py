"""Greedy writing, over a growing cache and over one of fixed size: equal to plain forwards, in few steps."""

from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llm_merging.merging.Merges import DEMO_CONFIG, Merges
from llm_merging.model import writing
from llm_merging.model.decoder_functions import encode_input
from llm_merging.model.writing import why_growing, write_greedily, write_growing, write_static
from search.config import load_config
from tests.test_base import make_toy_tokenizer
from tests.test_decoder_functions import TEXTS, make_toy

WAYS = pytest.mark.parametrize("write", [write_growing, write_static])


def toy_prompts():
    return [encode_input(make_toy_tokenizer(), text) for text in TEXTS]


def write_one(model, prompt, n_tokens):
    """Greedy text with one plain forward a token."""
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@WAYS
def test_text_written_in_a_batch_equals_plain_forwards(architecture, write, monkeypatch):
    monkeypatch.setattr(writing, "PREFILL_TOKENS", 40)  # prompts are read in three goes
    model, prompts = make_toy(architecture), toy_prompts()
    endless = [write_one(model, prompt, 12) for prompt in prompts]
    assert write(model, prompts, 12, frozenset(), pad=2) == endless
    for stop in {token for ids in endless for token in ids}:  # rows end at different steps
        ended = [list(takewhile(lambda token, stop=stop: token != stop, ids)) for ids in endless]
        assert write(model, prompts, 12, frozenset({stop}), pad=2) == ended


@WAYS
@pytest.mark.parametrize("max_new", [1, 2, 3])
def test_short_answers_have_their_length(write, max_new):
    model, prompts = make_toy("llama"), toy_prompts()
    written = write(model, prompts, max_new, frozenset(), pad=2)
    assert written == [write_one(model, prompt, max_new) for prompt in prompts]


def test_steps_end_soon_after_the_last_row(monkeypatch):
    model, prompts = make_toy("llama"), toy_prompts()
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    every_token = frozenset(range(model.config.vocab_size))
    assert write_static(model, prompts, 30, every_token, pad=2) == [[]] * len(prompts)
    assert len(forwards) == writing.CHECK_EVERY  # one for the prompts among them
    monkeypatch.setattr(writing, "NOT_WRITTEN", 5)  # a place that nobody wrote is no end token
    assert len(write_static(model, prompts[:1], 30, frozenset(), pad=2)[0]) == 30


def test_a_cache_of_fixed_size_needs_a_card_and_a_model_that_fits_it():
    def model(device="cuda", *, window=None, allowed=True):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(sliding_window=window))
        weight = SimpleNamespace(device=torch.device(device))
        return SimpleNamespace(
            parameters=lambda: iter([weight]), config=config, _can_compile_fullgraph=allowed
        )

    assert why_growing(model(), 100) is None
    assert why_growing(model(window=100), 100) is None
    assert "window of 100" in why_growing(model(window=100), 101)
    assert "CUDA device" in why_growing(model("cpu"), 1)
    assert "does not allow" in why_growing(model(allowed=False), 1)


def test_without_a_graph_one_line_says_so_and_the_step_goes_on(caplog):
    """There is no CUDA here, which is one way for recording to fail."""
    caplog.set_level("INFO")
    writing._tell_once.cache_clear()
    model, prompts = make_toy("llama"), toy_prompts()
    for _ in range(3):
        write_greedily(model, prompts, 2, frozenset(), pad=2)
    assert [record.message for record in caplog.records] == [
        "answers are written without CUDA graphs: the model is not on a CUDA device"
    ]


def test_a_step_that_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    def fail(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    caplog.set_level("INFO")
    writing._tell_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", fail)
    step = nn.Identity()
    assert [writing._record(step) for _ in range(2)] == [step, step]
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.gpu
def test_a_graph_writes_what_plain_steps_write(caplog):
    caplog.set_level("INFO")
    writing._tell_once.cache_clear()
    method = Merges("zoo", load_config(DEMO_CONFIG, ["base.dtype=float32", "device=cuda"]))
    method._load_base_model()
    gen = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 1280, (n,), generator=gen).tolist() for n in (3, 700, 41, 42, 300)]
    plain = write_growing(method.base_model, prompts, 64, frozenset(), pad=2)
    assert write_greedily(method.base_model, prompts, 64, frozenset(), pad=2) == plain
    stops = frozenset(row[20] for row in plain)
    plain = write_growing(method.base_model, prompts, 64, stops, pad=2)
    assert write_greedily(method.base_model, prompts, 64, stops, pad=2) == plain
    assert not caplog.records
