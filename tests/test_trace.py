"""Trace: what is written comes back, whole lines or none, and damage is named by its line."""

import errno
import json
import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import InputError
from search.resume import Record
from search.trace import SCHEMA, Generation, Trace, TraceWriter, event_key

HEADER = {"config": {"seed": 0, "skeletons": ("a", "b")}, "versions": {"torch": "2"}}


def make_generation(index=0, n=3, **changes):
    rng = np.random.default_rng(index)
    fields = {
        "index": index,
        "genomes": rng.normal(size=(n, 4)),
        "losses": rng.random(n),
        "per_expert": rng.random((n, 2)),
        "evaluations": n * (index + 1),
        "n_tokens": 100,
        "elapsed_s": 1.5 * index,
        "seconds": 1.25,
        "peak_bytes": 2**33,
        "stage": 1,
        "rungs": [
            {"prompts": 2, "candidates": list(range(n)), "losses": rng.random(n).tolist()},
            {"prompts": 4, "candidates": [0], "losses": [0.25]},
        ],
        "injected": rng.normal(size=(1, 4)),
        "prompt_spread": rng.random(4),
    }
    return Generation(**{**fields, **changes})


@pytest.fixture
def path(tmp_path):
    """A trace with a header, two generations and an event."""
    path = tmp_path / "run" / "trace.jsonl"
    with TraceWriter(path) as trace:
        trace.header(HEADER)
        trace.generation(make_generation(0))
        trace.event("finalists", name="best", losses=np.array([0.5, np.nan]), best=np.float32(0.5))
        trace.generation(make_generation(1, injected=np.empty((0, 4))))
    return path


def kinds(path):
    """What each line is."""
    return [line.get("event") or line["kind"] for line in map(json.loads, path.read_text().splitlines())]


def damage(path, line, text):
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


def refusal(path):
    with pytest.raises(InputError) as caught:
        Trace.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_written_comes_back_to_the_last_bit(path):
    trace = Trace.load(path)
    assert trace.header["schema"] == SCHEMA
    assert trace.header["config"] == {"seed": 0, "skeletons": ["a", "b"]}
    assert [event["event"] for event in trace.events] == ["finalists"]
    assert trace.events[0]["losses"] == [0.5, None]
    assert trace.events[0]["name"] == "best"
    for index, read in enumerate(trace.generations):
        written = make_generation(index, **({"injected": np.empty((0, 4))} if index else {}))
        for name in Generation.__slots__:
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name), err_msg=name)
    assert [generation.injected.shape for generation in trace.generations] == [(1, 4), (0, 4)]
    assert trace.n_bytes == path.stat().st_size


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_in_memory(tmp_path):
    losses = np.array([0.5, np.nan, np.inf])
    per_expert = np.array([[0.5, 0.5], [np.nan, -np.inf], [np.inf, 1.0]])
    with TraceWriter(tmp_path / "t") as trace:
        trace.header({"limit": math.inf})
        trace.generation(make_generation(losses=losses, per_expert=per_expert, peak_bytes=None))
    written = json.loads((tmp_path / "t").read_text().splitlines()[1])
    assert written["losses"] == [0.5, None, None]
    assert written["per_expert"] == [[0.5, 0.5], [None, None], [None, 1.0]]
    read = Trace.load(tmp_path / "t")
    assert read.header["limit"] is None
    np.testing.assert_array_equal(read.generations[0].losses, [0.5, np.nan, np.nan])
    assert read.generations[0].peak_bytes is None


def test_a_path_may_be_text(path):
    assert Trace.load(str(path)).n_bytes == Trace.load(path).n_bytes == path.stat().st_size


def test_pandas_reads_a_trace(path):
    table = pd.read_json(path, lines=True)
    assert table["kind"].tolist() == ["header", "generation", "event", "generation"]
    generations = table[table["kind"] == "generation"]
    assert generations["evaluations"].tolist() == [3, 6]
    np.testing.assert_allclose(np.stack(generations["losses"].tolist())[0], make_generation(0).losses)


def test_every_line_is_on_disk_before_the_next(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / "t").stat().st_size))
    trace = TraceWriter(tmp_path / "t")
    trace.header({})
    trace.generation(make_generation(0))
    assert len(Trace.load(tmp_path / "t").generations) == 1
    assert synced[0] < synced[1] == (tmp_path / "t").stat().st_size
    trace.close()


def test_a_last_line_cut_at_any_byte_is_left_out(path, caplog):
    whole = path.read_bytes()
    before_last = whole[:-1].rindex(b"\n") + 1
    for cut in range(before_last + 1, len(whole)):  # the last of them lacks its line end alone
        path.write_bytes(whole[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trace = Trace.load(path)
        assert (len(trace.generations), trace.n_bytes) == (1, before_last)
        assert "trace.jsonl:4: the last line was cut off; left out" in caplog.text


def test_what_comes_behind_the_last_whole_line_is_left_out(path, caplog):
    whole = path.read_bytes()
    for rest in (b"\0\0\0", b"\0\0\0\n", '{"é'.encode()[:-1], b"\n", b"{}", b'{"kind": "event"}'):
        path.write_bytes(whole + rest)
        trace = Trace.load(path)
        assert (len(trace.generations), trace.n_bytes) == (2, len(whole))
    assert len(caplog.records) == 6
    path.write_bytes(whole)
    assert Trace.load(path).n_bytes == len(whole)
    assert len(caplog.records) == 6


def test_a_header_cut_at_any_byte_is_no_trace(path):
    header = path.read_bytes().partition(b"\n")[0]
    for cut in range(len(header) + 1):
        path.write_bytes(header[:cut])
        assert "no trace: its first line is no header" in refusal(path)


def test_a_writer_goes_on_after_the_bytes_that_are_kept(path):
    whole = path.read_bytes()
    before_last = whole[:-1].rindex(b"\n") + 1
    with TraceWriter(path, n_kept_bytes=before_last) as trace:
        assert path.read_bytes() == whole[:before_last]
        trace.generation(make_generation(1, injected=np.empty((0, 4))))
        assert path.read_bytes() == whole
        trace.event("merged")
    assert kinds(path) == ["header", "generation", "finalists", "generation", "merged"]


def test_a_continued_trace_has_its_header_already(path):
    with TraceWriter(path, n_kept_bytes=path.stat().st_size) as trace:
        with pytest.raises(ValueError, match="has its header already"):
            trace.header({})
        trace.event("merged")


def test_a_write_that_fails_leaves_what_was_kept(path, monkeypatch):
    whole = path.read_bytes()
    with TraceWriter(path, n_kept_bytes=len(whole)) as trace:
        monkeypatch.setattr(os, "fsync", _raiser(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(InputError, match="No space left on device"):
            trace.event("lost")
    assert path.read_bytes() == whole


def test_events_that_are_kept_are_not_written_again(path):
    kept = frozenset({("finalists", None), ("stage", 0)})
    with TraceWriter(path, n_kept_bytes=path.stat().st_size, kept_events=kept) as trace:
        trace.event("finalists", winner="another")
        trace.event("stage", index=0)
        trace.event("stage", index=1)
        trace.event("stage_ended", index=0)
        trace.event("out_of_memory", tokens=4)
    assert kinds(path)[4:] == ["stage", "stage_ended", "out_of_memory"]
    assert Trace.load(path).events[1]["index"] == 1


def test_an_event_is_told_apart_by_its_name_and_index():
    assert event_key({"event": "stage", "index": 1, "left_s": 3}) == ("stage", 1)
    assert event_key({"event": "merged", "winner": "mean"}) == ("merged", None)


def test_of_equal_events_the_last_one_is_found(path):
    with TraceWriter(path, n_kept_bytes=path.stat().st_size) as trace:
        trace.event("finalists", name="other")
    trace = Trace.load(path)
    assert trace.last("finalists")["name"] == "other"
    assert trace.last("merged") is None


END = (
    ("search_ended", {"generations": 2, "ended_by": "evaluations"}),
    ("finalists", {"winner": "old"}),
    ("merged", {"ended_by": "evaluations"}),
)
INTERRUPTED = (
    ("search_ended", {"generations": 2, "ended_by": "interrupt"}),
    ("interrupt", {"phase": "search"}),
    ("finalists", {"winner": "old"}),
    ("merged", {"ended_by": "interrupt"}),
)


def load_with(path, events):
    """The trace, of two generations, with these events behind; the fixture's own is no end."""
    with TraceWriter(path, n_kept_bytes=path.stat().st_size) as trace:
        for name, content in events:
            trace.event(name, **content)
    trace = Trace.load(path)
    return Trace(trace.header, trace.generations, trace.events[1:])


@pytest.mark.parametrize("events", [END, INTERRUPTED, (*END, ("resumed", {}))])
def test_an_end_stands_that_nothing_went_on_after(path, events):
    trace = load_with(path, events)
    for name in ("search_ended", "finalists", "merged"):
        assert trace.ending(name) == trace.last(name)
        assert trace.ending(name) is not None
    assert trace.ending("refined") is None


def test_an_end_is_void_as_soon_as_an_interrupted_run_is_resumed(path):
    trace = load_with(path, [*INTERRUPTED, ("resumed", {})])
    assert [trace.ending(name) for name in ("search_ended", "finalists", "merged")] == [None] * 3


def test_an_old_comparison_is_void_though_the_resumed_search_has_ended(path):
    ended = ("search_ended", {"generations": 2, "ended_by": "evaluations"})
    trace = load_with(path, [*INTERRUPTED, ("resumed", {}), ended])
    assert trace.ending("search_ended")["ended_by"] == "evaluations"
    assert trace.ending("finalists") is None
    again = load_with(path, [("finalists", {"winner": "new"})])
    assert again.ending("finalists")["winner"] == "new"


def test_an_interrupt_in_the_finalists_leaves_the_end_of_the_search(path):
    searched, *rest = END
    trace = load_with(path, [searched, ("interrupt", {"phase": "finalists"}), *rest, ("resumed", {})])
    assert trace.ending("search_ended")["generations"] == 2
    assert trace.ending("finalists") is None


def test_an_end_is_void_once_generations_follow(path):
    with TraceWriter(path, n_kept_bytes=path.stat().st_size) as trace:
        trace.event("search_ended", generations=2)
        trace.event("finalists", winner="old")
        trace.generation(make_generation(2))
    assert Trace.load(path).last("finalists")["winner"] == "old"
    assert Trace.load(path).ending("finalists") is None


HAPPENINGS = st.sampled_from(
    [
        {"event": "interrupt", "phase": "search"},
        {"event": "interrupt", "phase": "finalists"},
        {"event": "resumed"},
        *({"event": "search_ended", "ended_by": why} for why in ("clock", "interrupt")),
        {"event": "refined"},
        {"event": "finalists"},
        *({"event": "merged", "ended_by": why} for why in ("clock", "interrupt")),
    ]
)


@given(st.lists(HAPPENINGS, max_size=8))
def test_what_stands_of_an_end_is_what_a_resumed_run_would_keep(happenings):
    events = [{**event, "place": place} for place, event in enumerate([*happenings, {"event": "resumed"}])]
    trace = Trace({}, [], events)
    for name in ("search_ended", "refined", "finalists", "merged"):
        assert trace.ending(name) == Record(trace).event(name)


def test_a_generation_of_the_first_version_loads(path):
    line = json.loads(path.read_text().splitlines()[3])
    for name in ("stage", "injected", "prompt_spread", "rungs", "peak_bytes"):
        del line[name]
    damage(path, 4, json.dumps(line))
    read = Trace.load(path).generations[1]
    assert (read.stage, read.injected.shape, read.prompt_spread.shape) == (0, (0, 4), (0,))
    assert read.peak_bytes is None
    (rung,) = read.rungs
    assert rung["candidates"] == [0, 1, 2]
    np.testing.assert_array_equal(rung["losses"], read.losses)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"kind": "gener', "Unterminated string"),
        ("", "Expecting value"),
        ("3", "found a int, expected an object"),
        ('{"kind": "header"}', "kind 'header' is neither"),
        ("{}", "KeyError('kind')"),
        ('{"kind": "generation", "index": 0}', "KeyError('genomes')"),
    ],
)
def test_damage_before_the_last_line_is_named(path, text, expected):
    damage(path, 2, text)
    message = refusal(path)
    assert "trace.jsonl:2: damaged line: " in message
    assert expected in message
    assert "remove this line and all after it" in message


def test_a_generation_that_contradicts_itself_or_its_place_is_named(path):
    generation = json.loads(path.read_text().splitlines()[3])
    damage(path, 4, json.dumps({**generation, "index": 2}))
    assert "trace.jsonl:4: damaged line: ValueError('generation 2, expected 1')" in refusal(path)
    damage(path, 4, json.dumps({**generation, "losses": [1.0]}))
    assert "losses (1,)" in refusal(path)
    damage(path, 4, json.dumps({**generation, "genomes": [[1.0], [1.0, 2.0]]}))
    assert "trace.jsonl:4" in refusal(path)


def test_fields_of_later_versions_are_ignored(path):
    generation = json.loads(path.read_text().splitlines()[3])
    damage(path, 4, json.dumps({**generation, "gradient": [0.5]}))
    assert len(Trace.load(path).generations) == 2


def test_a_newer_schema_is_refused_with_the_way_out(path):
    damage(path, 1, json.dumps({"kind": "header", "schema": SCHEMA + 1}))
    assert f"found schema {SCHEMA + 1}, this version reads up to {SCHEMA}; upgrade" in refusal(path)
    for schema in (0, "1", None):
        damage(path, 1, json.dumps({"kind": "header", "schema": schema}))
        assert f"found schema {schema!r}, expected a number from 1" in refusal(path)


def test_a_file_that_is_no_trace_is_refused(tmp_path, path):
    assert "cannot read the trace: No such file" in refusal(tmp_path / "nowhere")
    assert f"cannot read the trace: Is a directory; give {tmp_path}/trace.jsonl" in refusal(tmp_path)
    for content in (b"", b"\n", b'{"kind": "hea', b'{"a": 1}\n', b"[]\n"):
        (tmp_path / "other").write_bytes(content)
        assert "its first line is no header" in refusal(tmp_path / "other")
    damage(path, 1, "id,input")
    assert "trace.jsonl:1: damaged line" in refusal(path)


def test_a_trace_starts_with_one_header(tmp_path):
    trace = TraceWriter(tmp_path / "t")
    with pytest.raises(ValueError, match="starts with its header, found kind 'event'"):
        trace.event("phase")
    trace.header({})
    with pytest.raises(ValueError, match="has its header already"):
        trace.header({})
    with pytest.raises(ValueError, match=r"may not have fields named \['kind'\]"):
        trace.event("phase", kind="x")
    trace.close()


def test_a_write_that_fails_or_is_interrupted_leaves_whole_lines(tmp_path, monkeypatch):
    trace = TraceWriter(tmp_path / "t")
    trace.header({})
    for failure, expected in (
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        monkeypatch.setattr(os, "fsync", _raiser(failure))
        with pytest.raises(expected) as caught:
            trace.event("lost", words="more than what follows")
        assert expected is KeyboardInterrupt or "t: No space left on device. Free" in str(caught.value)
        monkeypatch.undo()
        trace.event("kept")
    trace.close()
    assert [event["event"] for event in Trace.load(tmp_path / "t").events] == ["kept", "kept"]
    assert len((tmp_path / "t").read_text().splitlines()) == 3


def _raiser(failure):
    def fail(descriptor):
        raise failure

    return fail


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/t: "):
        TraceWriter(tmp_path / "file" / "t")


def test_a_new_writer_starts_a_new_trace(path):
    with TraceWriter(path) as trace:
        trace.header({"config": 2})
    header = {"kind": "header", "schema": SCHEMA, "config": 2}
    assert Trace.load(path) == Trace(header, [], [], path.stat().st_size)


def test_values_json_does_not_know_are_refused_not_dropped(tmp_path):
    with TraceWriter(tmp_path / "t") as trace:
        trace.header({})
        with pytest.raises(TypeError, match="not JSON serializable"):
            trace.event("phase", what=object())
    assert Trace.load(tmp_path / "t").events == []


def test_shapes_of_a_generation_must_agree():
    with pytest.raises(
        ValueError, match=r"generation 0: genomes \(3, 4\), losses \(2,\), per_expert \(3, 2\)"
    ):
        make_generation(losses=np.zeros(2))
    with pytest.raises(ValueError, match=r"per_expert \(3,\) are not"):
        make_generation(per_expert=np.zeros(3))


def test_the_page_on_the_schema_names_every_field():
    page = (Path(__file__).parents[1] / "docs" / "TRACE.md").read_text(encoding="utf-8")
    assert f"schema {SCHEMA}\n" in page.splitlines(keepends=True)[0]
    generation = page.partition("## Generation")[2].partition("## Event")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", generation, re.MULTILINE)) == {"kind", *Generation.__slots__}
