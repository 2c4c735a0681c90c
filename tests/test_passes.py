"""Compiled passes give the losses of eager ones, in few shapes; objectives some positions at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from search import passes
from search.compiled import row_sizes
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import expert_signals
from search.passes import Passes
from tests.test_experts import make_prompts, stack
from tests.toys import make_model

LENGTHS = (9, 4, 12, 7, 5, 10, 30, 28, 3)


@pytest.fixture(scope="module")
def case(toy_adapters):
    """In float32; on a CPU an evaluator would fold, so those here are told not to."""
    model, prompts = make_model("llama", dtype=torch.float32), make_prompts(lengths=LENGTHS)
    stacked, groups = stack(toy_adapters("llama"), dtype=torch.float32)
    return model, stacked, groups, prompts, expert_signals(model, stacked, groups, prompts)


def evaluate_in(dtype, toy_adapters, *, compiled, tokens=120, device="cpu"):
    """bfloat16 is not folded on a CPU, so that it can be compiled."""
    model, prompts = make_model("llama", dtype=dtype).to(device), make_prompts(lengths=LENGTHS)
    stacked, groups = stack(toy_adapters("llama"), dtype=dtype, device=device)
    signals = expert_signals(model, stacked, groups, prompts)
    scoring = Scoring(compiled=compiled, tokens_per_forward=tokens)
    return PopulationEvaluator(model, stacked, groups, prompts, signals, scoring)


def random_table(evaluator, n_candidates=5):
    shape = n_candidates, len(evaluator._groups.names), evaluator._stacked.n_adapters
    return np.random.default_rng(5).normal(0.3, 0.3, shape)


@pytest.fixture
def nothing_to_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def compare(toy_adapters, *, device="cpu", **tolerance):
    eager, fast = (
        evaluate_in(torch.bfloat16, toy_adapters, compiled=flag, device=device) for flag in (False, True)
    )
    assert fast._passes.widths
    assert not eager._passes.widths
    table = random_table(eager)
    np.testing.assert_allclose(fast.score(table).losses, eager.score(table).losses, **tolerance)
    gradients = [evaluator.gradient(table[0]).gradient.ravel() for evaluator in (fast, eager)]
    assert np.corrcoef(*gradients)[0, 1] > 0.95


@pytest.mark.usefixtures("nothing_to_compile")
def test_padded_to_few_shapes_losses_and_gradients_are_the_same(toy_adapters):
    compare(toy_adapters, rtol=0.01)


@pytest.mark.slow
def test_a_compiled_search_has_the_eager_losses_and_gradients(toy_adapters):
    compare(toy_adapters, rtol=0.05)


@pytest.mark.gpu
def test_a_compiled_search_on_a_gpu_has_the_eager_losses_and_gradients(toy_adapters):
    compare(toy_adapters, device="cuda", rtol=0.05)


@pytest.mark.usefixtures("nothing_to_compile")
def test_after_the_start_no_scoring_has_a_new_shape(toy_adapters):
    evaluator, shapes = evaluate_in(torch.bfloat16, toy_adapters, compiled=True), set()
    handle = evaluator._model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    evaluator._passes.warm_up(evaluator._budget)
    first = set(shapes)
    for n_candidates in (1, 2, 5, 16):
        evaluator.score(random_table(evaluator, n_candidates))
    handle.remove()
    widths = evaluator._passes.widths
    assert len(widths) == 3
    assert shapes == first == {(n_rows, width) for width in widths for n_rows in row_sizes(width, 120)}


def test_passes_are_as_eager_ones_when_nothing_is_compiled(case):
    prompts = case[3]
    own = Passes(*case)
    assert own.lengths == list(LENGTHS)
    table = torch.zeros(2, len(case[2].names), 3)
    assert own.mixed(table, [1, 4]).shape == (sum(len(prompts.scored[row]) for row in (1, 4)), 48)


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_some_positions_at_a_time_sum_up_to_all(case, monkeypatch, at_once):
    own, rows = Passes(*case), [6, 0, 2, 8]
    logits = own.mixed(torch.full((4, len(case[2].names), 3), 0.3), rows)
    expected = own.sums("entropy_excess", logits, rows)
    monkeypatch.setattr(passes, "AT_ONCE", {"cpu": at_once})
    torch.testing.assert_close(own.sums("entropy_excess", logits, rows), expected)
    alone = [
        own.sums("entropy_excess", part, [row])
        for row, part in zip(
            rows, torch.split(logits, [len(case[3].scored[row]) for row in rows]), strict=True
        )
    ]
    torch.testing.assert_close(torch.cat(alone), expected)


def test_what_the_expert_says_is_kept_exactly_in_half_precision(toy_adapters):
    model, prompts = make_model("llama", dtype=torch.bfloat16), make_prompts()
    stacked, groups = stack(toy_adapters("llama"), dtype=torch.bfloat16)
    signals = expert_signals(model, stacked, groups, prompts)
    assert signals.logits.dtype == torch.bfloat16
    own = Passes(model, stacked, groups, prompts, signals)
    one_hot = torch.zeros(prompts.n_prompts, len(groups.names), 3)
    one_hot[range(prompts.n_prompts), :, prompts.expert] = 1
    rows = sorted(
        range(prompts.n_prompts), key=lambda row: -len(prompts.ids[row])
    )  # as the signals were taken
    sums = own.sums("entropy_excess", own.mixed(one_hot[rows], rows), rows)
    assert torch.equal(sums, torch.zeros_like(sums))


def test_two_passes_wait_on_the_models_own_device_whichever_is_current(case, monkeypatch):
    recorded, waited = [], []

    class Event:
        def record(self, stream="of the current device"):
            recorded.append(stream)

        def synchronize(self):
            waited.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    own = Passes(*case)
    own._model = SimpleNamespace(device=torch.device("cuda:1"))
    for _ in range(3):
        own._keep_pace()
    assert recorded == ["of cuda:1"] * 3
    assert len(waited) == 1
