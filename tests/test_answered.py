"""What the main job records of its answers in the trace."""

import json
from types import SimpleNamespace

import torch

from llm_merging.answered import Account, record_answers
from search.files import sha256_file
from search.trace import Trace, TraceWriter


def make_method(output):
    return SimpleNamespace(output=output, skip_first_choice_token=True, base_model=torch.nn.Linear(1, 1))


def test_answers_are_recorded_behind_all_that_the_trace_holds(tmp_path):
    queries, answers, output = tmp_path / "q.csv", tmp_path / "out/q.csv", tmp_path / "out/my_merge"
    output.mkdir(parents=True)
    queries.write_text("id\n1\n")
    answers.write_text("id,prediction\n1,a\n")
    with TraceWriter(output / "trace.jsonl") as trace:
        trace.header({})
        trace.event("merged", winner="mean")
    before = (output / "trace.jsonl").read_text()
    account = Account([(queries, answers, 1)], cut=2, placeholders=3, seconds=4.0)
    record_answers(make_method(output), account, 5.0)
    after = (output / "trace.jsonl").read_text()
    assert after.startswith(before)
    event = Trace.load(output / "trace.jsonl").events[-1]
    assert json.loads(after.splitlines()[-1]) == event
    assert event.pop("host_peak_bytes") > 10**7
    assert event == {
        "kind": "event",
        "event": "answered",
        "files": [
            {
                "queries": str(queries),
                "queries_sha256": sha256_file(queries),
                "answers": "../q.csv",
                "sha256": sha256_file(answers),
                "rows": 1,
            }
        ],
        "choice_scoring": "kit",
        "cut": 2,
        "placeholders": 3,
        "seconds": 4.0,
        "job_s": 5.0,
        "peak_bytes": None,
    }


def test_a_method_without_a_trace_gets_none(tmp_path):
    record_answers(make_method(tmp_path), Account([], 0, 0, 0.0), 1.0)
    assert not list(tmp_path.iterdir())
