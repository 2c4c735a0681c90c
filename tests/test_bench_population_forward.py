"""The speed benchmark's rivals against each other and against formulas, at toy size; and that it runs."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_population_forward
from benchmarks.bench_population_forward import ForwardScene, check_ways, merged_ways
from benchmarks.speed_exactness import _rounded_once, measure_exactness
from benchmarks.speed_rivals import DenseMerge, PeftWays
from benchmarks.speed_scene import ALL_SEVEN, TINY, build_model, build_stack
from benchmarks.timing import time_interleaved
from search.population import population
from search.stack import StackedFactors, StackedModule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene():
    return ForwardScene(TINY, CPU, compiled=False)


@pytest.fixture(scope="module")
def rivals(scene):
    return DenseMerge(scene.model, scene.stacked, scene.groups), PeftWays(scene.model, scene.stacked)


def test_dense_and_cat_are_the_population_and_the_others_are_not(scene, rivals):
    found = check_ways(scene, *rivals)
    assert found["agree"]
    assert found["effect"] > 1e-3
    assert max(found["dense"], found["peft_cat"]) < 1e-3
    assert min(found["lorahub"], found["peft_linear"]) > 0.1


def test_lorahub_weighs_a_and_b_apart(scene, rivals):
    weights = scene.coefficients(1)[0, 0]

    def summed(module):
        own = [module.owner == index for index in range(TINY.n_adapters)]
        A = sum(w * module.A[rows] for w, rows in zip(weights, own, strict=True))
        B = sum(w * module.B[:, rows] for w, rows in zip(weights, own, strict=True))
        return StackedModule(A, B, torch.zeros(len(A), dtype=torch.int64))

    one = StackedFactors({name: summed(m) for name, m in scene.stacked.modules.items()}, ("sum",))
    with population(scene.model, one, torch.ones(4, len(scene.groups.names), 1), scene.groups):
        expected = scene.forward(4)
    with rivals[1].lorahub(weights.tolist()):
        torch.testing.assert_close(scene.forward(4), expected)


def test_every_rival_leaves_the_model_as_it_was(scene, rivals):
    before, modules = scene.forward(4), dict(scene.model.named_modules())
    for merged in merged_ways(scene, *rivals, scene.coefficients(1)[0]).values():
        with merged():
            assert not torch.equal(scene.forward(4), before)
        assert dict(scene.model.named_modules()) == modules
        assert torch.equal(scene.forward(4), before)


def test_flops_are_two_a_weight_of_the_layers():
    model = build_model(TINY, CPU)
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    attention = TINY.n_layers * TINY.n_tokens * TINY.d_model
    assert TINY.flops_per_token(0.0) == 2 * (weights + attention)
    assert TINY.flops_per_token(1.0) == 2 * (weights + attention + model.lm_head.weight.numel())
    assert len(build_stack(model, TINY, ALL_SEVEN, rank=2)[0].modules) == 7 * TINY.n_layers


def test_functions_are_timed_in_turn_in_changing_orders():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = time_interleaved(ways, CPU, repeats=8, warm_ups=1)
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert rounds[0] == "abc"
    assert {"".join(sorted(own)) for own in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert list(seconds) == list("abc")


def test_errors_are_told_from_those_that_the_mixture_cannot_help():
    sizes = replace(TINY, dtype=torch.bfloat16)
    model = build_model(sizes, CPU)
    stacked, groups = build_stack(model, sizes)
    found = measure_exactness(model, stacked, groups, sizes)
    low, high = found["error_over_base_spread"]
    assert low < found["error_over_base"] < high
    assert 1e-3 < found["base_error"] < 0.1
    assert 0.5 < found["floor_over_base"] < 1.5
    assert found["float32_error"] < 1e-5
    assert found["error_over_base"] == found["error_over_base_eager"]

    wide_model, x = copy.deepcopy(model).float(), torch.randn(3, sizes.d_model).bfloat16()
    names = ["model.layers.1.self_attn.q_proj"]
    layer, wide_layer = model.get_submodule(names[0]), wide_model.get_submodule(names[0])
    wide_layer.weight.mul_(2)
    with _rounded_once(model, wide_model, names):
        torch.testing.assert_close(layer(x), wide_layer(x.float()).bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(2 * layer(x), wide_layer(x.float()).bfloat16())


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_runs_tiny_and_records_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_population_forward, "RESULTS", tmp_path / "results.jsonl")
    options = ["--tiny", "--device", "cpu", "--repeats", "1"]
    assert bench_population_forward.main(options) == 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert found["exactness"]["float32_error"] < 1e-5
    assert found["candidates"][0]["tokens_a_candidate"] == 32
    assert found["candidates"][0]["candidates_per_s"].keys() >= {"population", "dense", "lorahub", "peft_cat"}
    assert found["full_forward"][0]["tokens"] == TINY.tokens_per_forward
    assert not found["compiled"]
