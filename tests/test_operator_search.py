"""Runs of pieces and controls: which are wanted, what their lines say, and which are there already."""

import json
import os

import pytest

from benchmarks import job as job_module
from benchmarks.operator_search import (
    format_row,
    identify,
    main,
    parse_arguments,
    plan_jobs,
    was_run,
)
from benchmarks.rows import PERMUTED, WEIGHED, read_rows
from search.config import load_config

FAKE_PIECES = """
import json, sys
shares = dict.fromkeys(("held_in_N", "held_in_R", "worst_task", "held_out"), 0.5)
at = sys.argv.index
out, seed = sys.argv[at("--out") + 1], sys.argv[-1]
if seed == "search.seed=13":
    sys.exit("error: no luck")
search = {"evaluations": 16, "search_s": 1.0, "ended_by": "clock"}
own = {**search, "alone": shares} if "--operator" in sys.argv else {"search": search, "searched": shares}
with open(out, "w") as file:
    json.dump({**shares, **own, "arguments": sys.argv[1:]}, file)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout whose pieces are a stand-in that needs no model."""
    monkeypatch.setattr(job_module, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/pieces.py").write_text(FAKE_PIECES)
    return tmp_path


def arguments_of(*more):
    return parse_arguments(["--variants", "mixed", "--cores", "1", *more])


def test_every_operator_runs_on_every_seed_and_controls_where_asked_for(tmp_path):
    found = plan_jobs(arguments_of("--seeds", "0", "1"), tmp_path)
    assert [(job.method, job.seed) for job in found] == [
        (f"{operator}{WEIGHED}", seed) for operator in ("tsv_m", "regmean") for seed in (0, 1)
    ]
    only = plan_jobs(arguments_of("--operators", "--controls", "--seeds", "2"), tmp_path)
    assert [(job.method, job.operator) for job in only] == [(PERMUTED, None)]
    assert {a.name for a in load_config(only[0].config).adapters} >= {"maths", "sql"}


def test_a_run_is_the_same_only_with_the_same_seconds_queries_and_settings(tmp_path):
    def told(*more):
        wanted = arguments_of("--operators", "--controls", "--seeds", "0", *more)
        return identify(plan_jobs(wanted, tmp_path)[0], wanted)

    first = told()
    row = json.loads(json.dumps({**first, "held_in_N": 1.0}))
    assert was_run(first, [row])
    assert not was_run(first, [{**row, "failure": "no luck"}])
    for other in (
        ("--seconds", "15"),
        ("--queries", "2"),
        ("--permutations", "3"),
        ("--set", "search.race_keep=null"),
    ):
        assert not was_run(told(*other), [row])


def test_lines_are_marked_and_runs_that_are_there_are_not_run_again(root, capsys):
    out = root / "quality.jsonl"
    options = ["--variants", "mixed", "--seeds", "0", "13", "--operators", "tsv_m", "--controls"]
    options += ["--seconds", "7", "--queries", "3", "--permutations", "4", "--set", "search.race_keep=null"]
    options += ["--jobs", "1", "--cores", "1", "--out", str(out)]
    assert main(options) == 1
    rows = {(row["method"], row["seed"]): row for row in read_rows(out)}
    assert rows.keys() == {(f"tsv_m{WEIGHED}", s) for s in (0, 13)} | {(PERMUTED, s) for s in (0, 13)}
    assert all(row["no_option"] and row["limit_s"] == 7 and row["peak_mb"] > 0 for row in rows.values())
    assert "no luck" in rows[PERMUTED, 13]["failure"]
    told = rows[f"tsv_m{WEIGHED}", 0]["arguments"]
    assert told[-3:] == ["--set", "search.race_keep=null", "search.seed=0"]
    assert told[told.index("--seconds") + 1 :][:5] == ["7", "--permutations", "4", "--queries", "3"]
    assert "seconds" not in rows[PERMUTED, 0]  # a process that also measures is no main job
    assert capsys.readouterr().out.count("error: no luck") == 2
    assert main(options) == 1
    assert capsys.readouterr().err.startswith("2 of 4 runs to do")


def test_too_many_cores_are_refused(root, capsys):
    assert main(["--jobs", "1", "--cores", str(len(os.sched_getaffinity(0)) + 1)]) == 2
    assert "do not fit" in capsys.readouterr().err


def test_a_line_for_people_holds_a_merge_against_what_it_came_from():
    shares = {"held_in_N": 0.5, "worst_task": 0.25, "held_out": 1.0}
    facts = {"evaluations": 16, "search_s": 59.6, "ended_by": "clock"}
    row = {"experts": "mixed", "method": "m", "seed": 1, **shares, "searched": shares, "search": facts}
    expected = "N, worst, held-out  50.0  25.0 100.0, searched  50.0  25.0 100.0; 16 evaluations in 60 s"
    assert expected in format_row(row)
