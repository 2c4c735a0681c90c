"""Compiled layers against the model as it is, and the shapes that batches are padded to."""

import itertools
import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from search import compiled
from search.compiled import (
    CompiledLayers,
    Compiler,
    choose_widths,
    compiling_pays,
    decoder_layers,
    pad_to,
    row_sizes,
)
from search.population import population
from tests.test_experts import stack
from tests.toys import N_LAYERS, make_model, random_ids

GRAPHS_ALONE = {"backend": "aot_eager"}
"""Traces, cuts and differentiates as when compiling, without a compiler's seconds."""


@pytest.fixture
def without_a_code_generator(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, **options, **GRAPHS_ALONE)
    )


def test_one_graph_serves_any_number_of_rows_of_one_width(monkeypatch):
    shapes, compile_ = [], torch.compile

    def look(graph, inputs):
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        shapes.extend(node.meta["example_value"].shape for node in placeholders if node.type is torch.Tensor)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, backend=look, **how))
    double = Compiler()(lambda x: 2 * x, dynamic=True)
    for n_rows, width in ((5, 16), (6, 16), (6, 32), (7, 32)):
        x = torch.randn(n_rows, width)
        assert torch.equal(double(x), 2 * x)
    assert [shape[1] for shape in shapes] == [16, 32]
    assert not any(isinstance(shape[0], int) for shape in shapes)


@pytest.fixture
def n_failures(monkeypatch):
    """A compiler that fails, and a list with an item for each time."""
    failures = []

    def fail(graph, inputs):
        failures.append(graph)
        raise RuntimeError("no compiler here\nwith details")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=fail))
    compiled._notice.cache_clear()
    return failures


def run_twice(toy_adapters, *, grad, compiler=None):
    """Logits (and the coefficients' gradient) of a population, eager and compiled; a row is all zeros."""
    model = make_model("llama", dtype=torch.float32)
    stacked, groups = stack(toy_adapters("llama"), dtype=torch.float32)
    layers, ids, found = CompiledLayers(model, compiler or Compiler()), random_ids(3, 8), []
    table = torch.randn(3, len(groups.names), 3, generator=torch.Generator().manual_seed(1))
    table[1] = 0
    for context in (contextmanager(lambda: iter([None])), layers.active):
        rows = table.clone().requires_grad_(grad)
        with torch.set_grad_enabled(grad), population(model, stacked, rows, groups), context():
            logits = model(ids, use_cache=False).logits
        found.append((logits.detach(), torch.autograd.grad(logits.square().sum(), rows)[0] if grad else rows))
    with torch.no_grad(), layers.active():
        base = model(ids, use_cache=False).logits
    return found, base


@pytest.mark.usefixtures("without_a_code_generator")
@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_layers_give_the_eager_logits_and_gradients(grad, toy_adapters):
    (eager, fast), base = run_twice(toy_adapters, grad=grad)
    torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(fast[0][1], base[1])
    assert (fast[0][0] - base[0]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_the_real_compiler_gives_the_eager_logits_and_gradients(grad, toy_adapters):
    (eager, fast), base = run_twice(toy_adapters, grad=grad)
    torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(fast[0][1], base[1])


@pytest.mark.usefixtures("without_a_code_generator")
def test_one_graph_serves_all_layers_and_new_coefficients(toy_adapters):
    model = make_model("mistral", dtype=torch.float32)
    stacked, groups = stack(toy_adapters("mistral"), dtype=torch.float32)
    layers, counters = CompiledLayers(model, Compiler()), torch._dynamo.utils.counters
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    for n_rows, seed in itertools.product((2, 3), range(3)):
        table = torch.randn(n_rows, len(groups.names), 3) * (seed != 1)  # once all zeros
        with torch.no_grad(), population(model, stacked, table, groups), layers.active():
            model(random_ids(n_rows, 8, seed), use_cache=False)
    n_kinds = 2  # of layers: the adapters touch other modules in the second
    assert counters["stats"]["unique_graphs"] - before == 2 * n_kinds


def test_without_a_compiler_all_goes_on_with_one_notice(n_failures, toy_adapters, caplog):
    compiler = Compiler()
    with caplog.at_level(logging.WARNING):
        (eager, fast), _ = run_twice(toy_adapters, grad=False, compiler=compiler)
        assert len(n_failures) == 1  # not once a layer
        run_twice(toy_adapters, grad=False)
    assert torch.equal(fast[0], eager[0])
    assert not compiler.works
    own = [record.getMessage() for record in caplog.records if record.name == "search.compiled"]
    assert len(own) == 1
    assert own[0].startswith("not compiled, which is slower: ")
    assert "no compiler here" in own[0]


@pytest.mark.usefixtures("without_a_code_generator")
def test_errors_of_the_function_and_of_memory_are_its_own():
    def fail(error):
        raise error

    compiler = Compiler()
    with pytest.raises(ValueError, match="wrong rows"):
        compiler(fail)(ValueError("wrong rows"))
    with pytest.raises(RuntimeError, match="mat1"):
        compiler(fail)(RuntimeError("mat1"))
    with pytest.raises(torch.OutOfMemoryError):
        compiler(fail)(torch.OutOfMemoryError("full"))
    assert compiler.works


def raise_within(layers, model):
    with layers.active():
        assert all("forward" in vars(layer) for layer in decoder_layers(model))
        raise KeyboardInterrupt


def test_layers_are_found_and_restored(architecture, toy_model):
    model = toy_model(architecture)
    assert len(decoder_layers(model)) == N_LAYERS
    with pytest.raises(KeyboardInterrupt):
        raise_within(CompiledLayers(model, Compiler()), model)
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_a_model_without_layers_is_an_error():
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        decoder_layers(nn.Linear(2, 2))


def padding(lengths, widths):
    return sum(pad_to(length, widths) - length for length in lengths)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 3))
def test_no_other_widths_pad_less(lengths, most):
    widths = choose_widths(lengths, most)
    assert widths == sorted(set(widths))
    assert len(widths) <= most
    assert all(width % 8 == 0 for width in widths)
    every = range(8, max(widths) + 8, 8)
    others = itertools.combinations(every, min(most, len(every)))
    fitting = [padding(lengths, other) for other in others if other[-1] >= max(lengths)]
    assert padding(lengths, widths) == min(fitting)


@given(st.integers(1, 300), st.integers(1, 600), st.integers(1, 9000))
def test_rows_are_padded_to_half_or_all_that_fit(n_rows, width, tokens):
    sizes, most = row_sizes(width, tokens), max(1, tokens // width)
    assert sizes[-1] == most
    assert len(sizes) <= 2
    padded = pad_to(min(n_rows, most), sizes)
    assert min(n_rows, most) <= padded <= max(2 * n_rows, (most + 1) // 2)


def test_what_is_larger_than_all_sizes_stays():
    assert [pad_to(length, [8, 24]) for length in (3, 8, 9, 24, 25)] == [8, 8, 24, 24, 25]


class Claimed(nn.Module):
    """A model that claims a device and a size."""

    def __init__(self, device, n_parameters):
        super().__init__()
        self.device = torch.device(device)
        self.weight = nn.Parameter(torch.empty(n_parameters, device="meta"))


def test_few_forward_passes_small_models_and_a_cpu_are_not_worth_it():
    large, small, slow = Claimed("cuda", 10**9), Claimed("cuda", 10**7), Claimed("cpu", 10**9)
    assert [compiling_pays(large, n) for n in (49, 50, np.inf)] == [False, True, True]
    assert not compiling_pays(small, np.inf)
    assert not compiling_pays(slow, np.inf)
