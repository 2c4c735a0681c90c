"""Whole runs on a toy zoo: what they write, that they repeat, how they end, and who wins."""

import copy
import gc
import json
import os
import re
import resource
import signal
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel

import search
import search.passes
from search import Trace, run_search
from search.base import load_base
from search.config import load_config
from search.errors import InputError
from search.evaluate import PopulationEvaluator
from search.merge import fold_adapters
from search.objective import entropy_excess
from search.stages import GenomeEvaluator
from search.timebox import TimeBox
from tests.test_base import make_toy_model
from tests.test_merges import IDS, save_toy_zoo
from tests.test_setup import spoil

QUICK = (
    "device=cpu",
    *("prompts.per_adapter=3", "prompts.unseen_per_adapter=4", "prompts.max_new_tokens=10"),
    *("search.max_evaluations=24", "search.n_candidates=6", "search.n_finalists=3"),
    "objective.weak_signal_nats=0",  # without skeletons all would be confined
)
TIMES = {"elapsed_s", "seconds", "peak_bytes", "left_s", "needed_s", "reserves_s"}
EVENTS = ["prompts", "signals", "references", "search", "stage", "stage_ended", "search_ended"]
ENDS_WELL = "objective.weak_signal_nats=100"
"""All adapters are near the balanced merge: no single expert wins, something that was found does."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def base(zoo):
    """The base, loaded once for all runs."""
    return load_base(str(zoo.parent / "base"), device="cpu")


@pytest.fixture
def run(zoo, base, tmp_path):
    """Run with overrides; the result, the trace and the folder."""

    def start(*overrides, folder="out", **options):
        output = tmp_path / folder
        config = load_config(zoo, [*QUICK, *overrides])
        result = run_search(config, output=output, **{"base": base, **options})
        return result, Trace.load(output / "trace.jsonl"), output

    return start


@pytest.fixture(scope="module")
def finished(zoo, tmp_path_factory):
    """One run that several tests look at."""
    output = tmp_path_factory.mktemp("finished")
    result = run_search(load_config(zoo, QUICK), output=output)
    return result, Trace.load(output / "trace.jsonl"), output


def event(trace, name):
    return next(found for found in trace.events if found["event"] == name)


def names_of(trace):
    return [found["event"] for found in trace.events]


def timeless(output):
    """All lines of a trace without what depends on the clock."""
    lines = map(json.loads, (output / "trace.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def at_scoring(monkeypatch, call, action):
    """Do something before the search scores candidates for the n-th time (without a race: the generation)."""
    calls = []
    score_blocks = GenomeEvaluator.score_blocks

    def scored(self, genomes, blocks):
        calls.append(genomes)
        if len(calls) == call:
            action()
        return score_blocks(self, genomes, blocks)

    monkeypatch.setattr(GenomeEvaluator, "score_blocks", scored)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def impatient(monkeypatch):
    """What is under way is dropped as soon as somebody interrupts."""
    monkeypatch.setattr("search.interruption.GRACE_S", 0.0)


def test_the_public_names_are_there():
    assert {"RunResult", "SearchConfig", "Trace", "merge", "run_search"} <= set(search.__all__)
    assert all(hasattr(search, name) for name in search.__all__)


def test_what_experts_say_is_freed_before_the_merge(run, monkeypatch):
    """By counts of references: a GPU's memory is needed before the collector of cycles comes round."""
    kept, alive = [], []
    prepare, deliver = search.setup.prepare_steering, search.phases.deliver_ending

    def steer(*arguments):
        steering = prepare(*arguments)
        both = steering.searched, steering.unseen
        kept.extend(weakref.ref(found) for own in both for found in (own, own._signals.logits))
        return steering

    def merge(*arguments):
        alive.append([found() is not None for found in kept])
        return deliver(*arguments)

    monkeypatch.setattr("search.setup.prepare_steering", steer)
    monkeypatch.setattr("search.phases.deliver_ending", merge)
    gc.collect()
    gc.disable()
    try:
        run("search.gradient.refine_steps=2")
    finally:
        gc.enable()
    assert alive == [[False] * 4]


def test_a_run_writes_trace_adapter_and_coefficients_and_nothing_else(finished):
    result, trace, output = finished
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "coefficients.json"}
    assert files == {"trace.jsonl", "coefficients.json", *(f"adapter/{name}" for name in adapter)}
    document = json.loads((output / "coefficients.json").read_text())
    np.testing.assert_array_equal(document["coefficients"], result.coefficients)
    assert document["method"] == "concord"
    assert document["base"] == {**trace.header["base"], "name": trace.header["config"]["base"]["name"]}
    assert document == json.loads((output / "adapter/coefficients.json").read_text())
    objective, provenance = document["objective"], document["provenance"]
    assert (objective["name"], objective["combine"]) == ("entropy_excess", "mean_sqrt")
    assert objective["loss"] == result.loss
    assert np.mean(np.sqrt(objective["per_expert"])) == pytest.approx(result.loss)
    expected = {"seed": 0, "trace": "trace.jsonl", "winner": result.winner, "ended_by": "evaluations"}
    assert expected.items() <= provenance.items()
    assert provenance["evaluations"] == result.evaluations == 24


def test_the_header_says_what_the_run_depends_on(finished, zoo):
    header = finished[1].header
    assert header["config"] == load_config(zoo, QUICK).model_dump(mode="json")
    assert header["seed"] == 0
    assert len(header["base"]["sha256"]) == len(header["config_sha256"]) == 64
    assert [adapter["name"] for adapter in header["adapters"]] == ["expert-0", "expert-1", "expert-2"]
    assert (header["groups"], header["left_out"]) == (["model"], {})
    assert (header["device"], header["dtype"]) == ("cpu", "float32")
    assert torch.__version__.startswith(header["versions"]["torch"])  # the wheel may leave out "+cu124"


def test_the_page_on_the_trace_names_every_field_that_is_written(finished):
    _, trace, _ = finished
    page = (Path(__file__).parents[1] / "docs/TRACE.md").read_text(encoding="utf-8")
    named = {
        name: set(re.findall(r"`(\w+)`", row))
        for row in page.splitlines()
        for name in re.findall(r"`(\w+)`", row.split(" | ")[0])
        if row.startswith("| `")
    }
    assert trace.header.keys() <= named.keys()
    for event in trace.events:
        assert event.keys() - {"kind", "event"} <= named[event["event"]]


def test_the_trace_tells_the_whole_run_in_order_and_pandas_reads_it(finished):
    _, trace, output = finished
    assert names_of(trace) == [*EVENTS, "finalists", "merged"]
    assert [generation.evaluations for generation in trace.generations] == [6, 12, 18, 24]
    table = pd.read_json(output / "trace.jsonl", lines=True)
    generations = table[table["kind"] == "generation"]
    assert generations["evaluations"].tolist() == [6, 12, 18, 24]
    for losses, generation in zip(generations["losses"], trace.generations, strict=True):
        np.testing.assert_allclose(losses, generation.losses)
    assert table["event"].dropna().tolist() == names_of(trace)
    prompts = event(trace, "prompts")
    assert (len(prompts["searched"]), len(prompts["unseen"])) == (9, 12)
    texts = [prompt["text"] for part in ("searched", "unseen") for prompt in prompts[part]]
    assert len(set(texts)) == 21


def test_the_same_seed_gives_the_same_merge_and_trace_and_another_seed_does_not(finished, run):
    again, _, output = run()
    np.testing.assert_array_equal(again.coefficients, finished[0].coefficients)
    lines, expected = timeless(output), timeless(finished[2])
    for header in (lines[0], expected[0]):
        del header["commit"]  # of a checkout that somebody may be working in
    assert lines == expected
    _, other, _ = run("search.seed=1", folder="other")
    assert event(other, "prompts")["sha256"] != event(finished[1], "prompts")["sha256"]
    assert not np.array_equal(other.generations[0].genomes, finished[1].generations[0].genomes)


@pytest.mark.parametrize(
    "overrides", [(), ("search.space=layer", "objective.combine=worst"), ("search.seed=3",)]
)
def test_the_winner_is_never_worse_than_any_reference_on_unseen_prompts(run, overrides):
    result, trace, _ = run(*overrides)
    judged = event(trace, "finalists")
    assert judged["prompts"] == "unseen"
    experts = ["expert expert-0", "expert expert-1", "expert expert-2"]
    general, found = ["base", "uniform", "balanced"], ["archive 1", "archive 2", "archive 3", "mean"]
    assert judged["names"] == [*general, *experts, *found]
    assert result.loss <= min(judged["losses"][:6])
    assert result.loss == judged["losses"][judged["names"].index(result.winner)]


def test_a_search_that_is_long_enough_wins(run):
    overrides = "search.max_evaluations=150", "search.space=layer", "prompts.per_adapter=10"
    result, trace, _ = run(*overrides, "objective.combine=worst")
    assert result.winner.startswith(("archive", "mean"))
    assert result.loss < min(event(trace, "finalists")["losses"][:6])


def test_the_written_adapter_gives_the_logits_of_the_folded_model(run):
    result, _, output = run("objective.weak_signal_nats=100")  # confined, so that all adapters take part
    assert (result.coefficients > 0).all()
    folded = copy.deepcopy(make_toy_model())
    fold_adapters(folded, result.adapters, result.coefficients, result.groups)
    written = PeftModel.from_pretrained(make_toy_model(), output / "adapter")
    torch.testing.assert_close(written(IDS).logits, folded(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (folded(IDS).logits - make_toy_model()(IDS).logits).abs().max() > 0.1
    names = {name for name in written.state_dict() if "lora_" in name}
    assert {name.replace(".default", "") for name in names} == result.merged.state_dict.keys()


def test_a_weak_adapter_stays_near_the_balanced_merge_and_is_named(run, zoo, caplog):
    _, trace, _ = run()
    (balanced,) = event(trace, "search")["start"]
    weak, name = 1, "expert-1"
    skeletons = [["sum {x}\nis:"], [], ["say {x}\nso:"]]  # who writes freely is weak
    folder = zoo.parent / "adapters"
    adapters = [{"source": f"{folder}/expert-{i}", "skeletons": own} for i, own in enumerate(skeletons)]
    wide = "search.space=layer", "search.start=0.3", "search.sigma=1", "objective.weak_signal_nats=0.5"
    result, trace, _ = run(*wide, f"adapters={json.dumps(adapters)}", folder="weak")
    assert name in event(trace, "signals")["weak"]
    message = next(record.message for record in caplog.records if "WEAK SIGNAL" in record.message)
    assert f"{name} (free text)" in message
    assert "skeletons" in message
    assert "weak signal" in result.report
    low, high = (np.array(event(trace, "signals")[end]) for end in ("low", "high"))
    np.testing.assert_allclose([low[weak], high[weak]], [0.9 * balanced[weak], balanced[weak] / 0.9])
    starts = np.array(event(trace, "search")["start"])
    np.testing.assert_array_equal(starts[:, weak], np.clip(0.3, low[weak], high[weak]))
    for table in (starts, result.coefficients):
        assert ((table >= low) & (table <= high)).all()


def test_with_all_adapters_weak_the_result_is_the_balanced_merge_or_near_it(run):
    result, trace, _ = run("objective.weak_signal_nats=100", "search.sigma=1")
    (balanced,) = event(trace, "search")["start"]
    assert np.abs(result.coefficients / balanced - 1).max() <= 0.5 + 1e-12
    assert "weak signal from all adapters: the result is close to the balanced merge" in result.report


def test_a_broken_adapter_is_left_out_and_named_in_report_trace_coefficients_and_card(
    run, zoo, tmp_path, caplog
):
    adapters = spoil(zoo, tmp_path, expert_1=1000)
    result, trace, output = run(adapters)
    ((name, reason),) = trace.header["left_out"].items()
    assert (name, result.coefficients.shape) == ("expert-1", (1, 2))
    assert "times as large as the weights it changes (limit 2)" in reason
    assert f"left out, coefficient 0: expert-1: {reason}" in result.report.splitlines()
    assert f"left out of the merge: expert-1: {reason}" in caplog.text
    document = json.loads((output / "coefficients.json").read_text())
    assert [adapter["name"] for adapter in document["adapters"]] == ["expert-0", "expert-2"]
    assert document["provenance"]["left_out"] == {"expert-1": reason}
    assert f"left\\_out: expert-1 {reason}" in (output / "adapter/README.md").read_text()
    assert {prompt["expert"] for prompt in event(trace, "prompts")["searched"]} == {"expert-0", "expert-2"}
    again, _, _ = run(adapters, resume=True)
    np.testing.assert_array_equal(again.coefficients, result.coefficients)


def test_where_all_adapters_are_broken_nothing_is_written(run, zoo, tmp_path):
    with pytest.raises(InputError, match="no adapter can be merged: expert-0: "):
        run(spoil(zoo, tmp_path, expert_0=1000, expert_1=1000, expert_2=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [{"time_box_s": 0.001}, {"time_box_s": 100, "reserve_s": 100}])
def test_a_time_box_without_room_for_a_search_gives_the_balanced_merge_and_says_so(run, caplog, limit):
    limit_s = limit.pop("time_box_s")
    result, trace, output = run(f"search.time_box_s={limit_s}", "search.max_evaluations=6000", **limit)
    assert (result.ended_by, result.evaluations, len(trace.generations)) == ("clock", 0, 0)
    assert names_of(trace) == ["search_skipped", "merged"]
    assert event(trace, "search_skipped")["phase"] == "prompts"
    assert result.winner == "balanced"
    assert (result.coefficients > 0).all()
    assert f"the time box of {limit_s:g} s is too short for a search" in result.report
    assert "too short for a search" in caplog.text
    document = json.loads((output / "coefficients.json").read_text())
    assert document["coefficients"] == result.coefficients.tolist()
    assert (output / "adapter/adapter_config.json").exists()


def test_a_time_box_that_ends_in_the_search_merges_what_is_known(run, monkeypatch):
    """The first generation takes longer than all that was left: it is dropped."""
    clock = TokenClock(monkeypatch)
    at_scoring(monkeypatch, 1, lambda: setattr(clock, "now_s", 1e6))
    result, trace, _ = run("search.time_box_s=100", "search.max_evaluations=6000")
    assert (result.ended_by, result.evaluations) == ("clock", 0)
    assert names_of(trace) == [*EVENTS, "finalists_skipped", "finalists", "merged"]
    judged = event(trace, "finalists")
    assert (judged["prompts"], judged["names"]) == ("searched", ["base", "uniform", "balanced"])


class TokenClock:
    """Time that passes by the token: 10 ms each, wherever it is read."""

    def __init__(self, monkeypatch):
        self.now_s = 0.0
        monkeypatch.setattr("search.run.TimeBox", partial(TimeBox, clock=self))
        for module in ("run", "steering", "ending", "delivery"):
            monkeypatch.setattr(f"search.{module}.time", SimpleNamespace(monotonic=self))
        prompt_sums = PopulationEvaluator._prompt_sums

        def slow_sums(evaluator, objective, coefficients, prompts):
            n_tokens = sum(len(evaluator._prompts.ids[prompt]) for prompt in prompts)
            self.now_s += 0.01 * len(coefficients) * n_tokens
            return prompt_sums(evaluator, objective, coefficients, prompts)

        monkeypatch.setattr(PopulationEvaluator, "_prompt_sums", slow_sums)

    def __call__(self):
        return self.now_s


@pytest.mark.parametrize("limit_s", [55, 70, 90])
@pytest.mark.parametrize("reserve_s", [0, 11])
def test_a_run_ends_within_its_time_box_finalists_included(run, monkeypatch, limit_s, reserve_s):
    clock = TokenClock(monkeypatch)
    options = ["search.max_evaluations=1000000", "search.n_candidates=4"]
    result, trace, _ = run(f"search.time_box_s={limit_s}", *options, reserve_s=reserve_s)
    assert result.ended_by == "clock"
    generation_s = trace.generations[0].seconds
    assert limit_s - reserve_s - 3 * generation_s - 12 < clock.now_s <= limit_s - reserve_s
    assert event(trace, "finalists")["prompts"] == "unseen"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_search_ends_it_after_the_generation_and_merges_the_best(
    run, monkeypatch, number, capfd
):
    at_scoring(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    result, trace, output = run()
    assert (result.ended_by, result.evaluations, len(trace.generations)) == ("interrupt", 12, 2)
    assert names_of(trace) == [*EVENTS, "interrupt", "finalists", "merged"]
    assert event(trace, "interrupt")["phase"] == "search"
    ends = [event(trace, name)["ended_by"] for name in ("stage_ended", "search_ended", "merged")]
    assert ends == ["interrupt"] * 3
    best = min(trace.generations, key=lambda generation: generation.losses.min())
    genome = best.genomes[best.losses.argmin()]
    np.testing.assert_array_equal(result.coefficients, [genome])
    assert result.winner == "archive 1"
    assert (event(trace, "finalists")["prompts"], result.loss) == ("searched", best.losses.min())
    document = json.loads((output / "coefficients.json").read_text())
    assert document["provenance"]["ended_by"] == "interrupt"
    np.testing.assert_array_equal(document["coefficients"], result.coefficients)
    assert (output / "adapter/adapter_model.safetensors").exists()
    assert "ended by an interrupt" in result.report
    assert "interrupted: the best so far is merged now" in capfd.readouterr().err
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


def test_a_generation_that_takes_longer_than_the_grace_is_dropped(run, monkeypatch, impatient):
    at_scoring(monkeypatch, 3, ctrl_c)
    result, trace, _ = run()
    assert (result.ended_by, result.evaluations, len(trace.generations)) == ("interrupt", 12, 2)
    assert result.winner == "archive 1"


def test_a_second_interrupt_ends_at_once(run, monkeypatch, tmp_path):
    def twice():
        ctrl_c()
        ctrl_c()

    at_scoring(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        run()
    trace = Trace.load(tmp_path / "out/trace.jsonl")
    assert (len(trace.generations), names_of(trace)) == (1, EVENTS[:5])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trace.jsonl"]


def test_an_interrupt_before_anything_is_scored_merges_the_best_reference(run, monkeypatch, impatient):
    at_scoring(monkeypatch, 1, ctrl_c)
    result, trace, _ = run()
    references = event(trace, "references")
    best = references["names"][np.argmin(references["losses"])]
    assert (result.ended_by, result.winner, result.evaluations) == ("interrupt", best, 0)
    assert best == "balanced"
    np.testing.assert_array_equal(result.coefficients, event(trace, "search")["start"])


def test_an_interrupt_among_the_finalists_falls_back_on_the_searched_prompts(run, monkeypatch, impatient):
    agreement = PopulationEvaluator.agreement

    def interrupted(self, coefficients):
        ctrl_c()
        return agreement(self, coefficients)

    monkeypatch.setattr(PopulationEvaluator, "agreement", interrupted)
    result, trace, output = run()
    assert (result.ended_by, result.evaluations) == ("interrupt", 24)
    assert names_of(trace) == [*EVENTS, "interrupt", "finalists", "merged"]
    assert event(trace, "interrupt")["phase"] == "finalists"
    assert event(trace, "search_ended")["ended_by"] == "evaluations"
    assert event(trace, "merged")["ended_by"] == "interrupt"
    assert event(trace, "finalists")["prompts"] == "searched"
    assert (output / "coefficients.json").exists()


@pytest.mark.parametrize("step", ["write_prompts", "expert_signals"])
def test_an_interrupt_before_the_search_leaves_the_trace_alone(run, monkeypatch, tmp_path, step):
    monkeypatch.setattr(f"search.steering.{step}", lambda *arguments, **options: ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trace.jsonl"]
    assert Trace.load(tmp_path / "out/trace.jsonl").header["seed"] == 0


def test_candidates_without_a_finite_loss_never_win(run, monkeypatch):
    score_blocks = GenomeEvaluator.score_blocks

    def spoil_the_first(self, genomes, blocks):
        scores = score_blocks(self, genomes, blocks)
        scores.sums[0] = np.nan
        return scores

    monkeypatch.setattr(GenomeEvaluator, "score_blocks", spoil_the_first)
    result, trace, _ = run("search.race_keep=0.5", ENDS_WELL)
    for generation in trace.generations:
        first = generation.rungs[0]
        assert first["losses"][0] is None
        assert 0 not in generation.rungs[1]["candidates"]
        assert np.isnan(generation.losses[0])
        assert np.isnan(generation.per_expert[0]).all()
    assert np.isfinite(result.loss)
    spoiled = [generation.genomes[0] for generation in trace.generations]
    assert not any(np.array_equal(result.coefficients.ravel(), genome) for genome in spoiled)


def test_without_any_finite_loss_the_run_is_refused_in_one_line_and_the_trace_says_so(
    run, monkeypatch, tmp_path
):
    def spoil_all(self, sums, counts):
        return np.full(len(sums), np.nan), sums * np.nan

    monkeypatch.setattr(GenomeEvaluator, "combine", spoil_all)
    with pytest.raises(InputError, match="none of 6 candidates has a finite loss") as caught:
        run()
    assert "\n" not in str(caught.value)
    (generation,) = Trace.load(tmp_path / "out/trace.jsonl").generations
    assert np.isnan(generation.losses).all()


def test_the_report_says_what_won_and_on_how_many_prompts_it_agrees(finished):
    result, trace, _ = finished
    judged = event(trace, "finalists")
    lines = result.report.splitlines()
    base, uniform, balanced = judged["losses"][:3]
    assert lines[0].startswith(
        f"winner: {result.winner}, loss {result.loss:.4f} on prompts that the search has not seen "
        f"(base {base:.4f}, uniform {uniform:.4f}, balanced {balanced:.4f}, expert "
    )
    assert lines[1] == "search: 24 evaluations in 4 generations, ended by the limit on evaluations"
    shares = judged["agreement"][judged["names"].index(result.winner)]
    for index, share in enumerate(shares):
        row = next(line for line in lines if line.startswith(f"expert-{index} "))
        assert row.endswith(f"{round(4 * share)} of 4")
    assert "differ by at most one minus that share" in result.report


def run_out_of_memory(monkeypatch, call):
    """Have memory run out once, in a forward pass of several rows of the search's n-th generation."""
    armed = []
    at_scoring(monkeypatch, call, lambda: armed.append(True))
    scored_logits = search.passes.scored_logits

    def short_of_memory(model, prompts, rows, *weights):
        if armed and len(rows) > 1:
            armed.clear()
            raise torch.OutOfMemoryError("no")
        return scored_logits(model, prompts, rows, *weights)

    monkeypatch.setattr("search.passes.scored_logits", short_of_memory)


def test_memory_that_runs_out_in_the_search_is_recorded_and_changes_no_loss(finished, run, monkeypatch):
    run_out_of_memory(monkeypatch, 2)
    result, trace, output = run()
    (found,) = [e for e in trace.events if e["event"] == "out_of_memory"]
    assert found["phase"] == "search"
    assert found["tokens_per_forward"] == found["tokens"] // 2
    kinds = [line.get("event") or line["kind"] for line in timeless(output)]
    assert kinds[6:10] == ["generation", "generation", "out_of_memory", "generation"]
    for generation, whole in zip(trace.generations, finished[1].generations, strict=True):
        np.testing.assert_allclose(generation.losses, whole.losses, rtol=1e-5)
    budget = found["tokens_per_forward"]
    assert f"memory ran out 1 times; at last {budget} tokens to a forward pass" in result.report


def test_memory_that_runs_out_among_the_signals_is_recorded_there(run, monkeypatch):
    scored_logits, calls = search.experts.scored_logits, []

    def short_of_memory(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no")
        return scored_logits(*arguments)

    monkeypatch.setattr("search.experts.scored_logits", short_of_memory)
    _, trace, _ = run()
    assert names_of(trace)[:5] == ["prompts", "signals", "references", "out_of_memory", "search"]
    assert event(trace, "out_of_memory")["phase"] == "signals"


def test_a_disk_that_fills_up_in_the_search_is_one_line_and_the_trace_can_be_resumed(
    finished, run, monkeypatch, tmp_path
):
    path = tmp_path / "out/trace.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_scoring(
        monkeypatch,
        3,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 300, hard)),
    )
    try:
        with pytest.raises(InputError) as caught:
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = f"cannot write {path}: File too large. Free space or choose another folder."
    assert str(caught.value) == message
    assert path.read_bytes().endswith(b"}\n")
    assert len(Trace.load(path).generations) == 2
    monkeypatch.undo()
    result, trace, _ = run(resume=True)
    np.testing.assert_array_equal(result.coefficients, finished[0].coefficients)
    for generation, whole in zip(trace.generations, finished[1].generations, strict=True):
        np.testing.assert_array_equal(generation.losses, whole.losses)


@pytest.mark.parametrize("in_the_place_of", ["out", "out/trace.jsonl"])
def test_an_output_that_cannot_be_written_is_one_line(run, tmp_path, in_the_place_of):
    taken = tmp_path / in_the_place_of
    taken.parent.mkdir(exist_ok=True)
    if in_the_place_of == "out":
        taken.write_text("mine")
    else:
        taken.mkdir()
    with pytest.raises(InputError, match=rf"cannot write (to )?.*/{in_the_place_of}") as caught:
        run()
    assert "\n" not in str(caught.value)
    assert "choose another" in str(caught.value).lower()


def test_an_objective_of_ones_own_is_searched_by_and_recorded(finished, run, tmp_path, monkeypatch):
    def mine(merged_logp, expert_logp, next_tokens):
        return entropy_excess(merged_logp, expert_logp)

    result, trace, output = run(objective=mine)
    assert trace.header["objective"] == f"{__name__}:{mine.__qualname__}"
    document = json.loads((output / "coefficients.json").read_text())
    assert document["objective"]["name"] == trace.header["objective"]
    np.testing.assert_array_equal(result.coefficients, finished[0].coefficients)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = (
        "from search.objective import entropy_excess\ndef mine(m, e, t):\n    return entropy_excess(m, e)\n"
    )
    (tmp_path / "of_run.py").write_text(source)
    result, trace, _ = run("objective.name=of_run:mine")
    assert (trace.header["objective"], trace.header["config"]["objective"]["name"]) == ("of_run:mine",) * 2
    assert result.loss == finished[0].loss
    for generation, whole in zip(trace.generations, finished[1].generations, strict=True):
        np.testing.assert_array_equal(generation.losses, whole.losses)


def test_an_objective_that_averages_is_refused_before_the_search(run):
    with pytest.raises(InputError, match=r"returned .*, expected a floating-point tensor") as caught:
        run(objective=lambda merged, expert, tokens: (merged - expert).abs().mean())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["refine_steps", "inject_every"])
def test_gradient_steps_on_an_objective_without_gradient_are_refused_before_the_search(
    run, tmp_path, setting
):
    with pytest.raises(InputError, match="top1_disagreement has no gradient"):
        run("objective.name=top1_disagreement", f"search.gradient.{setting}=2")
    assert Trace.load(tmp_path / "out/trace.jsonl").generations == []


def test_gradient_steps_from_the_best_give_one_more_finalist(run):
    result, trace, _ = run("search.gradient.refine_steps=3", ENDS_WELL)
    refined = event(trace, "refined")
    assert (refined["steps"], len(refined["losses"])) == (3, 4)
    assert event(trace, "finalists")["names"][-1] == "refined"
    assert np.isfinite(result.loss)


def test_bad_settings_are_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(InputError, match="unknown optimizer 'CAM'"):
        run("search.optimizer=CAM")
    assert not (tmp_path / "out").exists()


def test_an_adapter_folder_that_holds_something_else_is_refused_before_the_search(run, tmp_path):
    (tmp_path / "out/adapter").mkdir(parents=True)
    (tmp_path / "out/adapter/notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds 'notes.txt', which replacing it would delete"):
        run()
    assert not (tmp_path / "out/trace.jsonl").exists()


def test_a_base_that_is_loaded_already_is_used(run, zoo, monkeypatch):
    base = load_base(str(zoo.parent / "base"), device="cpu")
    monkeypatch.setattr("search.setup.load_base", None)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    run(base=base)
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
