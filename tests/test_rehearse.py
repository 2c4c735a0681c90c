"""Rehearsals: what is held up and by how much, what is read from a run, what is wrong with it, the table."""

import json
import time
from importlib import import_module

import pytest
import torch

from benchmarks import rehearse, rehearsed_job
from benchmarks.rehearse import (
    judge,
    main,
    make_table,
    read_answers,
    read_timeline,
    run_logged,
    show_timeline,
)
from benchmarks.rehearsed_job import Notes, Slowness
from search.config import load_config
from search.trace import TraceWriter

ROOT = rehearse.ROOT
MARKS = [["imports", 4.0], ["tokenizer", 5.0], ["adapters checked", 5.5], ["base", 9.0], ["tokenizer", 9.0]]
MARKS += [["adapters", 10.0], ["prompts", 12.0], ["signals", 14.0], ["references", 15.0], ["search", 17.0]]
MARKS += [["stage", 17.0], ["stage_ended", 40.0], ["search_ended", 40.0], ["refined", 50.0]]
MARKS += [["finalists", 55.0], ["merged", 56.0], ["saved", 57.0], ["answers", 93.0]]
ROW = {
    "config": "tiny.yaml",
    "box_s": 100.0,
    "slow_down": 2.0,
    "slow_from": ["search"],
    "stall_s": 0.0,
    "exit_code": 0,
    "seconds": 95.0,
    "unused_share": 0.05,
    "timeline": read_timeline(MARKS),
    "peak_gib": 1.5,
    "device": "cpu",
    "ended_by": "clock",
    "evaluations": 64,
    "gradients": 11,
    "reserved_at_end_s": {"later": 36.0},
    "queries": 3,
    "answered": 3,
    "placeholders": 1,
    "verdict": "",
}


def test_phases_end_at_their_marks():
    at = read_timeline(MARKS)
    assert list(at) == [
        *("imports", "tokenizer", "base", "adapters", "prompts", "signals", "references", "rehearsal"),
        *("search", "refine", "finalists", "merge", "fold", "answers"),
    ]
    assert (at["tokenizer"], at["rehearsal"], at["search"], at["fold"]) == (5, 17, 40, 57)
    assert "search         23.00 s, to    40.00 s" in show_timeline(ROW)
    assert read_timeline([]) == {}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, ""),
        ({"unused_share": -0.01}, "1.0 s late"),
        ({"unused_share": 0.02}, "less than 3% unused"),
        ({"unused_share": 0.11}, "more than 10% unused"),
        ({"unused_share": 0.11, "ended_by": "no room"}, ""),
        ({"unused_share": 0.5, "ended_by": "evaluations"}, ""),
        ({"answered": 2}, "1 queries without an answer"),
        ({"exit_code": 1, "answered": 0}, "failed with exit code 1"),
    ],
)
def test_a_run_is_judged_by_its_end_and_its_answers(changed, verdict):
    assert judge({**ROW, **changed}) == verdict


def test_answers_are_counted_with_placeholders(tmp_path):
    queries, answers = tmp_path / "q.csv", tmp_path / "a.csv"
    queries.write_text('id,input\n1,a\n2,"b\nc"\n3,d\n')
    assert read_answers(answers, queries) == {"queries": 3, "answered": 0, "placeholders": 0}
    answers.write_text("id,prediction,dummy_field\n1,unknown,0\n2,x,0\n3,,0\n")
    assert read_answers(answers, queries) == {"queries": 3, "answered": 2, "placeholders": 1}


def test_a_command_is_logged_with_seconds_and_killed_when_it_does_not_end(tmp_path):
    code, seconds = run_logged(["sh", "-c", "echo one; echo two >&2; exit 3"], tmp_path / "log.txt", 5)
    assert code == 3
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["one", "two"]
    code, seconds = run_logged(["sleep", "5"], tmp_path / "log.txt", 0.2)
    assert code < 0
    assert seconds < 4


def test_the_report_goes_between_the_markers_where_there_are_any(tmp_path, capsys):
    out, document = tmp_path / "r.jsonl", tmp_path / "SCALING.md"
    out.write_text(json.dumps(ROW) + "\n")
    rehearse.write_report(out, document)
    document.write_text("no markers")
    rehearse.write_report(out, document)
    assert document.read_text() == "no markers"
    document.write_text("before\n<!-- rehearsals:begin -->\nold\n<!-- rehearsals:end -->\nafter\n")
    rehearse.write_report(out, document)
    text = document.read_text()
    assert make_table([ROW]) in text
    assert "\nold\n" not in text
    assert text.startswith("before\n")
    assert "| tiny.yaml | 100 | 2 from search | 0 | 95.0 | 5.0 % | 10.0 | 7.0 | 23.0 | 15.0 | 36.0 |" in text


def test_bad_input_is_one_line_and_code_2(tmp_path, capsys):
    assert main(["--queries", str(tmp_path / "none.csv"), "--out", str(tmp_path / "r.jsonl")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/none.csv: ")


class Clock:
    """Stands where `time` does: nobody waits, and no other process counts."""

    now_s = 0.0

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


def test_what_is_held_up_takes_longer_once_and_only_from_its_moment(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rehearsed_job, "time", clock)
    slow = Slowness(3.0, ["answers"])

    @slow.hold_up
    def inner():
        clock.sleep(0.02)

    @slow.hold_up
    def outer():
        inner()

    def seconds_of(step):
        started_s = clock.now_s
        step()
        return clock.now_s - started_s

    assert seconds_of(outer) == pytest.approx(0.02)
    slow.reach("search")
    assert slow.now() == 1
    slow.reach("answers")
    assert slow.now() == 3
    assert seconds_of(outer) == pytest.approx(0.06)


def test_a_slow_down_in_the_search_begins_after_half_of_it_and_moments_multiply():
    slow = Slowness(2.0, ["search", "answers"])
    slow.search_begins(left_s=1000.0)
    assert slow.now() == 1
    slow.search_begins(left_s=-1.0)
    assert slow.now() == 2
    slow.reach("answers")
    assert slow.now() == 4


@pytest.fixture
def unchanged(monkeypatch):
    """What a rehearsal changes in the job's modules is put back."""
    merges = import_module("llm_merging.merging.Merges")
    changed = [(merges, "load_base"), (merges.Merges, "_load_tokenizer"), (merges.Merges, "check_adapters")]
    changed += [(merges.Merges, "save_model"), (rehearsed_job.run, "load_setup"), (torch.autograd, "grad")]
    changed += [(rehearsed_job.writing, "_record"), (rehearsed_job.phases.Phases, "_search")]
    changed += [(TraceWriter, "event"), (TraceWriter, "generation")]
    for owner, name in changed:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return merges


def test_the_jobs_forwards_and_gradients_are_held_up_and_its_events_noted(unchanged, tmp_path, capsys):
    slow, notes = Slowness(2.0, ["start"]), Notes(time.monotonic() - 1)
    calls = []
    slow.hold_up = lambda function: (
        lambda *args, **kwargs: (calls.append(function), function(*args, **kwargs))[1]
    )
    rehearsed_job.hold_up_job(slow, notes, stall_s=0.0)
    rehearsed_job.follow_search(slow, notes)
    config = load_config(ROOT / "configs/dummy-tiny.yaml")
    loaded = unchanged.load_base(config.base.source, device="cpu", dtype="float32")
    loaded.model(input_ids=torch.ones(1, 2, dtype=torch.long))
    weight = torch.ones(1, requires_grad=True)
    torch.autograd.grad(weight.sum(), weight)
    assert len(calls) == 2
    with TraceWriter(tmp_path / "trace.jsonl") as trace:
        trace.header({})
        trace.event("prompts", searched=[])
    assert [name for name, _ in notes.marks] == ["base", "prompts"]
    assert notes.marks[0][1] >= 1
    assert notes.peak_bytes() > 1e6
    assert "prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_of_a_small_box_ends_in_time_and_says_what_happened(tmp_path, capsys):
    queries = tmp_path / "few.csv"
    queries.write_text(
        "id,input,eval_type,answer_choices\n1,hello,generation,\n2,x,multiple_choice,\"['a', 'b']\"\n"
    )
    out = tmp_path / "r.jsonl"
    main(["--queries", str(queries), "--time-box", "40", "--out", str(out)])
    row = json.loads(out.read_text())
    assert (row["answered"], row["queries"], row["ended_by"], row["exit_code"]) == (2, 2, "clock", 0)
    assert 0 < row["unused_share"] < 0.2
    assert row["timeline"]["search"] > row["timeline"]["rehearsal"]
    assert (tmp_path / "rehearsals").is_dir()
    assert "dummy-tiny.yaml" in capsys.readouterr().out
