"""RegMean: the closed form against least squares and FusionBench, inputs against plain hooks, a merge."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from llm_merging.merging import METHODS
from llm_merging.merging.regmean import GramSums, InputGrams, measure_inputs, shape_gram
from llm_merging.merging.subspaces import add_updates
from search.adapters import Factors
from search.base import LoadedBase
from search.config import load_config
from search.errors import InputError
from search.merge import fold_adapters
from search.parts import assemble_parts
from search.trace import Trace
from tests.test_merges import save_toy_zoo
from tests.toys import BASE_NAME

D_OUT, D_IN, N_TOKENS = 10, 12, 40
same = partial(torch.testing.assert_close, rtol=0, atol=1e-8)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expert(seed, name="m"):
    B, A = normal(D_OUT, 3, seed=seed), normal(3, D_IN, seed=seed + 100)
    return SimpleNamespace(name=f"e{seed}", source="here", modules={name: Factors(A, B, 0.5)})


def delta(adapter, name="m"):
    f = adapter.modules[name]
    return f.scaling * f.B @ f.A


def merge(adapters, inputs, *, off_diagonal=1.0, anchor=1e-12, name="m"):
    """RegMean of one module, on inputs (n_tokens, d_in) an expert."""
    sums = GramSums(off_diagonal)
    for adapter, x in zip(adapters, inputs, strict=True):
        sums.add(adapter, InputGrams({name: x.T @ x}, {name: name}))
    return add_updates(sums.solve(anchor)[name]).dense()


def unit(x):
    """Inputs whose Gram matrix has mean diagonal 1, what RegMean makes of them."""
    return x * (D_IN / x.square().sum()).sqrt()


def test_it_is_least_squares_on_the_experts_outputs():
    adapters, inputs = [expert(1), expert(2)], [normal(N_TOKENS, D_IN, seed=s) * s for s in (3, 4)]
    X = torch.cat([unit(x) for x in inputs])
    Y = torch.cat([unit(x) @ delta(a).T for a, x in zip(adapters, inputs, strict=True)])
    same(merge(adapters, inputs), torch.linalg.lstsq(X, Y).solution.T)


def test_the_base_is_one_more_expert_that_reads_everything_a_little():
    adapters, inputs, anchor = [expert(1), expert(2)], [normal(5, D_IN, seed=s) for s in (3, 4)], 0.3
    X = torch.cat([unit(x) for x in inputs] + [anchor**0.5 * torch.eye(D_IN, dtype=torch.float64)])
    Y = X[:10] @ delta(adapters[0]).T, X[:10] @ delta(adapters[1]).T
    Y = torch.cat([Y[0][:5], Y[1][5:], torch.zeros(D_IN, D_OUT, dtype=torch.float64)])
    merged = merge(adapters, inputs, anchor=anchor)
    same(merged, torch.linalg.lstsq(X, Y).solution.T)
    unread = torch.linalg.svd(torch.cat(inputs)).Vh[10:]  # no expert's input points there
    same(merged @ unread.T, torch.zeros(D_OUT, 2, dtype=torch.float64))


def test_experts_that_read_different_inputs_are_all_recovered():
    adapters, inputs = [expert(1), expert(2)], [normal(N_TOKENS, D_IN, seed=s) for s in (3, 4)]
    inputs[0][:, :5] = 0
    inputs[1][:, 5:] = 0
    merged = merge(adapters, inputs, off_diagonal=0.9)
    for adapter, x in zip(adapters, inputs, strict=True):
        same(x @ merged.T, x @ delta(adapter).T)


def test_equal_experts_are_that_expert():
    inputs = [normal(N_TOKENS, D_IN, seed=s) for s in (3, 4)]
    same(merge([expert(1), expert(1)], inputs, off_diagonal=0.9), delta(expert(1)))


def test_long_prompts_and_large_inputs_have_no_more_say():
    adapters, inputs = [expert(1), expert(2)], [normal(N_TOKENS, D_IN, seed=s) for s in (3, 4)]
    more = [torch.cat([inputs[0]] * 3), 50 * inputs[1]]
    same(merge(adapters, more, off_diagonal=0.9), merge(adapters, inputs, off_diagonal=0.9))


def test_an_expert_without_the_module_holds_it_to_the_base_on_its_inputs():
    inputs = [normal(N_TOKENS, D_IN, seed=3)] * 2
    absent = SimpleNamespace(name="absent", source="here", modules={})
    same(merge([expert(1), absent], inputs), delta(expert(1)) / 2)


def test_off_diagonal_entries_shrink_and_the_mean_diagonal_is_one():
    gram = unit(normal(5, D_IN, seed=1)).T @ normal(5, D_IN, seed=1)
    shaped = shape_gram(gram, 0.9)
    same(shaped.diagonal().mean(), torch.tensor(1.0).double())
    same(
        shaped - torch.diag(shaped.diagonal()),
        0.9 * (gram - torch.diag(gram.diagonal())) / gram.diagonal().mean(),
    )
    same(shape_gram(torch.zeros(3, 3), 0.9), torch.zeros(3, 3))


def test_inputs_that_are_not_finite_are_refused_by_name():
    with pytest.raises(InputError, match=r"'e1' \(here\): what m reads on its own prompts is not finite"):
        merge([expert(1)], [torch.full((2, D_IN), torch.inf, dtype=torch.float64)])


@pytest.mark.slow
def test_fusion_bench_makes_the_same_of_whole_weights():
    peer = pytest.importorskip("fusion_bench.method.regmean.regmean")
    adapters, inputs = [expert(1), expert(2)], [unit(normal(N_TOKENS, D_IN, seed=s)) for s in (3, 4)]
    base = normal(D_OUT, D_IN, seed=9)
    merged = peer.merging_with_regmean_weights(
        {"m.weight": [base + delta(a) for a in adapters]},
        [{"m": x.T @ x} for x in inputs],
        reduce_non_diagonal_ratio=0.9,
    )
    ours = base + merge(adapters, inputs, off_diagonal=0.9)
    torch.testing.assert_close(ours, merged["m.weight"], rtol=0, atol=1e-6)  # it has 1 - 0.9 in float32


ROWS = [(1, 5, 9, 30, 12), (1, 7), (1, 20, 21, 22)]


def test_inputs_are_the_experts_own_at_every_token(architecture, toy_model, toy_adapters):
    model, adapters = toy_model(architecture), toy_adapters(architecture)
    parts = assemble_parts(
        LoadedBase(model, None, "", None, None), adapters, base_name=BASE_NAME, kind="layer"
    )
    measured = measure_inputs(parts, ROWS, expert=1)
    alone = copy.deepcopy(model)
    one_hot = torch.zeros(len(parts.groups.names), 3)
    one_hot[:, 1] = 1
    fold_adapters(alone, adapters, one_hot, parts.groups)
    read = {}
    for name in measured.first_of:
        alone.get_submodule(name).register_forward_hook(
            lambda _, inputs, __, name=name: read.setdefault(name, []).append(inputs[0][0])
        )
    for row in ROWS:  # one by one, without padding
        alone(input_ids=torch.tensor([row]))
    for name, first in measured.first_of.items():
        x = torch.cat(read[name])
        torch.testing.assert_close(measured.grams[first], x.T @ x, rtol=1e-5, atol=1e-5)
    assert len(measured.grams) < len(measured.first_of) or architecture in ("gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """RegMean of the toy zoo, merged once."""
    folder = tmp_path_factory.mktemp("zoo")
    quick = [
        "device=cpu",
        "prompts.per_adapter=2",
        "prompts.unseen_per_adapter=2",
        "prompts.max_new_tokens=10",
    ]
    config = load_config(save_toy_zoo(folder), quick)
    method = METHODS["regmean"]("regmean", config)
    method.output = folder / "out"
    method.merge()
    return method


def test_a_merge_writes_its_prompts_and_what_shaped_it(merged):
    document = json.loads((merged.output / "merge.json").read_text())
    assert document["settings"] == {"off_diagonal": 0.9, "anchor": 0.01, "positions": "all"}
    trace = Trace.load(merged.output / "trace.jsonl")
    prompts = trace.last("prompts")
    n_tokens = sum(len(row["ids"]) for part in ("searched", "unseen") for row in prompts[part])
    assert merged.report == f"regmean: inputs of {n_tokens} tokens that the models wrote"
    assert trace.header["method"] == "regmean"


def test_a_merge_moves_the_modules_that_experts_touch(merged):
    fresh = METHODS["regmean"]("regmean", merged.config)
    fresh._load_base_model()
    before = fresh.base_model.state_dict()
    changed = {
        name for name, value in merged.base_model.state_dict().items() if not value.equal(before[name])
    }
    assert changed == set(merged.merged_model)
    assert all(torch.isfinite(value).all() for value in merged.merged_model.values())
