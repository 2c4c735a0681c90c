"""Whole runs on a toy zoo: what they write, that they repeat, how they end, and who wins."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel

import search
from search import Trace, run_search
from search.config import load_config
from search.errors import InputError
from search.evaluate import PopulationEvaluator
from search.loop import Scores
from search.merge import fold_adapters
from search.timebox import TimeBox
from tests.test_base import make_toy_model
from tests.test_merges import IDS, save_toy_zoo

QUICK = (
    "device=cpu",
    *("prompts.per_adapter=3", "prompts.unseen_per_adapter=4", "prompts.max_new_tokens=10"),
    *("search.max_evaluations=24", "search.n_candidates=6", "search.n_finalists=3"),
)
TIMES = {"elapsed_s", "seconds", "peak_bytes", "left_s", "needed_s"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def run(zoo, tmp_path):
    """Run with overrides; the result, the trace and the folder."""

    def start(*overrides, folder="out", **options):
        output = tmp_path / folder
        result = run_search(load_config(zoo, [*QUICK, *overrides]), output=output, **options)
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


def interrupt_at(monkeypatch, call):
    """Raise KeyboardInterrupt in the search's n-th generation."""
    calls = []
    evaluate = PopulationEvaluator.evaluate

    def interrupted(self, genomes):
        calls.append(genomes)
        if len(calls) == call:
            raise KeyboardInterrupt
        return evaluate(self, genomes)

    monkeypatch.setattr(PopulationEvaluator, "evaluate", interrupted)


def test_the_public_names_are_there():
    assert set(search.__all__) == {"RunResult", "SearchConfig", "Trace", "merge", "run_search"}
    assert all(hasattr(search, name) for name in search.__all__)


def test_a_run_writes_trace_adapter_and_coefficients_and_nothing_else(finished):
    result, trace, output = finished
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files == {"trace.jsonl", "coefficients.json", *adapter}
    document = json.loads((output / "coefficients.json").read_text())
    np.testing.assert_array_equal(document["coefficients"], result.coefficients)
    assert document["method"] == "concord"
    assert document["base"] == trace.header["base"]
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
    assert header["groups"] == ["layer.0", "layer.1"]
    assert (header["device"], header["dtype"]) == ("cpu", "float32")
    assert header["versions"]["torch"] == torch.__version__


def test_the_trace_tells_the_whole_run_in_order_and_pandas_reads_it(finished):
    _, trace, output = finished
    names = ["prompts", "signals", "references", "search", "search_ended", "finalists", "merged"]
    assert [found["event"] for found in trace.events] == names
    assert [generation.evaluations for generation in trace.generations] == [6, 12, 18, 24]
    table = pd.read_json(output / "trace.jsonl", lines=True)
    assert (table["kind"] == "generation").sum() == 4
    prompts = event(trace, "prompts")
    assert (len(prompts["searched"]), len(prompts["unseen"])) == (9, 12)
    texts = [prompt["text"] for part in ("searched", "unseen") for prompt in prompts[part]]
    assert len(set(texts)) == 21


def test_the_same_seed_gives_the_same_merge_and_trace_and_another_seed_does_not(finished, run):
    def timeless(output):
        lines = map(json.loads, (output / "trace.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]

    again, _, output = run()
    np.testing.assert_array_equal(again.coefficients, finished[0].coefficients)
    assert timeless(output) == timeless(finished[2])
    _, other, _ = run("search.seed=1", folder="other")
    assert event(other, "prompts")["sha256"] != event(finished[1], "prompts")["sha256"]
    assert not np.array_equal(other.generations[0].genomes, finished[1].generations[0].genomes)


@pytest.mark.parametrize(
    "overrides", [(), ("search.space=model", "objective.combine=worst"), ("search.seed=3",)]
)
def test_the_winner_is_never_worse_than_any_reference_on_unseen_prompts(run, overrides):
    result, trace, _ = run(*overrides)
    judged = event(trace, "finalists")
    assert judged["prompts"] == "unseen"
    experts = ["expert expert-0", "expert expert-1", "expert expert-2"]
    assert judged["names"] == ["base", "uniform", *experts, "archive 1", "archive 2", "archive 3", "mean"]
    assert result.loss <= min(judged["losses"][:5])
    assert result.loss == judged["losses"][judged["names"].index(result.winner)]


def test_a_search_that_is_long_enough_wins(run):
    result, trace, _ = run("search.max_evaluations=300", "objective.combine=worst")
    assert result.winner.startswith(("archive", "mean"))
    assert result.loss < min(event(trace, "finalists")["losses"][:5])


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


def test_a_weak_adapter_stays_near_the_uniform_merge_and_is_named(run, caplog):
    # base and expert-0 differ by 1.5 nats or so on its prompts, the others by more
    _, trace, _ = run()
    peak_kl = event(trace, "signals")["peak_kl_nats"]
    limit = sorted(peak_kl)[0] + 1e-6
    result, trace, _ = run(f"objective.weak_signal_nats={limit}", "search.sigma=1", folder="weak")
    weak = int(np.argmin(peak_kl))
    name = f"expert-{weak}"
    assert event(trace, "signals")["weak"] == [name]
    message = next(record.message for record in caplog.records if "WEAK SIGNAL" in record.message)
    assert f"{name} ({peak_kl[weak]:.3f})" in message
    assert "skeletons" in message
    assert f"weak signal, kept near the uniform merge: {name}." in result.report
    assert (result.coefficients[:, weak] >= 0.5 / 3).all()
    assert (result.coefficients[:, weak] <= 1.5 / 3).all()
    starts = np.array(event(trace, "search")["start"])
    assert (starts[:, weak] == 1 / 3).all()
    assert (np.delete(starts, weak, 1) == 0.3).all()
    others = np.delete(trace.generations[0].genomes.reshape(6, 2, 3), weak, -1)
    assert others.max() > 0.5


def test_with_all_adapters_weak_the_result_is_the_uniform_merge_or_near_it(run):
    result, _, _ = run("objective.weak_signal_nats=100", "search.sigma=1")
    assert np.abs(result.coefficients - 1 / 3).max() <= 0.5 / 3 + 1e-12
    assert "the result is essentially the uniform merge" in result.report


def test_a_tiny_time_box_still_gives_one_generation_and_says_so(run):
    result, trace, output = run("search.time_box_s=0.001", "search.max_evaluations=6000")
    assert (result.ended_by, result.evaluations, len(trace.generations)) == ("clock", 6, 1)
    assert event(trace, "finalists_skipped")["needed_s"] > 0
    judged = event(trace, "finalists")
    assert (judged["prompts"], judged["names"]) == ("searched", ["base", "uniform", "archive 1"])
    assert result.loss == min(judged["losses"])
    assert judged["losses"][2] == pytest.approx(trace.generations[0].losses.min())
    assert "ended by the clock" in result.report
    assert (output / "adapter/adapter_config.json").exists()


def test_the_callers_seconds_are_not_searched_in(run):
    result, _, _ = run("search.time_box_s=100", "search.max_evaluations=6000", reserve_s=100)
    assert (result.ended_by, result.evaluations) == ("clock", 6)


class TokenClock:
    """Time that passes by the token: 10 ms each, wherever it is read."""

    def __init__(self, monkeypatch):
        self.now_s = 0.0
        monkeypatch.setattr("search.run.TimeBox", partial(TimeBox, clock=self))
        for module in ("steering", "delivery"):
            monkeypatch.setattr(f"search.{module}.time", SimpleNamespace(monotonic=self))
        fill = PopulationEvaluator._position_values

        def slow_fill(evaluator, objective, coefficients):
            self.now_s += 0.01 * len(coefficients) * evaluator._prompts.n_tokens
            return fill(evaluator, objective, coefficients)

        monkeypatch.setattr(PopulationEvaluator, "_position_values", slow_fill)

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


def test_an_interrupt_in_the_search_merges_the_best_so_far(run, monkeypatch):
    interrupt_at(monkeypatch, 3)
    result, trace, output = run()
    assert (result.ended_by, result.evaluations, len(trace.generations)) == ("interrupt", 12, 2)
    assert event(trace, "interrupt")["phase"] == "search"
    assert event(trace, "search_ended")["ended_by"] == "interrupt"
    best = min(trace.generations, key=lambda generation: generation.losses.min())
    genome = best.genomes[best.losses.argmin()]
    np.testing.assert_array_equal(result.coefficients, genome.reshape(2, 3))
    assert result.winner == "archive 1"
    document = json.loads((output / "coefficients.json").read_text())
    assert document["provenance"]["ended_by"] == "interrupt"
    np.testing.assert_array_equal(document["coefficients"], result.coefficients)
    assert "ended by an interrupt" in result.report


def test_an_interrupt_before_anything_is_scored_merges_uniformly(run, monkeypatch):
    interrupt_at(monkeypatch, 1)
    result, _, _ = run()
    assert (result.ended_by, result.winner, result.evaluations) == ("interrupt", "uniform", 0)
    np.testing.assert_array_equal(result.coefficients, np.full((2, 3), 1 / 3))


def test_an_interrupt_among_the_finalists_falls_back_on_the_searched_prompts(run, monkeypatch):
    score = PopulationEvaluator.score

    def interrupted(self, coefficients):
        if len(coefficients) > 6:  # more than a generation
            raise KeyboardInterrupt
        return score(self, coefficients)

    monkeypatch.setattr(PopulationEvaluator, "score", interrupted)
    result, trace, output = run()
    assert (result.ended_by, result.evaluations) == ("interrupt", 24)
    assert event(trace, "interrupt")["phase"] == "finalists"
    assert event(trace, "search_ended")["ended_by"] == "evaluations"
    assert event(trace, "finalists")["prompts"] == "searched"
    assert (output / "coefficients.json").exists()


@pytest.mark.parametrize("step", ["write_prompts", "expert_signals"])
def test_an_interrupt_before_the_search_leaves_the_trace_alone(run, monkeypatch, tmp_path, step):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"search.steering.{step}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trace.jsonl"]
    assert Trace.load(tmp_path / "out/trace.jsonl").header["seed"] == 0


def test_candidates_without_a_finite_loss_never_win(run, monkeypatch):
    evaluate = PopulationEvaluator.evaluate

    def spoil_the_best(self, genomes):
        scores = evaluate(self, genomes)
        losses = scores.losses.copy()
        losses[losses.argmin()] = np.nan
        return Scores(losses, scores.per_expert, scores.n_tokens, None)

    monkeypatch.setattr(PopulationEvaluator, "evaluate", spoil_the_best)
    interrupted, trace, _ = run("search.time_box_s=0.001")
    spoiled = trace.generations[0]
    assert np.isnan(spoiled.losses).sum() == 1
    coefficients = interrupted.coefficients.reshape(-1)
    assert not np.array_equal(coefficients, spoiled.genomes[np.isnan(spoiled.losses).argmax()])
    assert np.isfinite(interrupted.loss)


def test_the_report_says_what_won_and_on_how_many_prompts_it_agrees(finished):
    result, trace, _ = finished
    judged = event(trace, "finalists")
    lines = result.report.splitlines()
    base, uniform = judged["losses"][:2]
    assert lines[0].startswith(
        f"winner: {result.winner}, loss {result.loss:.4f} on prompts that the search has not seen "
        f"(base {base:.4f}, uniform {uniform:.4f}, expert "
    )
    assert lines[1] == "search: 24 evaluations in 4 generations, ended by the limit on evaluations"
    shares = judged["agreement"][judged["names"].index(result.winner)]
    for index, share in enumerate(shares):
        row = next(line for line in lines if line.startswith(f"expert-{index} "))
        assert row.endswith(f"{round(4 * share)} of 4")
    assert "differ by at most one minus that share" in result.report


def test_memory_that_runs_out_is_recorded_and_told(run, monkeypatch):
    evaluate = PopulationEvaluator.evaluate

    def run_short(self, genomes):
        if not self.oom_events:
            self.oom_events.append({"tokens": 99, "tokens_per_forward": 49})
        return evaluate(self, genomes)

    monkeypatch.setattr(PopulationEvaluator, "evaluate", run_short)
    result, trace, _ = run()
    found = [e for e in trace.events if e["event"] == "out_of_memory"]
    assert [(e["prompts"], e["tokens"], e["tokens_per_forward"]) for e in found] == [("searched", 99, 49)]
    assert "memory ran out 1 times; at last 49 tokens to a forward pass" in result.report


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
    base = search.run.load_base(str(zoo.parent / "base"), device="cpu")
    monkeypatch.setattr("search.run.load_base", None)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    run(base=base)
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
