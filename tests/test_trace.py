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

from search.errors import InputError
from search.trace import SCHEMA, Generation, Trace, TraceWriter

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
        "rungs": [{"prompts": 16, "candidates": list(range(n))}],
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
        trace.generation(make_generation(1))
    return path


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
        written = make_generation(index)
        for name in Generation.__slots__:
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name), err_msg=name)


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


def test_a_last_line_cut_anywhere_is_left_out(path, caplog):
    whole = path.read_bytes()
    before_last = whole[:-1].rindex(b"\n") + 1
    for cut in (before_last + 1, before_last + 100, len(whole) - 2):
        path.write_bytes(whole[:cut])
        with caplog.at_level(logging.WARNING):
            assert len(Trace.load(path).generations) == 1
        assert "trace.jsonl:4: the last line was cut off" in caplog.text
    path.write_bytes(whole[:-1])
    assert len(Trace.load(path).generations) == 2
    path.write_bytes(whole + b"\0\0\0")
    assert len(Trace.load(path).generations) == 2
    path.write_bytes(whole + '{"é'.encode()[:-1])
    assert len(Trace.load(path).generations) == 2


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
    for content in (b"", b'{"kind": "hea', b'{"a": 1}\n'):
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
    assert Trace.load(path) == Trace({"kind": "header", "schema": SCHEMA, "config": 2}, [], [])


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
