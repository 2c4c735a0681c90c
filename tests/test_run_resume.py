"""Whole runs that stop anywhere and go on: they end as the run that was never stopped."""

import json

import numpy as np
import pytest

import search.setup
from search.base import load_base
from search.config import load_config, rebuild_config
from search.errors import InputError
from search.evaluate import PopulationEvaluator
from search.run import run_search
from search.stages import GenomeEvaluator
from search.trace import Trace
from tests.test_merges import save_toy_zoo
from tests.test_run import TIMES, at_scoring, ctrl_c
from tests.test_setup import hash_of, write_prior

OPTIONS = (
    "device=cpu",
    *("prompts.per_adapter=3", "prompts.unseen_per_adapter=2", "prompts.max_new_tokens=8"),
    *("search.max_evaluations=30", "search.n_candidates=6", "search.n_finalists=3", "search.race_keep=0.5"),
    "search.stages=[{share: 3, groups: model}, {share: 2, groups: layer, genome: profile}]",
    "search.space.n_knots=2",
    "search.gradient={inject_every: 2, refine_steps: 2}",
    "objective.weak_signal_nats=100",  # nobody wins alone, something that was found does
)
N_GENERATIONS = 5
AGAIN = {"resumed", "out_of_memory"}
"""Events that may come more than once."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def base(zoo):
    return load_base(str(zoo.parent / "base"), device="cpu")


@pytest.fixture(autouse=True)
def _clean_checkout(monkeypatch):
    """The commit is the same for all runs, whatever happens to the files beside."""
    for module in ("outcome", "setup"):
        monkeypatch.setattr(f"search.{module}.checkout_commit", lambda: "1" * 40)


@pytest.fixture(scope="module")
def config(zoo):
    """Two stages, races, gradient steps and a prior, all at once."""
    prior = write_prior(zoo.parent / "prior.json", [("expert-1", hash_of(zoo, "expert-1"))], 0.6)
    return load_config(zoo, [*OPTIONS, f"search.prior={prior}"])


@pytest.fixture(scope="module")
def whole(config, base, tmp_path_factory):
    """The folder of a run that was never stopped."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("outcome", "setup"):
            patch.setattr(f"search.{module}.checkout_commit", lambda: "1" * 40)
        run_search(config, output=output, base=base)
    return output


@pytest.fixture
def go_on(config, base, tmp_path):
    """Go on with the run in `tmp_path`, or start it."""
    return lambda: run_search(config, output=tmp_path, base=base, resume=True)


@pytest.fixture
def scored(monkeypatch):
    """Each time that the search scores candidates, in whatever rung."""
    calls = []
    score_blocks = GenomeEvaluator.score_blocks

    def counted(self, genomes, blocks):
        calls.append(len(genomes))
        return score_blocks(self, genomes, blocks)

    monkeypatch.setattr(GenomeEvaluator, "score_blocks", counted)
    return calls


def lines_of(folder):
    return (folder / "trace.jsonl").read_bytes().splitlines(keepends=True)


def timeless(folder, *, leave_out=AGAIN):
    """The trace's lines without times, and without what a run that went on has beside."""
    lines = [json.loads(line) for line in lines_of(folder)]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in lines
        if line.get("event") not in leave_out
    ]


def results_of(folder):
    """Every written file but the trace."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "trace.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def places(folder, kind):
    """Line numbers, from 0, of the generations, or of one event."""
    found = [json.loads(line) for line in lines_of(folder)]
    return [number for number, line in enumerate(found) if kind in (line["kind"], line.get("event"))]


def cut(whole, folder, n_lines, rest=b""):
    """Put the first lines of the whole trace into a folder, and some bytes more."""
    (folder / "trace.jsonl").write_bytes(b"".join(lines_of(whole)[:n_lines]) + rest)


def events_of(folder):
    return [event["event"] for event in Trace.load(folder / "trace.jsonl").events]


def count_rungs(generations):
    return sum(len(generation.rungs) for generation in generations)


def test_the_whole_run_uses_everything(whole):
    trace = Trace.load(whole / "trace.jsonl")
    assert [generation.stage for generation in trace.generations] == [0, 0, 0, 1, 1]
    assert [len(generation.injected) for generation in trace.generations] == [0, 1, 0, 1, 1]
    assert all(len(generation.rungs) == 3 for generation in trace.generations)
    assert trace.header["prior"]["source"].endswith("prior.json")
    assert trace.last("references")["names"] == ["base", "uniform", "balanced", "prior"]
    assert {"refined", "finalists", "merged"} < set(events_of(whole))
    assert trace.last("finalists")["winner"].startswith(("archive", "mean", "refined"))


@pytest.mark.parametrize("n_generations", range(N_GENERATIONS + 1))
def test_a_run_killed_after_any_generation_ends_as_if_it_had_not_been(
    whole, go_on, scored, tmp_path, n_generations
):
    at = places(whole, "generation")
    cut(whole, tmp_path, at[n_generations - 1] + 1 if n_generations else at[0])
    go_on()
    assert timeless(tmp_path) == timeless(whole)
    assert results_of(tmp_path) == results_of(whole)
    assert events_of(tmp_path).count("resumed") == 1
    assert Trace.load(tmp_path / "trace.jsonl").last("resumed")["generations"] == n_generations
    recorded = Trace.load(whole / "trace.jsonl").generations
    assert len(scored) == count_rungs(recorded[n_generations:])


@pytest.mark.parametrize(
    "after", ["header", "prompts", "signals", "stage_ended", "search_ended", "refined", "finalists"]
)
def test_a_run_killed_after_any_phase_ends_as_if_it_had_not_been(whole, go_on, tmp_path, after):
    cut(whole, tmp_path, places(whole, after)[0] + 1)
    go_on()
    assert timeless(tmp_path) == timeless(whole)
    assert results_of(tmp_path) == results_of(whole)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_in_the_middle_of_any_line_ends_as_if_it_had_not_been(whole, go_on, tmp_path, seed):
    content = (whole / "trace.jsonl").read_bytes()
    rng = np.random.default_rng(seed)
    lines = lines_of(whole)
    number = int(rng.integers(len(lines)))
    n_bytes = sum(map(len, lines[:number])) + int(rng.integers(1, len(lines[number])))
    (tmp_path / "trace.jsonl").write_bytes(content[:n_bytes])
    go_on()
    assert timeless(tmp_path) == timeless(whole)
    assert results_of(tmp_path) == results_of(whole)


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(whole, go_on, monkeypatch, tmp_path):
    class KilledError(Exception):
        pass

    def kill_at(call):
        calls = []
        score_blocks = GenomeEvaluator.score_blocks

        def killed(self, genomes, blocks):
            calls.append(genomes)
            if len(calls) == call:
                raise KilledError
            return score_blocks(self, genomes, blocks)

        monkeypatch.setattr(GenomeEvaluator, "score_blocks", killed)

    for call in (5, 2, 8):
        with monkeypatch.context():
            before = GenomeEvaluator.score_blocks
            kill_at(call)
            with pytest.raises(KilledError):
                go_on()
            monkeypatch.setattr(GenomeEvaluator, "score_blocks", before)
    go_on()
    assert events_of(tmp_path).count("resumed") == 3
    assert timeless(tmp_path) == timeless(whole)
    assert results_of(tmp_path) == results_of(whole)


def test_no_event_is_written_twice(whole, go_on, tmp_path):
    cut(whole, tmp_path, places(whole, "generation")[3] + 1)
    go_on()
    written = [(event["event"], event.get("index")) for event in Trace.load(tmp_path / "trace.jsonl").events]
    assert len(set(written)) == len(written)
    assert written.count(("resumed", None)) == 1


def test_a_finished_run_that_is_resumed_gains_a_line_and_changes_nothing_else(whole, go_on, scored, tmp_path):
    cut(whole, tmp_path, None)
    result = go_on()
    before, after = lines_of(whole), lines_of(tmp_path)
    assert after[:-1] == before
    last = json.loads(after[-1])
    trace = Trace.load(whole / "trace.jsonl")
    assert last == {
        "kind": "event",
        "event": "resumed",
        "generations": N_GENERATIONS,
        "elapsed_s": trace.last("merged")["elapsed_s"],
    }
    assert results_of(tmp_path) == results_of(whole)
    assert scored == []
    assert result.winner == trace.last("finalists")["winner"]


def test_a_finished_run_whose_time_is_spent_keeps_its_winner(whole, base, config, tmp_path):
    """It was compared on unseen prompts once; that there is no time left to do so again changes nothing."""
    spent = b"".join(lines_of(whole)).replace(b'"elapsed_s": ', b'"elapsed_s": 5000')
    (tmp_path / "trace.jsonl").write_bytes(spent)
    run_search(config, output=tmp_path, base=base, resume=True)
    assert "finalists_skipped" not in events_of(tmp_path)
    assert results_of(tmp_path) == results_of(whole)


def test_a_run_whose_time_is_spent_ends_by_the_clock_with_what_it_has(whole, go_on, tmp_path):
    n_lines = places(whole, "generation")[1] + 1
    spent = b"".join(lines_of(whole)[:n_lines]).replace(b'"elapsed_s": ', b'"elapsed_s": 5000')
    (tmp_path / "trace.jsonl").write_bytes(spent)
    result = go_on()
    trace = Trace.load(tmp_path / "trace.jsonl")
    assert result.ended_by == "clock"
    assert "finalists_skipped" in events_of(tmp_path)
    assert len(trace.generations) == 2
    assert trace.last("merged")["elapsed_s"] > 5000


def test_which_adapters_are_weak_is_not_decided_anew(whole, go_on, tmp_path):
    """Another machine's last bit may put a signal on the other side of the limit."""
    lines = lines_of(whole)[: places(whole, "signals")[0] + 1]
    signals = json.loads(lines[-1])
    assert signals["weak"] == ["expert-0", "expert-1", "expert-2"]
    low, high = ([None, None, bounds[2]] for bounds in (signals["low"], signals["high"]))
    changed = {"weak": ["expert-2"], "reasons": ["free text"], "low": low, "high": high}
    lines[-1] = json.dumps({**signals, **changed}).encode() + b"\n"
    (tmp_path / "trace.jsonl").write_bytes(b"".join(lines))
    go_on()
    start = Trace.load(tmp_path / "trace.jsonl").last("search")["start"]
    balanced = Trace.load(whole / "trace.jsonl").last("search")["start"][0]  # all were weak there
    np.testing.assert_array_equal(start, [[balanced[0], 0.6, balanced[2]]] * 2)


@pytest.mark.parametrize("n_generations", [0, 4])
def test_a_balanced_merge_of_another_last_bit_repeats_the_recorded_genomes(
    whole, go_on, monkeypatch, tmp_path, n_generations
):
    """Other threads, or another processor, may add up its norms in another order."""
    after = places(whole, "generation")[n_generations - 1] if n_generations else places(whole, "search")[0]
    cut(whole, tmp_path, after + 1)
    here = search.setup.balanced_coefficients
    monkeypatch.setattr(search.setup, "balanced_coefficients", lambda found: np.nextafter(here(found), 2))
    go_on()
    found, expected = (Trace.load(folder / "trace.jsonl").generations for folder in (tmp_path, whole))
    for generation, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(generation.genomes, other.genomes)


def test_a_run_begun_before_the_balanced_merge_is_gone_on_with_as_it_was_begun(zoo, base, tmp_path):
    overrides = "search.start=0.3", "search.sigma=0.15", "search.max_relative_norm=null", "search.space=layer"
    run_search(load_config(zoo, [*OPTIONS, *overrides]), output=tmp_path / "whole", base=base)
    header, *lines = (json.loads(line) for line in lines_of(tmp_path / "whole"))
    del header["left_out"], header["config"]["search"]["max_relative_norm"]
    for line in lines:
        if line.get("event") == "references":
            for key in ("names", "losses", "per_expert"):
                del line[key][2]
    at = places(tmp_path / "whole", "generation")[1]
    old = tmp_path / "trace.jsonl"
    old.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines[:at]]))
    run_search(rebuild_config(header["config"], str(old)), output=tmp_path, base=base, resume=True)
    found, expected = (Trace.load(folder / "trace.jsonl") for folder in (tmp_path, tmp_path / "whole"))
    for generation, other in zip(found.generations, expected.generations, strict=True):
        np.testing.assert_array_equal(generation.genomes, other.genomes)
    assert found.last("finalists")["winner"] == expected.last("finalists")["winner"]


def test_without_resume_the_run_starts_over(whole, config, base, tmp_path):
    cut(whole, tmp_path, places(whole, "generation")[0] + 1)
    run_search(config, output=tmp_path, base=base)
    assert "resumed" not in events_of(tmp_path)
    assert timeless(tmp_path) == timeless(whole)


def test_where_there_is_nothing_to_resume_the_run_starts(whole, go_on, tmp_path):
    go_on()
    assert timeless(tmp_path, leave_out=set()) == timeless(whole)


@pytest.mark.parametrize(("call", "grace_s"), [(1, 0.0), (2, 60.0), (5, 0.0), (10, 60.0)])
def test_an_interrupted_search_that_is_resumed_ends_as_if_it_had_not_been(
    whole, go_on, tmp_path, call, grace_s
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.interruption.GRACE_S", grace_s)
        at_scoring(patch, call, ctrl_c)
        interrupted = go_on()
    assert interrupted.ended_by == "interrupt"
    assert results_of(tmp_path) != results_of(whole)
    assert go_on().ended_by == "evaluations"
    assert results_of(tmp_path) == results_of(whole)
    trace, expected = (Trace.load(folder / "trace.jsonl") for folder in (tmp_path, whole))
    assert len(trace.generations) == N_GENERATIONS
    for generation, other in zip(trace.generations, expected.generations, strict=True):
        for name in ("genomes", "losses", "injected", "prompt_spread", "per_expert"):
            np.testing.assert_array_equal(getattr(generation, name), getattr(other, name))
        assert generation.rungs == other.rungs
    for name in ("search_ended", "refined", "finalists", "merged"):
        last, other = (dict(found.last(name)) for found in (trace, expected))
        assert {k: v for k, v in last.items() if k not in TIMES} == {
            k: v for k, v in other.items() if k not in TIMES
        }


def test_interrupted_finalists_that_are_resumed_end_as_if_they_had_not_been(whole, go_on, scored, tmp_path):
    agreement = PopulationEvaluator.agreement

    def interrupted(self, coefficients):
        ctrl_c()
        return agreement(self, coefficients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.interruption.GRACE_S", 0.0)
        patch.setattr(PopulationEvaluator, "agreement", interrupted)
        assert go_on().ended_by == "interrupt"
    scored.clear()
    assert go_on().ended_by == "evaluations"
    assert scored == []
    assert results_of(tmp_path) == results_of(whole)
    assert events_of(tmp_path).count("search_ended") == 1
    assert events_of(tmp_path)[-4:] == ["resumed", "refined", "finalists", "merged"]


def test_another_configuration_is_refused_and_nothing_is_touched(whole, config, base, tmp_path):
    cut(whole, tmp_path, None)
    before = (tmp_path / "trace.jsonl").read_bytes()
    other = config.model_copy(update={"search": config.search.model_copy(update={"seed": 1})})
    with pytest.raises(InputError, match=r"begun with config\.search\.seed = 0, now it is 1"):
        run_search(other, output=tmp_path, base=base, resume=True)
    assert (tmp_path / "trace.jsonl").read_bytes() == before
    assert results_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("generation", ('"genomes": [[', '"genomes": [[1'), "generation 0 of the trace cannot be repeated"),
        ("prompts", ('"ids": [', '"ids": [1, '), "the trace's prompts have hash"),
        ("prompts", ('"sha256": "', '"sha256": "0'), "the trace's prompts have hash"),
    ],
)
def test_a_trace_that_was_changed_is_refused_in_one_line(whole, go_on, tmp_path, kind, change, expected):
    lines = [line.decode() for line in lines_of(whole)]
    number = places(whole, kind)[0]
    assert change[0] in lines[number]
    lines[number] = lines[number].replace(*change, 1)
    (tmp_path / "trace.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match=expected) as caught:
        go_on()
    assert "\n" not in str(caught.value)
