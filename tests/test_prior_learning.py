"""Learning priors: the formulas against slow ones, order of traces, what is left out and what is refused."""

import json
import logging
import math
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from search.errors import InputError
from search.prior_learning import MIN_SPREAD, POOLED_RUNS, UNKNOWN_DISAGREEMENT, learn_prior
from search.priors import PriorObjective, load_prior, save_prior
from search.provenance import library_versions
from search.trace import TraceWriter

GROUPS = ("layer.0", "layer.1")
ANSWER = [[0.1, 0.2], [0.3, 0.4]]
FAST = settings(max_examples=25)
folders = count()


def write_trace(
    folder, answer=ANSWER, spread=0.05, *, adapters=None, seed=0, winner="archive 1", groups=GROUPS, **changes
):
    """Write the trace of a finished run into a folder of its own; `changes` replace parts of it."""
    answer = np.array(answer, dtype=float)
    adapters = adapters or {name: f"hash-{name}" for name in "abcdefgh"[: answer.shape[1]]}
    header = {
        "config": {"objective": {"name": "entropy_excess", "combine": "mean", "positions": "auto"}},
        "seed": seed,
        "base": {"id": "org/base", "revision": None, "sha256": "base-hash"},
        "adapters": [
            {"name": name, "id": "x", "revision": None, "sha256": h} for name, h in adapters.items()
        ],
        "groups": groups,
    }
    ended = {
        "ended_by": "evaluations",
        "evaluations": 32,
        "spread": np.broadcast_to(spread, answer.shape),
    }
    finalists = {
        "prompts": "unseen",
        "names": ["base", winner],
        "losses": [1.0, 0.5],
        "winner": winner,
        "winner_coefficients": answer,
    }
    path = folder / f"run-{next(folders)}" / "trace.jsonl"
    with TraceWriter(path) as trace:
        trace.header({**header, **changes.get("header", {})})
        if "ended" not in changes or changes["ended"] is not None:
            trace.event("search_ended", **{**ended, **changes.get("ended", {})})
        if "finalists" not in changes or changes["finalists"] is not None:
            trace.event("finalists", **{**finalists, **changes.get("finalists", {})})
    return path


def refusal(*paths):
    with pytest.raises(InputError) as caught:
        learn_prior(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def slow_prior(runs):
    """The formulas, an entry at a time: runs of (answer, spread, columns) over all adapters."""
    n_adapters = 1 + max(column for _, _, columns in runs for column in columns)
    had = {
        (g, i): [(x[g][columns.index(i)], w[g][columns.index(i)]) for x, w, columns in runs if i in columns]
        for g in range(2)
        for i in range(n_adapters)
    }
    start = {at: sum(x for x, _ in seen) / len(seen) for at, seen in had.items()}
    squares = {at: sum((x - start[at]) ** 2 for x, _ in seen) for at, seen in had.items()}
    freedom = {at: len(seen) - 1 for at, seen in had.items()}
    if sum(freedom.values()):
        pooled = sum(squares.values()) / sum(freedom.values())
    else:
        pooled = UNKNOWN_DISAGREEMENT**2 * sum(x**2 for x in start.values()) / len(start)
    spread = {}
    for at, seen in had.items():
        disagreement = (POOLED_RUNS * pooled + squares[at]) / (POOLED_RUNS + freedom[at])
        within = sum(w**2 for _, w in seen) / len(seen)
        spread[at] = max(MIN_SPREAD, math.sqrt(disagreement / len(seen) + within))
    shape = 2, n_adapters
    return (np.array([table[at] for at in np.ndindex(shape)]).reshape(shape) for table in (start, spread))


@st.composite
def several_runs(draw):
    """Runs over subsets of three adapters, each of which is in one run at least."""
    subsets = draw(st.lists(st.permutations([0, 1, 2]), min_size=0, max_size=3))
    sizes = [draw(st.integers(1, 3)) for _ in subsets]
    columns = [[0, 1, 2], *(list(s[:n]) for s, n in zip(subsets, sizes, strict=True))]
    runs = []
    for held in columns:
        table = hnp.arrays(float, (2, len(held)), elements=st.floats(-2, 2))
        runs.append((draw(table), np.abs(draw(table)), held))
    return runs


def write_runs(folder, runs):
    return [
        write_trace(folder, x, w, adapters={"abc"[i]: f"hash-{'abc'[i]}" for i in columns}, seed=seed)
        for seed, (x, w, columns) in enumerate(runs)
    ]


@FAST
@given(runs=several_runs())
def test_start_and_spread_are_those_of_the_formulas(tmp_path_factory, runs):
    prior = learn_prior(write_runs(tmp_path_factory.mktemp("formulas"), runs))
    start, spread = slow_prior(runs)
    assert prior.names == ("a", "b", "c")
    np.testing.assert_allclose(prior.start, start, atol=1e-12)
    np.testing.assert_allclose(prior.spread, spread, atol=1e-12)
    assert prior.runs_of == tuple(sum(i in columns for _, _, columns in runs) for i in range(3))


@FAST
@given(runs=several_runs(), random=st.randoms(use_true_random=False), seed=st.integers(0, 1))
def test_the_order_of_traces_changes_no_byte(tmp_path_factory, runs, random, seed):
    folder = tmp_path_factory.mktemp("order")
    paths = [
        write_trace(folder, x, w, adapters={f"{'abc'[i]}{n}": f"hash-{i}" for i in columns}, seed=n * seed)
        for n, (x, w, columns) in enumerate(runs)
    ]
    save_prior(learn_prior(paths), folder / "one.json")
    random.shuffle(paths)
    save_prior(learn_prior(paths), folder / "other.json")
    assert (folder / "one.json").read_bytes() == (folder / "other.json").read_bytes()


def test_identical_runs_leave_the_spread_within_runs(tmp_path):
    within = np.array([[0.05, 0.1], [0.2, 0.001]])
    prior = learn_prior([write_trace(tmp_path, spread=within, seed=seed) for seed in range(3)])
    np.testing.assert_allclose(prior.start, ANSWER)
    np.testing.assert_allclose(prior.spread, np.maximum(within, MIN_SPREAD))


def test_runs_that_disagree_widen_the_spread_most_where_they_disagree(tmp_path):
    near, far = np.array(ANSWER), np.array(ANSWER)
    far[1, 0] += 1
    together = learn_prior([write_trace(tmp_path, near), write_trace(tmp_path, near, seed=1)])
    apart = learn_prior([write_trace(tmp_path, near), write_trace(tmp_path, far, seed=1)])
    assert (apart.spread > together.spread).all()
    assert apart.spread.argmax() == 2


def test_one_run_alone_leaves_room_to_disagree(tmp_path):
    prior = learn_prior([write_trace(tmp_path, [[0.0, 0.4], [0.4, 0.4]], spread=0.0)])
    np.testing.assert_allclose(prior.spread, UNKNOWN_DISAGREEMENT * np.sqrt(0.12))


def test_a_search_can_move_from_a_prior_of_zeros(tmp_path):
    assert (learn_prior([write_trace(tmp_path, np.zeros((2, 2)), spread=0.0)]).spread == MIN_SPREAD).all()


def test_adapters_are_matched_by_hash_under_the_first_name(tmp_path):
    first = write_trace(tmp_path, [[0.1, 0.2]] * 2, adapters={"a": "one", "b": "two"}, seed=1)
    second = write_trace(tmp_path, [[0.4, 0.3]] * 2, adapters={"new b": "two", "c": "three"}, seed=2)
    prior = learn_prior([second, first])
    assert (prior.names, prior.hashes) == (("a", "b", "c"), ("one", "two", "three"))
    np.testing.assert_allclose(prior.start, [[0.1, 0.3, 0.3]] * 2)
    assert prior.runs_of == (1, 2, 1)
    assert [run.adapters for run in prior.runs] == [("a", "b"), ("b", "c")]


def test_a_prior_says_where_it_is_from(tmp_path):
    path = write_trace(tmp_path, seed=7)
    prior = learn_prior([path])
    (run,) = prior.runs
    assert (run.trace, run.seed, run.evaluations) == (f"{path.parent.name}/trace.jsonl", 7, 32)
    assert (run.ended_by, run.winner, run.loss) == ("evaluations", "archive 1", 0.5)
    assert run.objective == PriorObjective("entropy_excess", "mean")
    assert (prior.base.id, prior.base.sha256, prior.groups) == ("org/base", "base-hash", GROUPS)
    assert prior.provenance.versions == library_versions()


def test_no_absolute_path_gets_into_the_file(tmp_path):
    save_prior(learn_prior([write_trace(tmp_path)]), tmp_path / "prior.json")
    assert str(tmp_path) not in (tmp_path / "prior.json").read_text()
    assert load_prior(tmp_path / "prior.json").runs[0].seed == 0


def test_the_last_of_equal_events_counts(tmp_path):
    path = write_trace(tmp_path, spread=0.5)
    last = write_trace(tmp_path, [[0.5, 0.5]] * 2, spread=0.1)
    with path.open("a") as file:
        file.writelines(last.read_text().splitlines(keepends=True)[1:])
    np.testing.assert_array_equal(learn_prior([path]).start, learn_prior([last]).start)
    np.testing.assert_array_equal(learn_prior([path]).spread, learn_prior([last]).spread)


@pytest.mark.parametrize("winner", ["base", "uniform", "balanced", "prior", "expert a"])
def test_a_run_that_a_reference_won_is_left_out_with_a_warning(tmp_path, caplog, winner):
    lost = write_trace(tmp_path, np.zeros((2, 2)), winner=winner, finalists={"names": ["x", winner]})
    kept = write_trace(tmp_path)
    with caplog.at_level(logging.WARNING):
        prior = learn_prior([lost, kept])
    assert [run.trace for run in prior.runs] == [f"{kept.parent.name}/trace.jsonl"]
    np.testing.assert_allclose(prior.start, ANSWER)
    (record,) = caplog.records
    assert f"{lost}: left out of the prior: its winner is {winner!r}" in record.getMessage()
    assert "none of 1 traces has a winner that its search found" in refusal(lost)


@pytest.mark.parametrize("winner", ["mean", "refined", "archive 3"])
def test_a_run_that_its_search_won_is_taken(tmp_path, winner):
    assert learn_prior([write_trace(tmp_path, winner=winner)]).runs[0].winner == winner


@pytest.mark.parametrize("event", ["ended", "finalists"])
def test_an_unfinished_run_is_to_be_resumed_first(tmp_path, event):
    path = write_trace(tmp_path, **{event: None})
    assert refusal(path) == (f"{path}: unfinished; resume it first: python -m search resume {path.parent}")


def go_on(path, *events):
    """Write more into a trace that ended."""
    with TraceWriter(path, n_kept_bytes=path.stat().st_size) as trace:
        for name, content in events:
            trace.event(name, **content)


INTERRUPTED_ENDS = {
    "in the search": ({"ended_by": "interrupt"}, [("interrupt", {"phase": "search"}), ("resumed", {})]),
    "in the finalists": ({}, [("interrupt", {"phase": "finalists"}), ("resumed", {})]),
}


@pytest.mark.parametrize(("ended", "events"), INTERRUPTED_ENDS.values(), ids=INTERRUPTED_ENDS.keys())
def test_an_interrupted_run_that_was_resumed_and_cut_is_unfinished(tmp_path, ended, events):
    path = write_trace(tmp_path, ended=ended)
    go_on(path, *events)
    assert refusal(path) == (f"{path}: unfinished; resume it first: python -m search resume {path.parent}")


def test_of_a_run_that_was_resumed_to_its_end_the_new_winner_is_taken(tmp_path):
    path = write_trace(tmp_path, np.zeros((2, 2)), ended={"ended_by": "interrupt"})
    go_on(path, ("interrupt", {"phase": "search"}), ("resumed", {}))
    last = write_trace(tmp_path)
    with path.open("a") as file:
        file.writelines(last.read_text().splitlines(keepends=True)[1:])
    np.testing.assert_allclose(learn_prior([path]).start, ANSWER)


LEFT_OUT = {
    "an interrupted search": (
        {"ended": {"ended_by": "interrupt"}},
        "its search was interrupted; to use it: py",
    ),
    "a winner on searched prompts": (
        {"finalists": {"prompts": "searched"}},
        "its winner was compared on searched prompts only, not on unseen ones",
    ),
}


@pytest.mark.parametrize(("changes", "reason"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_a_winner_that_is_no_answer_is_left_out_with_the_reason(tmp_path, caplog, changes, reason):
    no_answer, kept = write_trace(tmp_path, np.zeros((2, 2)), **changes), write_trace(tmp_path)
    with caplog.at_level(logging.WARNING):
        prior = learn_prior([no_answer, kept])
    np.testing.assert_allclose(prior.start, ANSWER)
    (record,) = caplog.records
    assert f"{no_answer}: left out of the prior: {reason}" in record.getMessage()
    assert "none of 1 traces has a winner that its search found and compared on uns" in refusal(no_answer)


def test_no_trace_at_all_is_refused():
    assert "none of 0 traces" in refusal()


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot read the trace" in refusal(tmp_path / "none.jsonl")


def test_a_trace_given_twice_is_refused(tmp_path):
    path = write_trace(tmp_path)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert refusal(path, copy) == f"{copy}: the same trace as {path}; give it once"


def test_runs_over_another_base_are_refused(tmp_path):
    one = write_trace(tmp_path)
    other = write_trace(tmp_path, seed=1, header={"base": {"id": "org/base", "sha256": "other"}})
    assert f"{other}: found base other, but base-hash in {one}" in refusal(one, other)


def test_bases_without_hashes_are_told_apart_by_their_names(tmp_path):
    one, same, other = (
        write_trace(tmp_path, seed=seed, header={"base": {"id": name, "sha256": None}})
        for seed, name in enumerate(["org/one", "org/one", "org/other"])
    )
    assert len(learn_prior([one, same]).runs) == 2
    assert "found base org/other, but org/one" in refusal(one, other)


def test_runs_with_other_groups_are_refused(tmp_path):
    one = write_trace(tmp_path)
    other = write_trace(tmp_path, [[0.1, 0.2]], groups=("model",), seed=1)
    message = refusal(one, other)
    assert f"{other}: found groups (model), but (layer.0, layer.1) in {one}" in message
    layers = tuple(f"layer.{layer}" for layer in range(9))
    long = write_trace(tmp_path, np.zeros((9, 1)), groups=layers, seed=2)
    assert "found groups (layer.0, ..., layer.8: 9)" in refusal(one, long)


def test_one_name_for_two_hashes_is_refused(tmp_path):
    one = write_trace(tmp_path, adapters={"a": "1" * 64, "b": "two"})
    other = write_trace(tmp_path, adapters={"a": "3" * 64, "c": "four"}, seed=1)
    message = refusal(one, other)
    assert f"{other}: adapter 'a' has sha256 {'3' * 12}, but {'1' * 12} in {one}" in message


def test_a_run_that_holds_the_same_weights_twice_is_refused(tmp_path):
    path = write_trace(tmp_path, adapters={"a": "one", "b": "one"})
    assert f"{path}: header: a and b have the same weights (sha256 one)" in refusal(path)


DAMAGE = {
    "a loss that is not finite": (
        {"finalists": {"losses": [1.0, math.nan]}},
        "finalists: losses: found none of the winner 'archive 1'",
    ),
    "a winner that is no finalist": (
        {"finalists": {"winner": "nobody"}},
        "finalists: losses: found none of the winner 'nobody'",
    ),
    "a coefficient that is not finite": (
        {"finalists": {"winner_coefficients": [[0.1, math.nan], [0, 0]]}},
        "event finalists: winner_coefficients.0.1: found None; it should be a valid number",
    ),
    "coefficients of another shape": (
        {"finalists": {"winner_coefficients": [[0.1, 0.2]]}},
        "winner_coefficients: found 1 rows, expected (n_groups, n_adapters) = (2, 2)",
    ),
    "ragged coefficients": (
        {"finalists": {"winner_coefficients": [[0.1, 0.2], [0.1]]}},
        "winner_coefficients: found rows of 1, expected (n_groups, n_adapters) = (2, 2)",
    ),
    "a negative spread": (
        {"ended": {"spread": [[0.1, -0.2], [0, 0]]}},
        "event search_ended: spread.0.1: found -0.2; it should be greater than or equal to 0",
    ),
    "a spread of another shape": (
        {"ended": {"spread": [[0.1, 0.2, 0.3]] * 2}},
        "event search_ended: spread: found rows of 3, expected (n_groups, n_adapters) = (2, 2)",
    ),
    "evaluations that are no number": (
        {"ended": {"evaluations": "many"}},
        "event search_ended: evaluations: found 'many'; it should be a valid integer",
    ),
    "an adapter without hash": (
        {"header": {"adapters": [{"name": "a", "sha256": None}]}},
        "header: adapters.0.sha256: found None; it should be a valid string",
    ),
    "no adapter": ({"header": {"adapters": []}}, "header: adapters: found []"),
    "no group": ({"header": {"groups": []}}, "header: groups: found []"),
    "no objective": ({"header": {"config": {}}}, "header: config.objective: missing"),
}


@pytest.mark.parametrize(("changes", "expected"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_trace_that_makes_no_sense_is_refused_by_field(tmp_path, changes, expected):
    path = write_trace(tmp_path, **changes)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert message.endswith("leave this trace out")


def test_a_trace_of_an_older_version_names_what_it_lacks(tmp_path):
    path = write_trace(tmp_path)
    header, *events = map(json.loads, Path(path).read_text().splitlines())
    del events[-1]["winner_coefficients"]
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *events)))
    assert "event finalists: winner_coefficients: missing; leave this trace out" in refusal(path)


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_numbers_that_json_should_not_hold_are_refused(tmp_path, number):
    path = write_trace(tmp_path, [[0.1, 0.2], [0.3, 0.123]])
    path.write_text(path.read_text().replace("0.123", number))
    assert "winner_coefficients.1.1: found " in refusal(path)
