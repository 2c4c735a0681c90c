"""Merges of weights alone, against PEFT itself, slow versions from the papers, and mergekit and FusionBench.

The last two are compared with where they are installed: pip install mergekit==0.1.5 fusion-bench==0.2.33.
"""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import nn

from llm_merging import main as program
from llm_merging.merging import METHODS
from llm_merging.merging.peft_linear import multiply_sums
from search.adapters import Adapter, Factors, load_adapter
from search.config import load_config
from search.merge import touched_modules
from search.setup import load_setup
from tests.test_main import QUERIES, read_rows
from tests.test_merges import save_toy_zoo
from tests.test_setup import spoil
from tests.toys import AS_IT_IS, Recipe, make_model, save_adapter

FOLDED = ("dare", "dare_ties", "linear", "ties")
TABLES = {"balanced": None, "cat": 1 / 3, "task_arithmetic": 0.3, "uniform_average": 1 / 3}
"""Methods that write coefficients: the one of all adapters, None where each has its own."""
EQUAL_RANKS = (
    Recipe(rank=4, alpha=8, targets=("q_proj", "v_proj"), seed=1),
    Recipe(rank=4, alpha=4, targets=("q_proj", "k_proj", "down_proj"), seed=2),
    Recipe(rank=4, alpha=12, targets=("v_proj", "up_proj"), alpha_pattern={"v_proj": 2}, seed=3),
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    model, folder = make_model(), tmp_path_factory.mktemp("equal-ranks")
    return [save_adapter(model, folder / f"a{i}", recipe) for i, recipe in enumerate(EQUAL_RANKS)]


@pytest.fixture(scope="module")
def adapters(folders):
    return [load_adapter(str(folder)) for folder in folders]


@pytest.fixture
def peft_model(folders):
    model = PeftModel.from_pretrained(make_model(), folders[0], "a0", **AS_IT_IS)
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, f"a{index}", **AS_IT_IS)
    return model


def make_method(name, zoo, **attributes):
    method = METHODS[name](name, load_config(zoo, ["device=cpu"]))
    for attribute, value in attributes.items():
        setattr(method, attribute, value)
    return method


def make_adapter(*updates):
    """An adapter whose module "m<i>" has the i-th update exactly: B is the update, A the identity."""
    modules = {f"m{i}": Factors(torch.eye(u.shape[1], dtype=u.dtype), u, 1.0) for i, u in enumerate(updates)}
    return Adapter("toy", modules, "toy", None, "", "")


def random_updates(n, shape=(6, 7), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(n)]


def peft_deltas(model, name):
    """Module -> what PEFT adds to its weight for an adapter."""
    return {
        key.removeprefix("base_model.model."): module.get_delta_weight(name)
        for key, module in model.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }


@pytest.mark.parametrize("name", [*FOLDED, *TABLES])
def test_the_command_merges_answers_and_writes(zoo, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("queries.csv").write_text(QUERIES)
    arguments = ["--config", str(zoo), "--dataset_filepaths", "queries.csv", "--seed", "5"]
    assert program.main(["-m", name, *arguments]) == 0
    assert len(read_rows("output/queries.csv")) == 3
    written = load_file(f"output/{name}/safetensor.pt")
    if name in TABLES:
        document = json.loads(Path(f"output/{name}/coefficients.json").read_text())
        assert TABLES[name] is None or document["coefficients"] == [[TABLES[name]] * 3]
        assert written.keys() == load_file(f"output/{name}/adapter/adapter_model.safetensors").keys()
    else:
        document = json.loads(Path(f"output/{name}/merge.json").read_text())
        assert document["settings"].get("seed", 5) == 5
        assert document["scale"] == METHODS[name].scale
        base = load_file(zoo.parent / "base/model.safetensors")
        assert written
        assert all(not torch.equal(weight, base[key]) for key, weight in written.items())
    assert document["method"] == name


@pytest.mark.parametrize("name", [*FOLDED, *TABLES])
def test_what_is_folded_is_the_scaled_update(zoo, tmp_path, name):
    method = make_method(name, zoo, output=tmp_path)
    method._load_base_model()
    adapters = method._load_adapters()
    before = {m: method.base_model.get_submodule(m).weight.clone() for m in touched_modules(adapters)}
    updates = method.merged_updates(adapters)
    method.merge()
    assert updates.keys() == before.keys()
    for module, weight in before.items():
        after = method.base_model.get_submodule(module).weight
        torch.testing.assert_close(after, weight + method.scale * updates[module], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cat"])
def test_linear_and_cat_are_pefts(zoo, adapters, peft_model, name):
    peft_model.add_weighted_adapter(["a0", "a1", "a2"], [1 / 3] * 3, "merged", combination_type=name)
    expected = peft_deltas(peft_model, "merged")
    method = make_method(name, zoo)
    updates = method.merged_updates(adapters)
    assert updates.keys() == expected.keys()
    for module, update in updates.items():  # PEFT keeps its weights in float32
        torch.testing.assert_close(method.scale * update, expected[module], rtol=1e-5, atol=1e-6)


def test_linear_has_cross_terms_that_cat_has_not(zoo, adapters):
    linear, cat = (make_method(name, zoo).merged_updates(adapters) for name in ("linear", "cat"))
    name = "model.layers.0.self_attn.q_proj"
    first, second = (adapter.modules[name] for adapter in adapters[:2])
    root = (first.scaling * second.scaling) ** 0.5
    cross = root * (first.B @ second.A + second.B @ first.A)
    torch.testing.assert_close(linear[name], (cat[name] + cross) / 3)


def test_unequal_ranks_are_padded_with_zeros(zoo, toy_adapters):
    pool = toy_adapters("llama")
    updates = make_method("linear", zoo).merged_updates(pool)
    name = "model.layers.1.mlp.down_proj"
    assert {a.modules[name].A.shape[0] for a in pool if name in a.modules} == {4, 6}
    A, B = np.zeros((6, 24)), np.zeros((16, 6))
    for f in (a.modules[name] for a in pool if name in a.modules):
        for row in range(f.A.shape[0]):
            A[row] += (f.scaling / 3) ** 0.5 * f.A[row].numpy()
            B[:, row] += (f.scaling / 3) ** 0.5 * f.B[:, row].numpy()
    np.testing.assert_allclose(updates[name], B @ A)


def test_a_negative_scaling_changes_the_sign_once(zoo):
    A, B = torch.ones(1, 3), torch.ones(2, 1)
    adapter = Adapter("minus", {"m": Factors(A, B, -2.0)}, "", None, "", "")
    torch.testing.assert_close(make_method("linear", zoo).merged_updates([adapter])["m"], -2 * B @ A)


def test_multiplying_sums_is_one_product_of_two_sums():
    A, B = random_updates(2, (3, 5)), random_updates(2, (4, 3), seed=1)
    torch.testing.assert_close(multiply_sums(list(zip(A, B, strict=True))), (B[0] + B[1]) @ (A[0] + A[1]))


def test_the_sums_are_exact(zoo, toy_adapters):
    pool = toy_adapters("llama")
    for module, update in make_method("task_arithmetic", zoo).merged_updates(pool).items():
        parts = [a.modules[module] for a in pool if module in a.modules]
        expected = sum(f.scaling * f.B.numpy() @ f.A.numpy() for f in parts)
        np.testing.assert_allclose(update, expected, rtol=1e-12, atol=1e-14)


def test_cat_of_equal_weights_is_the_uniform_average(zoo, tmp_path):
    cat, average = (make_method(name, zoo, output=tmp_path / name) for name in ("cat", "uniform_average"))
    cat.merge()
    average.merge()
    torch.testing.assert_close(cat.merged_model, average.merged_model, rtol=0, atol=0)
    torch.testing.assert_close(cat.base_model.state_dict(), average.base_model.state_dict(), rtol=0, atol=0)


def test_the_balanced_merge_is_the_searches_reference_and_its_updates_are_equally_long(zoo, tmp_path):
    method = make_method("balanced", zoo, output=tmp_path)
    method.merge()
    (row,) = json.loads((tmp_path / "coefficients.json").read_text())["coefficients"]
    assert row == pytest.approx(load_setup(method.config).balanced, rel=1e-6)
    adapters = method._load_adapters()
    norms = [sum(float((f.scaling * f.B @ f.A).norm()) ** 2 for f in a.modules.values()) for a in adapters]
    assert max(row) < 1
    lengths = np.array(row) * np.sqrt(norms)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)


def test_the_balanced_merge_leaves_no_adapter_out(zoo, tmp_path):
    method = METHODS["balanced"](
        "balanced", load_config(zoo, ["device=cpu", spoil(zoo, tmp_path, expert_1=1000)])
    )
    method.output = tmp_path
    method.merge()
    document = json.loads((tmp_path / "coefficients.json").read_text())
    assert [adapter["name"] for adapter in document["adapters"]] == ["expert-0", "expert-1", "expert-2"]
    assert np.isfinite(document["coefficients"]).all()


MERGES_OF_DELTAS = {
    "ties": lambda deltas, ones: merge_utils.ties(deltas, ones, 0.2),
    "dare": lambda deltas, ones: merge_utils.dare_linear(deltas, ones, 0.1),
    "dare_ties": lambda deltas, ones: merge_utils.dare_ties(deltas, ones, 0.1),
}


@pytest.mark.parametrize("name", MERGES_OF_DELTAS)
def test_ties_and_dare_are_pefts_on_pefts_own_deltas(zoo, adapters, peft_model, name):
    deltas = [peft_deltas(peft_model, f"a{index}") for index in range(3)]
    method = make_method(name, zoo)
    updates = method.merged_updates(adapters)
    torch.manual_seed(method.config.search.seed)
    for module in touched_modules(adapters):
        like = next(d[module] for d in deltas if module in d)
        own = [d.get(module, torch.zeros_like(like)) for d in deltas]
        expected = MERGES_OF_DELTAS[name](own, torch.ones(3))
        torch.testing.assert_close(updates[module], expected, rtol=1e-6, atol=1e-9)


def slow_ties(updates, density):
    """TIES entry by entry, as section 3 of the paper has it: trim, elect, disjoint mean."""
    trimmed = []
    for update in updates:
        flat = update.flatten()
        kept = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: int(density * len(flat))]
        trimmed.append([flat[i].item() if i in kept else 0.0 for i in range(len(flat))])
    merged = []
    for column in zip(*trimmed, strict=True):
        positive, negative = sum(v for v in column if v > 0), -sum(v for v in column if v < 0)
        agreeing = [v for v in column if (v > 0 if positive >= negative else v < 0)]
        merged.append(sum(agreeing) / max(len(agreeing), 1))
    return torch.tensor(merged, dtype=torch.float64).reshape(updates[0].shape)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.75])
def test_ties_is_the_papers(zoo, density):
    updates = random_updates(5)
    pool = [make_adapter(update) for update in updates]
    found = make_method("ties", zoo, density=density).merged_updates(pool)["m0"]
    torch.testing.assert_close(found, slow_ties(updates, density))


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "uniform_average"])
def test_the_order_of_adapters_does_not_matter(zoo, toy_adapters, name):
    method = make_method(name, zoo)
    first, *others = (method.merged_updates(list(order)) for order in permutations(toy_adapters("llama")))
    for updates in others:
        assert updates.keys() == first.keys()
        for module, update in updates.items():
            torch.testing.assert_close(update, first[module])


def test_ties_of_one_adapter_untrimmed_is_that_adapter(zoo, adapters):
    method = make_method("ties", zoo, density=1.0)
    with pytest.warns(UserWarning, match="no pruning"):
        updates = method.merged_updates(adapters[:1])
    assert method.scale == 1
    assert updates.keys() == adapters[0].modules.keys()
    for module, f in adapters[0].modules.items():
        torch.testing.assert_close(updates[module], f.scaling * f.B @ f.A)


def test_an_adapter_without_a_module_has_no_say_there(zoo):
    update, other = random_updates(2)
    method = make_method("ties", zoo)
    alone = method.merged_updates([make_adapter(other, update)])["m1"]
    beside = method.merged_updates([make_adapter(other, update), make_adapter(other)])["m1"]
    torch.testing.assert_close(beside, alone)


def test_dare_keeps_a_tenth_and_rescales_it(zoo):
    update = random_updates(1, (100, 100))[0]
    dropped = make_method("dare", zoo).merged_updates([make_adapter(update)])["m0"]
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.1) < 0.015  # five standard deviations
    torch.testing.assert_close(dropped[kept], 10 * update[kept])


def test_dare_is_the_sum_in_expectation(zoo):
    updates = random_updates(2, (4, 5))
    method = make_method("dare", zoo, drop_rate=0.5)
    pool = [make_adapter(*[update] * 2000) for update in updates]
    mean = torch.stack(list(method.merged_updates(pool).values())).mean(0)
    torch.testing.assert_close(mean, sum(updates), rtol=0, atol=0.35)
    assert (mean - sum(updates)).abs().mean() < 0.06


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_the_seed_decides_what_is_dropped_and_nothing_else_does(zoo, adapters, name):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = make_method(name, zoo).merged_updates(adapters)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = make_method(name, zoo).merged_updates(adapters)
    other = METHODS[name](name, load_config(zoo, ["search.seed=1"])).merged_updates(adapters)
    assert all(torch.equal(first[module], again[module]) for module in first)
    assert not all(torch.equal(first[module], other[module]) for module in first)


DEVICES = "cpu", "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FOLDED, *TABLES])
def test_a_gpu_gives_what_the_cpu_gives(zoo, tmp_path, name):
    cpu, cuda = (
        METHODS[name](name, load_config(zoo, [f"device={d}", "base.dtype=float32"])) for d in DEVICES
    )
    for method in (cpu, cuda):
        method.output = tmp_path / method.device
        method.merge()
    if name not in ("dare", "dare_ties"):  # whose draws are the device's
        torch.testing.assert_close(
            {key: value.cpu() for key, value in cuda.merged_model.items()},
            {key: value.cpu() for key, value in cpu.merged_model.items()},
            rtol=1e-4,
            atol=1e-5,
        )


def mergekit_merge(name, updates, weight=1.0, **options):
    """What mergekit's method makes of updates to a base of zeros, a weight for each or for all."""
    registry = pytest.importorskip("mergekit.merge_methods.registry", exc_type=ImportError)
    groups = pytest.importorskip("mergekit.merge_methods.base", exc_type=ImportError)
    method = next(m for m in registry.registered_methods() if m.spec.name == name)
    tensors = [torch.zeros_like(updates[0]), *updates]
    ids = range(1, len(tensors))
    per_model = {
        "weight": dict(zip(ids, weight if isinstance(weight, list) else [weight] * len(ids), strict=True)),
        "density": dict.fromkeys(ids, options.pop("density", 1.0)),
    }
    shared = {p.name: p.default for p in method.spec.parameters if p.name not in per_model}
    group = groups.TensorGroup.from_tensors(tensors, base_index=0)
    return method.merge_group(group, **{**shared, **per_model, **options})


@pytest.mark.slow
def test_task_arithmetic_and_ties_are_mergekits_at_equal_weights(zoo):
    updates = random_updates(4, (20, 30), dtype=torch.float32)
    pool = [make_adapter(update) for update in updates]
    summed = make_method("task_arithmetic", zoo)
    expected = mergekit_merge("task_arithmetic", updates, summed.scale)
    torch.testing.assert_close(summed.scale * summed.merged_updates(pool)["m0"], expected)
    found = make_method("ties", zoo).merged_updates(pool)["m0"]
    torch.testing.assert_close(found, mergekit_merge("ties", updates, density=0.2))
    weights = [1.0, 3.0, 0.5, 2.0]  # where the two differ by design: whose sum's sign, and divided by what
    unequal = merge_utils.ties(updates, torch.tensor(weights), 0.2)
    assert not torch.allclose(unequal, mergekit_merge("ties", updates, weights, density=0.2))


@pytest.mark.slow
def test_dare_is_mergekits_but_for_the_rescaling(zoo):
    updates = random_updates(4, (20, 30), dtype=torch.float32)
    pool = [make_adapter(update) for update in updates]
    for ours, theirs in (("dare", "dare_linear"), ("dare_ties", "dare_ties")):
        method = make_method(ours, zoo)
        found = method.merged_updates(pool)["m0"]
        torch.manual_seed(method.config.search.seed)
        normalize = ours == "dare_ties"  # off by default: mergekit then sums the entries that agree
        dropped = mergekit_merge(theirs, updates, density=0.1, rescale=False, normalize=normalize)
        torch.testing.assert_close(found, dropped / 0.1)
    rescaled = mergekit_merge("dare_linear", updates[:1], density=0.1)
    torch.testing.assert_close(rescaled.abs().sum(), updates[0].abs().sum())


@pytest.mark.slow
def test_sums_and_ties_are_fusion_benchs(zoo):
    pytest.importorskip("fusion_bench", exc_type=ImportError)
    from fusion_bench.method.task_arithmetic.task_arithmetic import task_arithmetic_merge
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    updates = random_updates(4, (20, 30), dtype=torch.float32)
    pool = [make_adapter(update) for update in updates]
    base, *experts = nn.Module(), *(nn.Module() for _ in updates)
    weight = torch.ones(20, 30)
    for module, tensor in zip([base, *experts], [weight, *(weight + u for u in updates)], strict=True):
        module.register_buffer("weight", tensor)  # 0.2.33 refuses to add a Tensor to a Parameter
    summed = make_method("task_arithmetic", zoo)
    expected = base.weight + summed.scale * summed.merged_updates(pool)["m0"]
    merged = task_arithmetic_merge(base, experts, summed.scale, inplace=False)
    torch.testing.assert_close(merged.weight, expected)

    share = (0.2 * 600 - 1 + 0.5) / 600  # theirs keeps one entry more than its share
    flat = torch.stack([update.flatten() for update in updates])
    averaged = ties_merging(flat, share, "mean").reshape(20, 30)
    torch.testing.assert_close(make_method("ties", zoo).merged_updates(pool)["m0"], averaged)
