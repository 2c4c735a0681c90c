"""Batches that fit: never more than there is memory for, more with more of it, and one row at least."""

import gc
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_merging.data import GENERATION, MULTIPLE_CHOICE, Query
from llm_merging.evaluation import answer_queries
from llm_merging.merging.Merges import Merges
from search import Trace, run_search
from search.adapters import load_adapter
from search.base import load_base, load_shapes
from search.config import load_config
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import TokenBudget, expert_signals, plan_budget
from search.memory import (
    MOST_TOKENS,
    MOST_WRITTEN_TOKENS,
    Reading,
    Shape,
    choosing_cost,
    densest_rows,
    fits_in_memory,
    largest_batch,
    largest_fit,
    pick_tokens,
    read_memory,
    sampling_cost,
    shape_of,
    writing_cost,
)
from search.parts import assemble_parts
from tests.test_experts import make_prompts, stack
from tests.toys import make_model, random_ids

GIB = 2**30
DUMMIES = """
device: cuda
base: {source: "dummy:tiny", dtype: float32}
objective: {weak_signal_nats: 0}
search: {max_evaluations: 32, n_candidates: 8, gradient: {refine_steps: 2}}
prompts: {per_adapter: 2, unseen_per_adapter: 2, max_new_tokens: 8}
adapters:
  - {source: "dummy:tiny/q_proj,v_proj/r8#1", name: one}
  - {source: "dummy:tiny/q_proj,v_proj/r8#2", name: two}
"""
SIZES = st.integers(0, 200 * GIB)
MISTRAL = Shape(
    n_layers=32,
    d_hidden=4096,
    d_inner=14336,
    d_attention=4096,
    d_cached=1024,
    n_vocab=32000,
    n_bytes=2,
)
BASE = 2 * 7_241_732_096
COSTS = [writing_cost, choosing_cost, sampling_cost]


@given(st.floats(-1e12, 1e12), st.floats(1e-3, 1e10), st.integers(1, 10**6))
def test_what_is_picked_fits_is_a_power_of_two_and_the_next_one_would_not_do(available, each, most):
    tokens = pick_tokens(available, each, most)
    assert 1 <= tokens <= most
    assert tokens & (tokens - 1) == 0
    assert tokens == 1 or tokens * each <= available
    assert 2 * tokens > most or 2 * tokens * each > available


@given(SIZES, SIZES, st.floats(1, 1e9))
def test_more_memory_never_gives_fewer_tokens(one, other, each):
    less, more = sorted((one, other))
    assert pick_tokens(less, each) <= pick_tokens(more, each) <= MOST_TOKENS


@pytest.mark.parametrize("cost", COSTS)
@given(one=st.integers(1, 10**6), other=st.integers(1, 10**6), available=SIZES)
def test_batches_cost_more_the_larger_they_are_and_fit(cost, one, other, available):
    less, more = sorted((one, other))
    assert 0 < cost(MISTRAL, less) <= cost(MISTRAL, more)
    tokens = largest_fit(available, lambda n: cost(MISTRAL, n), MOST_WRITTEN_TOKENS)
    assert tokens == 1 or cost(MISTRAL, tokens) <= available


@given(free=SIZES, held=SIZES, used=SIZES, fraction=st.floats(0, 1))
def test_available_is_within_every_limit(free, held, used, fraction):
    used = min(used, held)
    reading = Reading(free, free + held, held, used, fraction)
    assert 0 <= reading.available <= max(0, free + held - used)
    assert reading.available + used <= max(used, (free + held) * fraction)
    more = Reading(free + GIB, free + held + GIB, held, used, fraction)
    assert more.available >= reading.available


def test_a_share_and_what_others_hold_both_limit():
    assert Reading(free=60 * GIB, total=80 * GIB, held=20 * GIB, used=5 * GIB).limit == 80 * GIB
    assert Reading(60 * GIB, 80 * GIB, 20 * GIB, 5 * GIB, fraction=0.5).limit == 40 * GIB
    assert Reading(free=10 * GIB, total=80 * GIB, held=GIB, used=GIB).limit == 11 * GIB


@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1)), min_size=1, max_size=30), st.integers(1, 500)
)
def test_the_densest_rows_are_measured_within_the_limit(rows, n_tokens):
    lengths = [length for length, _ in rows]
    n_scored = [int(length * share) for length, share in rows]
    chosen = densest_rows(lengths, n_scored, n_tokens)
    assert len(set(chosen)) == len(chosen) >= 1
    assert len(chosen) == 1 or sum(lengths[row] for row in chosen) <= n_tokens
    densities = [scored / length for length, scored in zip(lengths, n_scored, strict=True)]
    assert densities[chosen[0]] == max(densities)


def test_a_real_models_shape_is_read_from_its_configuration():
    shapes = load_shapes("dummy:mistral-7b").to(torch.bfloat16)
    assert shape_of(shapes) == MISTRAL
    assert MISTRAL.cache == 131_072
    assert shape_of(make_model("gpt2")).d_inner == 4 * shape_of(make_model("gpt2")).d_hidden


def test_a_cache_takes_what_the_shape_says(architecture):
    model, ids = make_model(architecture), random_ids(2, 6)
    past = model(ids, use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in past.layers] if hasattr(past, "layers") else past
    n_bytes = sum(t.numel() * t.dtype.itemsize for layer in layers for t in layer)
    shape = shape_of(model)
    assert shape.cache * ids.numel() == n_bytes
    assert shape.n_layers == len(layers)
    assert 0 < shape.forward < shape.graph


def test_a_7b_model_writes_64_rows_under_46_gib_and_fewer_tokens_under_22():
    def written(limit):
        available = Reading(limit * GIB, limit * GIB, 0, 0).available - BASE
        return largest_fit(available, lambda n: writing_cost(MISTRAL, n), MOST_WRITTEN_TOKENS)

    assert written(46) == MOST_WRITTEN_TOKENS
    assert 64 * 200 <= written(22) < written(46)


def test_a_cpu_has_no_plan_and_keeps_its_defaults():
    model = make_model("llama")
    assert read_memory(torch.device("cpu")) is None
    assert largest_batch(model, writing_cost, 4096) == 4096
    budget = TokenBudget(1024, by_memory=True)
    budget.plan(model.device, [3], [1], lambda rows: pytest.fail("measured"))
    assert (budget.tokens_per_forward, budget.bytes_per_token) == (1024, None)


@pytest.fixture
def pretend(monkeypatch):
    """Let a CUDA device have so much memory and a step take so much; return the list to record steps in."""

    def make(available, peak):
        asked = []

        def measure(device, step):
            step()
            if peak is None:
                raise torch.OutOfMemoryError("no memory")
            return peak

        monkeypatch.setattr("search.experts.measure_peak", measure)
        free = int(available / 0.95)
        monkeypatch.setattr("search.memory.read_memory", lambda device: Reading(free, free, 0, 0))
        return asked

    return make


def test_a_budget_follows_once_from_what_a_small_step_takes_and_what_is_to_be_kept(pretend):
    asked = pretend(available=1_000_001, peak=2_000)
    budget = TokenBudget(8192, by_memory=True)
    for _ in range(2):
        budget.plan(torch.device("cuda"), [300, 20, 200], [1, 10, 150], asked.append, kept_bytes=500_000)
    assert asked == [[2, 1]]  # the densest that fit 256 tokens
    assert budget.bytes_per_token == 2_000 / 220
    assert budget.tokens_per_forward == 16_384 == pick_tokens(500_000, 2_000 / 220)
    tight = TokenBudget(8192, by_memory=True)
    tight.plan(torch.device("cuda"), [300, 20, 200], [1, 10, 150], asked.append, kept_bytes=990_000)
    assert tight.tokens_per_forward == 1024


def test_where_not_even_the_small_step_fits_one_row_is_tried_at_a_time(pretend):
    asked = pretend(available=100, peak=None)
    budget = TokenBudget(8192, by_memory=True)
    for _ in range(2):
        budget.plan(torch.device("cuda"), [10, 10], [1, 1], asked.append)
    assert asked == [[0, 1]]
    assert (budget.tokens_per_forward, budget.bytes_per_token) == (1, None)


def test_a_number_that_was_asked_for_is_not_planned(pretend):
    asked = pretend(available=10**9, peak=1)
    budget = TokenBudget(48)
    budget.plan(torch.device("cuda"), [10], [1], asked.append)
    assert (asked, budget.tokens_per_forward) == ([], 48)


def test_signals_and_gradients_can_be_measured_on_some_rows_and_change_nothing(monkeypatch, toy_adapters):
    model, prompts = make_model("llama"), make_prompts()
    stacked, groups = stack(toy_adapters("llama"))
    case, table = (model, stacked, groups, prompts), torch.full((len(groups.names), 3), 0.3).double().numpy()
    signals = expert_signals(*case)
    expected = PopulationEvaluator(*case, signals, Scoring()).gradient(table)
    planned = []

    def plan(self, device, lengths, n_scored, step, kept_bytes=0):
        assert len(lengths) == len(n_scored) == prompts.n_prompts
        step([2, 1])
        planned.append(kept_bytes)

    monkeypatch.setattr(TokenBudget, "plan", plan)
    plan_budget(*case, budget := TokenBudget(1024, by_memory=True), n_kept=7)
    found = PopulationEvaluator(*case, signals, Scoring(), budget).gradient(table)
    assert planned == [7 * 48 * 8, 0]
    assert found.loss == expected.loss
    assert (found.gradient == expected.gradient).all()


def test_a_step_fits_or_not_and_other_errors_are_not_a_lack_of_memory():
    def step(rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no memory")

    assert fits_in_memory(step, [0, 1])
    assert not fits_in_memory(step, [0, 1, 2])
    with pytest.raises(ZeroDivisionError):
        fits_in_memory(lambda rows: 1 / 0, [0, 1])


@contextmanager
def capped(n_bytes):
    """Let this process hold no more than so many bytes of the GPU beside what it has."""
    gc.collect()
    torch.cuda.empty_cache()
    reading = read_memory(torch.device("cuda"))
    torch.cuda.set_per_process_memory_fraction((reading.held + n_bytes) / reading.total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def parts():
    base = load_base("dummy:tiny", device="cuda", dtype="float32")
    adapters = [load_adapter(f"dummy:tiny/q_proj,v_proj/r8#{seed}", name=str(seed)) for seed in range(3)]
    return assemble_parts(base, adapters, base_name="dummy:tiny", kind="layer")


def make_evaluator(parts, budget):
    prompts = make_prompts()
    case = parts.model, parts.stacked, parts.groups, prompts
    plan_budget(*case, budget, n_kept=sum(map(len, prompts.scored)))
    return PopulationEvaluator(*case, expert_signals(*case, budget), Scoring(), budget)


@pytest.mark.gpu
def test_a_cap_is_read_and_kept_to(parts):
    with capped(3 * GIB):
        reading = read_memory(parts.model.device)
        assert reading.limit <= reading.held + 3 * GIB + 2**20
        assert reading.available <= 3 * GIB + reading.held - reading.used


@pytest.mark.gpu
@pytest.mark.parametrize("n_mib", [256, 2048])
def test_scores_gradients_and_any_population_fit_under_a_cap(parts, n_mib):
    budget = TokenBudget(8192, by_memory=True)
    with capped(n_mib * 2**20):
        room = read_memory(parts.model.device).available  # the cap, and what is held already and free
        evaluator = make_evaluator(parts, budget)
        table = torch.rand(200, *parts.shape, generator=torch.Generator().manual_seed(0)).double().numpy()
        losses = evaluator.score(table).losses
        gradient = evaluator.gradient(table[0])
    assert budget.bytes_per_token > 0
    assert evaluator.graph_budget.bytes_per_token > 0
    assert 1 <= evaluator.graph_budget.tokens_per_forward <= MOST_TOKENS
    assert budget.tokens_per_forward * budget.bytes_per_token <= room
    alone = make_evaluator(parts, TokenBudget(64))
    assert losses == pytest.approx(alone.score(table).losses, abs=0.02)
    assert gradient.loss == pytest.approx(losses[0], abs=0.02)


@pytest.mark.gpu
def test_a_number_that_was_asked_for_stays_and_so_does_what_ran_out(parts):
    budget = TokenBudget(48)
    evaluator = make_evaluator(parts, budget)
    evaluator.gradient(torch.zeros(parts.shape).double().numpy())
    assert budget.tokens_per_forward == evaluator.graph_budget.tokens_per_forward == 48


@pytest.mark.gpu
@pytest.mark.parametrize("cost", COSTS)
def test_batches_of_answers_shrink_with_the_memory(parts, cost):
    shape = shape_of(parts.model)
    with capped(8 * GIB):
        most = largest_batch(parts.model, cost, MOST_WRITTEN_TOKENS)
    with capped(16 * 2**20):
        room = read_memory(parts.model.device).available
        least = largest_batch(parts.model, cost, MOST_WRITTEN_TOKENS)
    assert 1 <= least <= most <= MOST_WRITTEN_TOKENS
    assert cost(shape, least) <= room
    assert least == MOST_WRITTEN_TOKENS or cost(shape, 2 * least) > room


@pytest.fixture
def dummies(tmp_path):
    (tmp_path / "dummies.yaml").write_text(DUMMIES)
    return load_config(tmp_path / "dummies.yaml")


@pytest.mark.gpu
def test_a_whole_search_fits_under_a_cap_and_records_its_batches(dummies, tmp_path):
    with capped(512 * 2**20):
        result = run_search(dummies, output=tmp_path / "run")
    assert result.ended_by == "evaluations"
    assert 1 <= Trace.load(tmp_path / "run/trace.jsonl").last("signals")["tokens_per_forward"] <= MOST_TOKENS


@pytest.mark.gpu
def test_64_rows_and_more_are_answered_together_under_a_cap_as_they_are_in_small_batches(dummies):
    method, rows = Merges("base", dummies), []
    method._load_everything()
    write = method.generate
    method.generate = lambda batch: rows.append(len(batch["input"])) or write(batch)
    texts = [f"Question {i}: " + "what is it? " * (i % 9) for i in range(96)]
    queries = [Query(f"g{i}", text, GENERATION) for i, text in enumerate(texts)]
    queries += [Query(f"c{i}", text, MULTIPLE_CHOICE, ("yes", "no", "it is")) for i, text in enumerate(texts)]
    with capped(GIB):
        together = answer_queries(method, queries, progress=False)
    assert max(rows) >= 64
    few = answer_queries(method, queries, tokens_per_batch=1024, progress=False)
    same = [one == other for one, other in zip(together, few, strict=True)]
    assert sum(same) >= 0.9 * len(same)  # sums in another order may decide between two tokens
