"""Resume: what stands of an earlier run, wherever it stopped, and whether this run may go on with it."""

import copy
import json
import logging

import numpy as np
import pytest

from search.errors import InputError
from search.resume import Record, read_record, refuse_changes
from search.trace import Generation, Trace, TraceWriter

HEADER = {
    "config": {
        "base": {"source": "zoo/base", "revision": None, "name": "zoo/base", "dtype": "auto"},
        "adapters": [
            {"source": "zoo/a", "name": "a", "about": "", "skeletons": [], "allow_pickle": False},
            {"source": "zoo/b", "name": "b", "about": "", "skeletons": ["{x} is:"], "allow_pickle": False},
        ],
        "device": "auto",
        "search": {"seed": 0, "max_evaluations": 24, "stages": [], "race_keep": None, "prior": None},
        "objective": {"name": "entropy_excess", "combine": "worst"},
    },
    "config_sha256": "c" * 64,
    "seed": 0,
    "objective": "entropy_excess",
    "prior": None,
    "base": {"id": "zoo/base", "revision": None, "sha256": "0" * 64},
    "adapters": [
        {"name": "a", "id": "zoo/a", "revision": None, "sha256": "a" * 64},
        {"name": "b", "id": "zoo/b", "revision": None, "sha256": "b" * 64},
    ],
    "groups": ["layer.0", "layer.1"],
    "device": "cpu",
    "device_name": None,
    "dtype": "float32",
    "versions": {"torch": "2.13.0", "numpy": "2.0"},
    "commit": "1" * 40,
}
BEGINNING = ["prompts", "signals", "references", "search"]
"""Events before the first stage."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.jsonl"


def record(path, *lines):
    """Write a header and these lines, and read them back.

    A line is an event, (name, fields), its name alone, or a generation: (index, stage).
    """
    with TraceWriter(path) as trace:
        trace.header(HEADER)
        for line in lines:
            name, fields = (line, {}) if isinstance(line, str) else line
            if isinstance(name, str):
                trace.event(name, **fields)
            else:
                trace.generation(make_generation(name, fields))
    return read_record(path)


def make_generation(index, stage):
    return Generation(
        index=index,
        stage=stage,
        genomes=np.full((2, 3), float(index)),
        losses=np.array([0.5, 0.25]),
        per_expert=np.full((2, 2), 0.5),
        evaluations=2 * (index + 1),
        n_tokens=10,
        elapsed_s=10.0 + index,
        seconds=1.0,
    )


def stage(index):
    return "stage", {"index": index, "left_s": 100.0}


def stage_ended(index, ended_by="evaluations"):
    return "stage_ended", {"index": index, "ended_by": ended_by, "elapsed_s": 20.0 + index}


def search_ended(ended_by="evaluations", elapsed_s=30.0):
    return "search_ended", {"ended_by": ended_by, "elapsed_s": elapsed_s}


def merged(ended_by="evaluations", elapsed_s=40.0):
    return "merged", {"ended_by": ended_by, "elapsed_s": elapsed_s}


def interrupt(phase):
    return "interrupt", {"phase": phase}


def resumed(elapsed_s=15.0):
    return "resumed", {"elapsed_s": elapsed_s, "generations": 1}


def names(found):
    """Which events stand, in a form that is easy to compare."""
    return {name if index is None else f"{name} {index}" for name, index in found.kept_events}


def indices(past):
    return [generation.index for generation in past.generations]


@pytest.mark.parametrize("content", [None, b"", b'{"kind": "hea', b'{"kind": "header", "schema": 1}'])
def test_of_nothing_and_of_a_header_without_its_line_end_nothing_stands(path, content):
    if content is not None:
        path.write_bytes(content)
    found = read_record(path)
    assert found.trace is None
    assert (found.n_bytes, found.elapsed_s, found.kept_events) == (0, 0.0, frozenset())
    assert found.event("prompts") is None
    assert (indices(found.past(0)), found.past(0).ended_by) == ([], None)
    refuse_changes(found, HEADER, path)


def test_of_a_header_alone_the_header_stands(path):
    found = record(path)
    assert found.n_bytes == path.stat().st_size
    assert (found.elapsed_s, found.kept_events) == (0.0, frozenset())
    assert (indices(found.past(0)), found.past(0).ended_by) == ([], None)


@pytest.mark.parametrize("content", [b"{}\n", b"id,input\n1,two\n", b"\n\n", b"[]\nx\n"])
def test_a_file_that_is_no_trace_is_refused_not_replaced(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"trace\.jsonl"):
        read_record(path)
    assert path.read_bytes() == content


def test_a_path_that_cannot_be_read_is_named(path):
    path.mkdir()
    with pytest.raises(InputError, match=r"trace\.jsonl: cannot read the trace: Is a directory"):
        read_record(path)


def test_in_the_middle_of_the_search_its_beginning_and_its_generations_stand(path):
    found = record(path, *BEGINNING, stage(0), (0, 0), (1, 0))
    assert names(found) == {*BEGINNING, "stage 0"}
    assert (indices(found.past(0)), found.past(0).ended_by) == ([0, 1], None)
    assert indices(found.past(1)) == []
    assert found.elapsed_s == 11.0
    assert found.event("prompts")["event"] == "prompts"
    assert found.event("finalists") is None


def test_a_line_that_was_cut_off_does_not_stand(path):
    whole = record(path, *BEGINNING, stage(0), (0, 0))
    with path.open("ab") as file:
        file.write(b'{"kind": "generation", "index": 1, "genomes": [[')
    found = read_record(path)
    assert found.n_bytes == whole.n_bytes == path.stat().st_size - 48
    assert indices(found.past(0)) == [0]


def test_each_stage_has_its_own_past_and_end(path):
    found = record(path, *BEGINNING, stage(0), (0, 0), stage_ended(0, "clock"), stage(1), (1, 1), (2, 1))
    assert (indices(found.past(0)), found.past(0).ended_by) == ([0], "clock")
    assert (indices(found.past(1)), found.past(1).ended_by) == ([1, 2], None)
    assert (indices(found.past(2)), found.past(2).ended_by) == ([], None)
    assert names(found) == {*BEGINNING, "stage 0", "stage 1", "stage_ended 0"}
    assert found.elapsed_s == 20.0


def test_a_search_that_is_over_is_over_and_its_finalists_stand(path):
    lines = [*BEGINNING, stage(0), (0, 0), stage_ended(0), search_ended()]
    over = record(path, *lines)
    assert over.past(0).ended_by == "evaluations"
    assert over.event("finalists") is None
    assert over.elapsed_s == 30.0
    found = record(path, *lines, "refined", ("finalists", {"prompts": "unseen"}), merged())
    assert names(found) == names(over) | {"refined", "finalists", "merged"}
    assert found.event("finalists")["prompts"] == "unseen"
    assert found.elapsed_s == 40.0


def test_an_interrupted_search_goes_on_and_ends_anew(path):
    end = [stage_ended(0, "interrupt"), search_ended("interrupt")]
    rest = [interrupt("search"), "finalists", merged("interrupt")]
    for n in range(len(rest) + 1):  # killed anywhere on the way out
        found = record(path, *BEGINNING, stage(0), (0, 0), *end, *rest[:n])
        assert names(found) == {*BEGINNING, "stage 0"}
        assert (indices(found.past(0)), found.past(0).ended_by) == ([0], None)
        assert found.event("search_ended") is None
        assert found.event("merged") is None


def test_of_two_stages_the_one_before_the_interrupt_stays_over(path):
    lines = [stage(0), (0, 0), stage_ended(0), stage(1), (1, 1), stage_ended(1, "interrupt")]
    end = [search_ended("interrupt"), interrupt("search"), "finalists", merged("interrupt")]
    found = record(path, *BEGINNING, *lines, *end)
    assert names(found) == {*BEGINNING, "stage 0", "stage_ended 0", "stage 1"}
    assert [found.past(index).ended_by for index in (0, 1)] == ["evaluations", None]


def test_interrupted_finalists_are_compared_anew_and_the_search_stays_over(path):
    lines = [*BEGINNING, stage(0), (0, 0), stage_ended(0), search_ended(), "refined"]
    rest = ["finalists", merged("interrupt")]
    for n in range(len(rest) + 1):
        found = record(path, *lines, interrupt("finalists"), *rest[:n])
        assert names(found) == {*BEGINNING, "stage 0", "stage_ended 0", "search_ended"}
        assert found.past(0).ended_by == "evaluations"


def test_finalists_without_time_stand(path):
    lines = [*BEGINNING, stage(0), (0, 0), stage_ended(0, "clock"), search_ended("clock")]
    found = record(path, *lines, "finalists_skipped", ("finalists", {"prompts": "searched"}), merged("clock"))
    assert {"finalists_skipped", "finalists", "merged"} < names(found)
    assert found.event("finalists")["prompts"] == "searched"


def test_interrupted_resumed_killed_and_resumed_again(path):
    first = [*BEGINNING, stage(0), (0, 0), stage_ended(0, "interrupt"), search_ended("interrupt")]
    first += [interrupt("search"), "finalists", merged("interrupt", 41.0)]
    found = record(path, *first, resumed(41.0), (1, 0))
    assert names(found) == {*BEGINNING, "stage 0"}
    assert (indices(found.past(0)), found.past(0).ended_by) == ([0, 1], None)
    assert found.elapsed_s == 41.0
    second = [resumed(41.0), (1, 0), stage_ended(0), search_ended(elapsed_s=50.0)]
    found = record(path, *first, *second)
    assert names(found) == {*BEGINNING, "stage 0", "stage_ended 0", "search_ended"}
    assert found.past(0).ended_by == "evaluations"
    found = record(path, *first, *second, resumed(50.0), "finalists", merged(elapsed_s=60.0))
    assert names(found) == {*BEGINNING, "stage 0", "stage_ended 0", "search_ended", "finalists", "merged"}
    assert found.event("merged")["ended_by"] == "evaluations"
    assert found.elapsed_s == 60.0


def test_interrupted_in_the_search_and_then_in_the_finalists(path):
    first = [*BEGINNING, stage(0), (0, 0), stage_ended(0, "interrupt"), search_ended("interrupt")]
    first += [interrupt("search"), "finalists", merged("interrupt")]
    second = [resumed(), (1, 0), stage_ended(0), search_ended(), interrupt("finalists"), "finalists"]
    found = record(path, *first, *second)
    assert names(found) == {*BEGINNING, "stage 0", "stage_ended 0", "search_ended"}
    assert found.event("search_ended")["ended_by"] == "evaluations"


def test_what_may_come_often_is_never_kept_from_being_written_again(path):
    found = record(path, *BEGINNING, "out_of_memory", resumed(), "out_of_memory", resumed())
    assert names(found) == set(BEGINNING)


# ---- the same run, or another


def changed(*keys, to):
    """The header with one value replaced."""
    header = copy.deepcopy(HEADER)
    inner = header
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return header


def refusal(path, header):
    with pytest.raises(InputError) as caught:
        refuse_changes(record(path, *BEGINNING), header, path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: begun with ")
    assert "Set it back to go on" in message
    assert "another --out" in message
    assert "search priors" in message
    return message.removeprefix(f"{path}: begun with ").partition(". Set it back")[0]


def test_the_same_header_is_no_change(path):
    refuse_changes(record(path, *BEGINNING), HEADER, path)
    refuse_changes(record(path, *BEGINNING), {**HEADER, "groups": tuple(HEADER["groups"])}, path)


@pytest.mark.parametrize(
    ("keys", "to", "expected"),
    [
        (("config", "search", "seed"), 1, "config.search.seed = 0, now it is 1"),
        (("config", "search", "max_evaluations"), 48, "config.search.max_evaluations = 24, now it is 48"),
        (("config", "search", "race_keep"), 0.5, "config.search.race_keep = None, now it is 0.5"),
        (
            ("config", "search", "stages"),
            [{"share": 1.0}],
            "config.search.stages.0.share = None, now it is 1.0",
        ),
        (("config", "base", "dtype"), "float16", "config.base.dtype = 'auto', now it is 'float16'"),
        (
            ("config", "adapters", 1, "skeletons"),
            ["{y} is:"],
            "config.adapters.b.skeletons.0 = '{x} is:', now it is '{y} is:'",
        ),
        (
            ("config", "objective", "combine"),
            "mean",
            "config.objective.combine = 'worst', now it is 'mean'",
        ),
        (("objective",), "m:f", "objective = 'entropy_excess', now it is 'm:f'"),
        (
            ("adapters", 1, "sha256"),
            "f" * 64,
            f"adapters.b.sha256 = '{'b' * 64}', now it is '{'f' * 64}'",
        ),
        (("base", "sha256"), "f" * 64, f"base.sha256 = '{'0' * 64}', now it is '{'f' * 64}'"),
        (("versions", "torch"), "2.14.0", "versions.torch = '2.13.0', now it is '2.14.0'"),
        (("versions", "cma"), "4.5", "versions.cma = None, now it is '4.5'"),
        (("device",), "cuda", "device = 'cpu', now it is 'cuda'"),
        (("dtype",), "float64", "dtype = 'float32', now it is 'float64'"),
        (("groups",), ["model"], "groups.0 = 'layer.0', now it is 'model'"),
        (
            ("prior",),
            {"source": "p.json", "sha256": "e" * 64},
            f"prior.sha256 = None, now it is '{'e' * 64}'",
        ),
    ],
)
def test_a_change_is_refused_by_its_name(path, keys, to, expected):
    assert refusal(path, changed(*keys, to=to)) == expected


def test_a_prior_that_was_left_out_is_a_change(path):
    with TraceWriter(path) as trace:
        trace.header({**HEADER, "prior": {"source": "p.json", "sha256": "e" * 64}})
    with pytest.raises(InputError, match=r"begun with prior\.sha256 = 'eeee.*now it is None"):
        refuse_changes(read_record(path), HEADER, path)


def test_an_adapter_that_was_added_left_out_or_moved_in_order_is_named_as_such(path):
    added = copy.deepcopy(HEADER)
    added["config"]["adapters"].append({**HEADER["config"]["adapters"][0], "name": "c", "source": "zoo/c"})
    added["adapters"].append({**HEADER["adapters"][0], "name": "c", "id": "zoo/c"})
    assert refusal(path, added) == "config.adapters.order = 'a b', now it is 'a b c'"
    fewer = copy.deepcopy(HEADER)
    del fewer["config"]["adapters"][0], fewer["adapters"][0]
    assert refusal(path, fewer) == "config.adapters.order = 'a b', now it is 'b'"
    reordered = copy.deepcopy(HEADER)
    for adapters in (reordered["config"]["adapters"], reordered["adapters"]):
        adapters.reverse()
    assert refusal(path, reordered) == "config.adapters.order = 'a b', now it is 'b a'"


def test_a_setting_goes_before_what_follows_from_it(path):
    header = changed("config", "search", "seed", to=1)
    header.update(seed=1, config_sha256="d" * 64, groups=["model"])
    assert refusal(path, header) == "config.search.seed = 0, now it is 1"


@pytest.mark.parametrize(
    ("keys", "to"),
    [
        (("config", "adapters", 0, "source"), "elsewhere/a"),
        (("adapters", 0, "id"), "elsewhere/a"),
        (("config", "base", "source"), "elsewhere/base"),
        (("base", "id"), "elsewhere/base"),
        (("config", "adapters", 0, "about"), "says hello"),
        (("config", "search", "prior"), "moved.json"),
        (("config", "adapters_missing"), "skip"),
        (("config_sha256",), "d" * 64),
        (("prior",), None),
    ],
)
def test_where_things_lie_and_what_is_said_of_them_may_change(path, keys, to, caplog):
    refuse_changes(record(path, *BEGINNING), changed(*keys, to=to), path)
    assert not caplog.records


def test_another_commit_or_card_is_warned_of(path, caplog):
    header = {**HEADER, "commit": "2" * 40, "device_name": "H100"}
    with caplog.at_level(logging.WARNING):
        refuse_changes(record(path, *BEGINNING), header, path)
    first, second = (entry.message for entry in caplog.records)
    assert f"begun with commit {'1' * 40}, going on with {'2' * 40}" in first
    assert "begun with device_name None, going on with H100" in second


def test_what_an_older_version_did_not_record_is_a_change_and_what_it_recorded_beside_is_not(path):
    with TraceWriter(path) as trace:
        trace.header({**HEADER, "no_longer_known": 3})
    refuse_changes(read_record(path), HEADER, path)
    with TraceWriter(path) as trace:
        trace.header({key: value for key, value in HEADER.items() if key != "dtype"})
    with pytest.raises(InputError, match="begun with dtype = None, now it is 'float32'"):
        refuse_changes(read_record(path), HEADER, path)


def test_the_record_of_a_written_trace_is_the_trace(path):
    found = record(path, *BEGINNING)
    assert json.loads(path.read_text().splitlines()[0]) == found.trace.header == Trace.load(path).header
    assert Record().trace is None
