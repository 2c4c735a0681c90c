"""Joined factors against layers as they are: outputs, gradients, memory, and which layers are joined."""

import copy
import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from search.compiled import CompiledLayers, Compiler
from search.joined import JoinedLinear, join_inputs
from search.population import MixedLinear, Mixtures
from search.stack import StackedFactors, StackedModule
from tests.test_experts import stack
from tests.toys import make_model, random_ids

N_ADAPTERS, N_ROWS = 3, 4


@pytest.fixture(autouse=True)
def graphs_alone(monkeypatch):
    """Traces, cuts and differentiates as when compiling, without a compiler's seconds; each test anew.

    What was traced before counts for a limit, past which all is run uncompiled.
    """
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, **{"backend": "aot_eager"} | how))


def stack_on(model: nn.Module, names: list[str], rank: int = 2, seed: int = 0) -> StackedFactors:
    """Random factors for a model's modules."""
    gen, modules = torch.Generator().manual_seed(seed), {}
    for name in names:
        d_out, d_in = model.get_submodule(name).weight.shape
        shapes = (3 * rank, d_in), (d_out, 3 * rank)
        A, B = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
        modules[name] = StackedModule(A, B, torch.arange(N_ADAPTERS).repeat_interleave(rank))
    return StackedFactors(modules, ("a", "b", "c"))


def run(model, stacked, groups, *, joined, grad=False, compiled=True):
    """Logits of a population, and the gradient of their squares in the coefficients."""
    table = torch.randn(N_ROWS, len(groups.names), N_ADAPTERS, generator=torch.Generator().manual_seed(1))
    table = table.to(model.dtype).requires_grad_(grad)
    layers = CompiledLayers(model, Compiler())
    mixtures = Mixtures(model, stacked, groups)
    if joined:
        mixtures.rewrap(join_inputs(model, stacked))
    with torch.set_grad_enabled(grad), mixtures.active(table):
        ids = random_ids(N_ROWS, 8)
        with layers.active() if compiled else nullcontext():
            logits = model(ids, use_cache=False).logits
    return (logits, torch.autograd.grad(logits.square().sum(), table)[0]) if grad else logits


@pytest.mark.parametrize(
    "architecture",
    [
        *("llama", "qwen2", "gpt2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "gemma2")),
    ],
)
def test_outputs_are_those_of_layers_as_they_are(architecture, toy_adapters):
    model = make_model(architecture)
    stacked, groups = stack(toy_adapters(architecture))
    expected = run(model, stacked, groups, joined=False, compiled=False)
    torch.testing.assert_close(run(model, stacked, groups, joined=True), expected)
    assert (expected - model(random_ids(N_ROWS, 8)).logits).abs().max() > 0.1


def test_gradients_are_those_of_layers_as_they_are(toy_adapters):
    model = make_model("llama")
    stacked, groups = stack(toy_adapters("llama"))
    expected = run(model, stacked, groups, joined=False, grad=True, compiled=False)
    torch.testing.assert_close(run(model, stacked, groups, joined=True, grad=True), expected)


def test_uncompiled_a_joined_layer_is_as_it_was_bit_for_bit(toy_adapters, monkeypatch):
    monkeypatch.setattr("search.joined.SharedInput.hidden_of", None)
    model = make_model("llama")
    stacked, groups = stack(toy_adapters("llama"))
    expected, found = (run(model, stacked, groups, joined=flag, compiled=False) for flag in (False, True))
    assert torch.equal(found, expected)


def test_one_graph_serves_all_layers_of_a_kind(toy_adapters):
    model = make_model("mistral", dtype=torch.float32)
    stacked, groups = stack(toy_adapters("mistral"), dtype=torch.float32)
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    for _ in range(2):
        run(model, stacked, groups, joined=True)
    n_kinds = 2  # the adapters touch other modules in the second layer
    assert counters["stats"]["unique_graphs"] - before <= 2 * n_kinds  # of each model's wrappers
    assert not counters["graph_break"]


class Attention(nn.Module):
    """Three layers, called in some order, on inputs of their own or on one."""

    def __init__(self, widths=(8, 8, 8), *, bias=False) -> None:
        super().__init__()
        for name, width in zip("qkv", widths, strict=True):
            self.add_module(f"{name}_proj", nn.Linear(width, 6, bias=bias, dtype=torch.float64))
        self.requires_grad_(False)

    def forward(self, inputs, order):
        return {name: self.get_submodule(f"{name}_proj")(inputs[name]) for name in order}


def random_input():
    return torch.randn(2, 5, 8, dtype=torch.float64)


NAMES = ["v_proj", "q_proj", "k_proj"]


def outputs(model, stacked, inputs, order, wrapped):
    """What a model puts out with wrappers in its layers' places, and these wrappers."""
    model, gen = copy.deepcopy(model), torch.Generator().manual_seed(2)
    coefficients = torch.randn(2, N_ADAPTERS, generator=gen)
    layers = {name: MixedLinear(name, model.get_submodule(name), m) for name, m in stacked.modules.items()}
    if wrapped:
        layers |= join_inputs(model, stacked)
    for place, (name, layer) in enumerate(layers.items()):
        layer.coefficients = coefficients + place
        setattr(model, name, layer)
    call = partial(model, inputs, order)
    if wrapped:
        call = torch.compile(lambda: model(inputs, order), fullgraph=True)  # or an error
    return [call() for _ in range(2)], layers


@pytest.mark.parametrize("order", ["qkv", "vkq", "kvq", "qv", "q", "qqkv"])
@pytest.mark.parametrize("shared", ["qkv", "kv", ""])
def test_any_order_of_calls_and_any_inputs_give_the_same(order, shared):
    model, one = Attention(), random_input()
    stacked = stack_on(model, NAMES)
    inputs = {name: one if name in shared else random_input() for name in "qkv"}
    expected, _ = outputs(model, stacked, inputs, order, wrapped=False)
    found, layers = outputs(model, stacked, inputs, order, wrapped=True)
    assert all(isinstance(layer, JoinedLinear) for layer in layers.values())
    torch.testing.assert_close(found, expected)


def test_compiled_there_is_one_product_for_all_layers_of_an_input_and_one_for_each():
    layers, graphs = join_inputs(model := Attention(), stack_on(model, NAMES)), []
    for layer in layers.values():
        layer.coefficients = torch.ones(2, N_ADAPTERS)
    one = random_input()
    torch.compile(
        lambda: [layers[f"{name}_proj"](one) for name in "qkv"],
        backend=lambda graph, _: graphs.append(graph) or graph,
    )()
    (graph,) = graphs
    n_products = sum(node.target is torch.nn.functional.linear for node in graph.graph.nodes)
    assert n_products == 1 + 3


def test_only_layers_of_one_module_share_an_input():
    model = nn.ModuleList([Attention(), Attention()])
    joined = join_inputs(model, stack_on(model, [f"{place}.{name}" for name in NAMES for place in (0, 1)]))
    found = {tuple(layer.name for layer in shared.layers) for shared in {j._shared for j in joined.values()}}
    assert found == {tuple(f"{place}.{name}_proj" for name in "qkv") for place in (0, 1)}


@pytest.mark.parametrize("order", ["q", "qk"])
def test_an_input_that_comes_again_after_a_pass_without_the_last_layer_is_not_taken_for_the_old(order):
    model, one = Attention(), random_input()
    layers = join_inputs(model, stack_on(model, NAMES))
    run_compiled = torch.compile(lambda: [layers[f"{name}_proj"](one) for name in order], fullgraph=True)
    for seed in range(3):
        for layer in layers.values():
            layer.coefficients = torch.randn(2, N_ADAPTERS, generator=torch.Generator().manual_seed(seed))
        found = run_compiled()
        torch.testing.assert_close(
            found, [MixedLinear.forward(layers[f"{name}_proj"], one) for name in order]
        )
        one.mul_(1.5)


def test_nothing_is_kept_after_the_last_layer_of_an_input():
    model, one = Attention(), random_input()
    _, layers = outputs(model, stack_on(model, NAMES), dict.fromkeys("qkv", one), "qkv", wrapped=True)
    (shared,) = {layer._shared for layer in layers.values()}
    assert [layer.name for layer in shared.layers] == ["q_proj", "k_proj", "v_proj"]
    assert shared._x is None
    assert shared._hidden == ()


def test_weights_and_factors_are_views_of_what_is_joined_with_the_values_they_had():
    model = Attention()
    stacked, before = stack_on(model, NAMES), copy.deepcopy(model.state_dict())
    factors, parameters = dict(stacked.modules), dict(model.named_parameters())
    joined = join_inputs(model, stacked)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    for name, layer in joined.items():
        own, weight = stacked.modules[name], model.get_submodule(name).weight
        assert torch.equal(layer.joined, torch.cat([before[f"{name}.weight"], factors[name].B], dim=1))
        assert torch.equal(own.A, factors[name].A)
        assert torch.equal(own.B, factors[name].B)
        places = {t.untyped_storage().data_ptr() for t in (weight, own.B, layer.joined)}
        assert len(places) == 1
        assert own.A.untyped_storage().data_ptr() == layer._shared.A.untyped_storage().data_ptr()
        assert layer.joined.stride(0) * layer.joined.element_size() % 128 == 0
        assert layer.module is own


def test_joined_again_they_are_the_same():
    model, one = Attention(), random_input()
    stacked, inputs = stack_on(model, NAMES), dict.fromkeys("qkv", one)
    expected, _ = outputs(model, stacked, inputs, "qkv", wrapped=False)
    join_inputs(model, stacked)
    torch.testing.assert_close(outputs(model, stacked, inputs, "qkv", wrapped=True)[0], expected)


def test_what_was_joined_before_is_freed_when_its_layers_are_gone():
    model = Attention()
    before = [weakref.ref(layer.joined) for layer in join_inputs(model, stack_on(model, NAMES)).values()]
    gc.disable()
    try:
        after = join_inputs(model, stack_on(model, NAMES, seed=1))
    finally:
        gc.enable()
    assert len(after) == len(before) == 3
    assert not any(joined() is not None for joined in before)


def test_weights_with_gradients_leave_none_in_what_is_joined():
    model = Attention().requires_grad_(True)
    stacked = stack_on(model, NAMES)
    joined = join_inputs(model, stacked)
    assert not any(layer.joined.requires_grad or layer.module.B.requires_grad for layer in joined.values())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "names", "joined"),
    [
        (Attention(), NAMES, NAMES),
        (Attention(), ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (Attention(), ["v_proj"], []),  # 6 out for 8 in
        (Attention(bias=True), NAMES, []),
        (Attention((8, 8, 9)), NAMES, []),
        (nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 5, bias=False)).double(), ["0", "1"], ["0"]),
    ],
    ids=["three", "two", "narrow", "bias", "widths", "by themselves"],
)
def test_joined_are_layers_of_one_input_that_put_out_more_than_they_read(model, names, joined):
    model = copy.deepcopy(model)
    assert sorted(join_inputs(model, stack_on(model, names))) == sorted(joined)


def test_an_input_of_other_rows_is_refused():
    model = Attention()
    stacked = stack_on(model, NAMES)
    layer = join_inputs(model, stacked)["q_proj"]
    layer.coefficients = torch.ones(3, N_ADAPTERS, dtype=torch.float64)
    with pytest.raises(Exception, match=r"q_proj: input of shape \(2, 5, 8\), expected .* n_rows = 3"):
        torch.compile(layer)(random_input())
