"""LoraHub, AdaMerging and the best single expert: against PEFT, dense merges in float64, and the clock."""

import copy
import csv
import json
import math
import re

import nevergrad as ng
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from llm_merging import main as program
from llm_merging.merging import METHODS
from llm_merging.merging.adamerging import MAX_STEPS, START
from llm_merging.merging.lorahub import BOUND, OPTIMIZER, PENALTY, SPREAD, CrossSums, bounce
from llm_merging.merging.prompted import prompted_search
from search import Trace, run_search
from search.adapters import load_adapter
from search.base import load_base
from search.config import load_config
from search.errors import InputError
from search.evaluate import PopulationEvaluator
from search.groups import group_modules
from search.merge import touched_modules
from search.optimizer import BatchOptimizer
from search.prompts import read_prompts
from tests.test_evaluate import merge_densely, score_slowly
from tests.test_experts import logp_alone
from tests.test_merges import IDS, save_toy_zoo
from tests.toys import AS_IT_IS, Recipe, load_with_peft, make_model, save_adapter

QUICK = (
    "device=cpu",
    "search.space=part",  # finer than AdaMerging's layers
    *("prompts.per_adapter=3", "prompts.unseen_per_adapter=2", "prompts.max_new_tokens=8"),
    *("search.max_evaluations=20", "search.n_candidates=5", "search.seed=3"),
)
NAMES = ("adamerging", "best_single", "lorahub")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def base(zoo):
    return load_base(str(zoo.parent / "base"), device="cpu")


@pytest.fixture(scope="module")
def adapters(zoo):
    return [load_adapter(str(folder)) for folder in sorted((zoo.parent / "adapters").iterdir())]


@pytest.fixture(scope="module")
def merged(zoo, tmp_path_factory):
    """Each method, merged once with QUICK."""
    methods = {}
    for name in NAMES:
        methods[name] = METHODS[name](name, load_config(zoo, QUICK))
        methods[name].output = tmp_path_factory.mktemp(name)
        methods[name].merge()
    return methods


def record_of(method):
    file = "merge.json" if method.name == "lorahub" else "coefficients.json"
    return json.loads((method.output / file).read_text())


def prompts_of(method, adapters):
    trace = Trace.load(method.output / "trace.jsonl")
    return read_prompts(trace.last("prompts"), [adapter.name for adapter in adapters])[0]


def layers_of(adapters):
    return group_modules(touched_modules(adapters), "layer")


def loss_slowly(base, adapters, prompts, merge, combine=lambda x: np.sqrt(x).mean()):
    """The configured loss of coefficients (n_groups, n_adapters) in float64, one prompt at a time."""
    case = copy.deepcopy(base.model).double(), adapters, layers_of(adapters), prompts
    own, of_base = score_slowly(*case, merge), score_slowly(*case, np.zeros_like(merge))
    return combine(own / np.maximum(of_base, 0.02))


# LoraHub


def lorahub_by_its_own_code(model, folders, weights):
    """Sum state dicts key by key and put the sum into the first adapter, as the released code does."""
    states = [get_peft_model_state_dict(load_with_peft(model, folder)) for folder in folders]
    total = {key: sum(w * state[key] for w, state in zip(weights, states, strict=True)) for key in states[0]}
    host = load_with_peft(model, folders[0])
    set_peft_model_state_dict(host, total)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in host.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def linear_by_peft(model, folders, weights):
    """add_weighted_adapter("linear"), which puts the root of weight * scaling on A and on B."""
    host = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], "a0", **AS_IT_IS)
    names = ["a0"]
    for index, folder in enumerate(folders[1:], start=1):
        host.load_adapter(folder, f"a{index}", **AS_IT_IS)
        names.append(f"a{index}")
    squares = [w**2 for w in weights]
    host.add_weighted_adapter(names, squares, "merged", combination_type="linear")
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("merged")
        for name, module in host.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize(
    ("oracle", "weights"),
    [(lorahub_by_its_own_code, [0.7, -0.4, 1.2]), (linear_by_peft, [0.7, 0.4, 1.2])],
)
def test_where_ranks_and_alphas_are_equal_the_update_is_lorahubs_and_pefts(tmp_path, oracle, weights):
    model = make_model("llama")
    folders = [save_adapter(model, tmp_path / f"a{seed}", Recipe(alpha=6, seed=seed)) for seed in (1, 2, 3)]
    updates = CrossSums([load_adapter(str(folder)) for folder in folders], model).updates(np.array(weights))
    expected = oracle(model, folders, weights)
    assert updates.keys() == expected.keys()
    for module, update in updates.items():
        torch.testing.assert_close(update, expected[module], rtol=1e-6, atol=1e-6)


def test_unequal_ranks_are_filled_with_zeros_and_each_scaling_goes_with_its_own_b(toy_adapters):
    adapters, w = toy_adapters("llama"), np.array([0.7, -0.4, 1.2])
    updates = CrossSums(adapters, make_model("llama")).updates(w)
    for module in touched_modules(adapters):
        own = [(w[i], f) for i, a in enumerate(adapters) if (f := a.modules.get(module))]
        expected = sum(
            wi * wj * fi.scaling * fi.B[:, :rank] @ fj.A[:rank]
            for wi, fi in own
            for wj, fj in own
            for rank in [min(fi.B.shape[1], fj.A.shape[0])]
        )
        torch.testing.assert_close(updates[module], expected)


def test_one_adapter_at_one_is_that_adapter_exactly(adapters, base):
    updates = CrossSums(adapters, base.model).updates(np.array([0.0, 1.0, 0.0]))
    for module, f in adapters[1].modules.items():
        torch.testing.assert_close(updates[module], f.scaling * f.B @ f.A)


def test_the_search_asks_for_what_lorahubs_own_settings_ask_for():
    n, budget = 6, 40
    target = np.linspace(-1, 2, n)  # partly outside the box
    box = ng.p.Array(init=[0.0] * n, lower=[-1.5] * n, upper=[1.5] * n)
    theirs = ng.optimizers.NGOpt(parametrization=box, budget=budget)
    ours = BatchOptimizer(np.zeros(n), SPREAD, 1, budget, 0, OPTIMIZER)
    for _ in range(budget):
        point, weights = theirs.ask(), bounce(ours.ask()[0])
        np.testing.assert_allclose(weights, point.value, atol=1e-9)
        loss = float(((weights - target) ** 2).sum())
        theirs.tell(point, loss)
        ours.tell([loss])
    assert loss < 0.5 * (target**2).sum()


def test_lorahub_folds_the_best_of_all_candidates_within_its_bounds(merged, base, adapters):
    method = merged["lorahub"]
    record, trace = record_of(method), Trace.load(method.output / "trace.jsonl")
    weights = np.array([record["settings"]["weights"][adapter.name] for adapter in adapters])
    candidates = np.concatenate([generation.genomes for generation in trace.generations])
    losses = np.concatenate([generation.losses for generation in trace.generations])
    np.testing.assert_array_equal(weights, candidates[losses.argmin()])
    assert np.abs(candidates).max() <= BOUND
    objective = record["settings"]["objective"]
    assert objective["loss"] + PENALTY * np.abs(weights).mean() == pytest.approx(losses.min())
    assert objective["loss"] == pytest.approx(np.mean(np.sqrt(objective["per_expert"])))
    plain = copy.deepcopy(base.model)
    for module, update in CrossSums(adapters, base.model).updates(weights).items():
        plain.get_submodule(module).weight.data += update
    torch.testing.assert_close(method.base_model(IDS).logits, plain(IDS).logits)


def test_lorahubs_loss_of_one_adapter_alone_is_my_merges_of_that_expert(merged, zoo, adapters, tmp_path):
    method = METHODS["lorahub"]("lorahub", load_config(zoo, QUICK))
    method.output = tmp_path
    loaded = method._load_everything()
    with prompted_search(method) as search:
        evaluator = search.evaluator()
        one_hot = np.eye(3)[1]
        crossed = evaluator.score_updates(CrossSums(loaded, method.base_model).updates(one_hot))
        alone = evaluator.score(np.broadcast_to(one_hot, (1, *search.setup.parts.shape)))
    assert crossed.losses == pytest.approx(alone.losses, rel=1e-5)


# AdaMerging


def entropy_slowly(base, adapters, prompts, coefficients):
    """The mean over experts of the mean entropy at their positions, in nats, in float64."""
    model = merge_densely(copy.deepcopy(base.model).double(), adapters, layers_of(adapters), coefficients)
    own = [[] for _ in adapters]
    for prompt, expert in enumerate(prompts.expert):
        logp = logp_alone(model, prompts, prompt)
        own[expert] += (-(logp.exp() * logp).sum(-1)).tolist()
    return np.mean([np.mean(values) for values in own])


def test_adamergings_entropy_falls_and_is_the_mean_entropy_of_its_outputs(merged, base, adapters):
    method = merged["adamerging"]
    record, prompts = record_of(method), prompts_of(method, adapters)
    found = np.array(record["coefficients"])
    assert found.shape == (2, 3)
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert record["objective"]["loss"] == pytest.approx(
        entropy_slowly(base, adapters, prompts, found), rel=1e-4
    )
    start = entropy_slowly(base, adapters, prompts, np.full_like(found, START))
    assert record["objective"]["loss"] < 0.95 * start
    told = [float(number) for number in re.findall(r"\d+\.\d+", method.report)]
    assert told == pytest.approx([record["objective"]["loss"], start], abs=1e-4)


def test_adamergings_loss_has_one_divisor_whatever_the_base_says(merged, base, adapters):
    trace = Trace.load(merged["adamerging"].output / "trace.jsonl")
    first = trace.generations[0]
    start = entropy_slowly(base, adapters, prompts_of(merged["adamerging"], adapters), np.full((2, 3), START))
    assert first.losses[0] * math.log(48) == pytest.approx(start, rel=1e-4)
    assert first.losses[0] == pytest.approx(first.per_expert[0].mean())


def test_adamerging_takes_no_more_steps_than_the_evaluations_allow(merged):
    record = record_of(merged["adamerging"])
    assert record["provenance"]["evaluations"] == 20 < MAX_STEPS
    assert (record["provenance"]["ended_by"], merged["adamerging"].ended_by) == ("evaluations",) * 2


def test_a_first_merge_that_is_not_a_number_is_refused(zoo, tmp_path, monkeypatch):
    gradient = PopulationEvaluator.gradient

    def broken(self, coefficients):
        found = gradient(self, coefficients)
        object.__setattr__(found, "loss", math.nan)
        return found

    monkeypatch.setattr(PopulationEvaluator, "gradient", broken)
    method = METHODS["adamerging"]("adamerging", load_config(zoo, QUICK))
    method.output = tmp_path
    with pytest.raises(InputError, match=r"no finite numbers on the prompts.*float32"):
        method.merge()


# The best single expert


def test_the_best_single_expert_is_the_one_of_lowest_loss(merged, base, adapters):
    method = merged["best_single"]
    record, prompts = record_of(method), prompts_of(method, adapters)
    tables = [np.broadcast_to(row, (2, 3)) for row in np.eye(3)]
    losses = [loss_slowly(base, adapters, prompts, table) for table in tables]
    best = int(np.argmin(losses))
    assert record["coefficients"] == [tables[best][0].tolist()] * 4
    loss = record["objective"]["loss"]
    assert loss == pytest.approx(losses[best], rel=1e-3)  # float32, and the root of what is nearly 0
    assert record["provenance"]["winner"] == f"expert expert-{best}"
    assert method.report.startswith(f"winner: expert expert-{best}, loss {loss:.4f} on")
    assert (method.ended_by, record["provenance"]["evaluations"]) == ("", 3)
    expected = merge_densely(base.model, adapters, layers_of(adapters), tables[best])
    torch.testing.assert_close(method.base_model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


# All three


def test_prompts_are_byte_for_byte_those_that_my_merge_searches_on(merged, zoo, base, tmp_path):
    run_search(load_config(zoo, QUICK), output=tmp_path, base=base)
    expected = Trace.load(tmp_path / "trace.jsonl").last("prompts")
    for method in merged.values():
        found = Trace.load(method.output / "trace.jsonl").last("prompts")
        assert {**found, "seconds": 0} == {**expected, "seconds": 0}


@pytest.mark.parametrize("name", ["adamerging", "lorahub"])
def test_the_clock_ends_the_search_and_the_best_so_far_is_merged(zoo, tmp_path, name):
    method = METHODS[name](name, load_config(zoo, [*QUICK, "search.max_evaluations=100000"]))
    method.output, method.gone_s = tmp_path, lambda: 1e6
    method.merge()
    provenance = record_of(method)["provenance"]
    assert (provenance["ended_by"], provenance["evaluations"], method.ended_by) == ("clock", 1, "clock")
    assert method.merged_model


@pytest.mark.parametrize("name", NAMES)
def test_a_search_that_the_evaluations_end_can_be_repeated(merged, zoo, tmp_path, name):
    method = METHODS[name](name, load_config(zoo, QUICK))
    method.output = tmp_path
    method.merge()
    shaped_by = [{**record_of(m), "provenance": {}} for m in (method, merged[name])]
    assert shaped_by[0] == shaped_by[1]
    for key, weight in method.merged_model.items():
        assert torch.equal(weight, merged[name].merged_model[key])


@pytest.mark.parametrize("name", NAMES)
def test_the_command_knows_the_method(zoo, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.csv").write_text("id,input,eval_type,answer_choices\n1,abc,generation,\n")
    monkeypatch.setattr(program, "read_config", lambda arguments: load_config(zoo, QUICK))
    assert program.main(["-m", name, "--dataset_filepaths", "queries.csv"]) == 0
    assert (tmp_path / "output" / name / "safetensor.pt").exists()
    with (tmp_path / "output/queries.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["1"]
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert ("search ended by evaluations" in last_line) == (name != "best_single")
