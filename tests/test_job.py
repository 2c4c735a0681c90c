"""Runs of the main job: pinned to cores, scored by hand-made answers, failing without taking others along."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import job as job_module
from benchmarks.job import Job, run_job, run_pinned, score_answers, search_facts, split_cores
from search.errors import InputError
from tests.traces import tiny_trace

TARGETS = "id,task,target,held_out\n1,sum,4,0\n2,sum,7,0\n3,topic,2,0\n4,mix,x,1\n"
SCORES = {"base": {"sum": 0.0, "topic": 0.5}, "experts": {"sum": 1.0, "topic": 1.0}}
FAKE_MAIN = """
import json, os, sys
from pathlib import Path
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if arguments["--seed"] == "13":
    sys.exit("error: no luck")
folder = Path(arguments["--output_folder"])
(folder / arguments["-m"]).mkdir(parents=True)
(folder / "test.csv").write_text("id,prediction,dummy_field\\n1,4,0\\n2,0,0\\n3,2,0\\n4,x,0\\n")
threads = [os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")]
provenance = {"evaluations": len(os.sched_getaffinity(0)), "winner": threads}
(folder / arguments["-m"] / "merge.json").write_text(json.dumps({"provenance": provenance}))
print("done in 3 s, search ended by clock")
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout whose main job is a stand-in that needs no model."""
    monkeypatch.setattr(job_module, "ROOT", tmp_path)
    (tmp_path / "llm_merging").mkdir()
    (tmp_path / "llm_merging/main.py").write_text(FAKE_MAIN)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test_targets.csv").write_text(TARGETS)
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    return tmp_path


def make_job(root: Path, seed: int) -> Job:
    return Job("ours", "two", seed, root / "config.yaml", root / "scores.json", ("sum", "topic"))


def test_cores_are_split_without_overlap_or_refused():
    assert split_cores([3, 1, 0, 2, 9], 2, 2) == [{0, 1}, {2, 3}]
    for n_jobs, n_cores in ((2, 3), (0, 1), (1, 0)):
        with pytest.raises(InputError, match="do not fit on 5 cores"):
            split_cores(range(5), n_jobs, n_cores)


def test_a_run_is_pinned_with_a_thread_a_core_and_without_a_gpu(root):
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    (outcome,) = run_pinned([make_job(root, 0)], [{core}], root, run_job)
    assert outcome.measures["evaluations"] == 1
    assert outcome.measures["winner"] == ["1", "1", ""]
    assert os.sched_getaffinity(0) == before


def test_a_run_is_scored_on_the_tasks_of_its_experts_and_leaves_nothing(root):
    (outcome,) = run_pinned([make_job(root, 0)], [os.sched_getaffinity(0)], root, run_job)
    assert not outcome.failure
    expected = {"held_in_N": 0.75, "held_in_R": 0.75, "worst_task": 0.5, "worst_name": "sum", "held_out": 1.0}
    assert {name: outcome.measures[name] for name in expected} == expected
    assert outcome.measures["ended_by"] == "clock"
    assert 0 <= outcome.measures["seconds"] < 60
    assert outcome.measures["peak_mb"] > 0
    assert not (root / "run-0").exists()


def test_a_run_that_fails_is_told_with_the_end_of_its_log_and_the_others_go_on(root):
    outcomes = list(
        run_pinned([make_job(root, 13), make_job(root, 1)], [os.sched_getaffinity(0)], root, run_job)
    )
    failed = {outcome.job.seed: outcome.failure for outcome in outcomes}
    assert "exited with 1: error: no luck" in failed[13]
    assert failed[1] == ""


def test_answers_that_do_not_fit_the_targets_are_a_failure(root):
    (root / "llm_merging/main.py").write_text(FAKE_MAIN.replace("id,prediction", "id,answer"))
    (outcome,) = run_pinned([make_job(root, 0)], [os.sched_getaffinity(0)], root, run_job)
    assert "no column 'prediction'" in outcome.failure


def test_only_the_named_tasks_count_as_held_in(root):
    answers = root / "answers.csv"
    answers.write_text("id,prediction\n1,4\n2,7\n3,0\n4,y\n")
    found = score_answers(answers, root / "scores.json", ["sum"])
    assert (found["held_in_N"], found["worst_name"], found["held_out"]) == (1.0, "sum", 0.0)
    assert found["tasks"] == {"sum": 1.0, "topic": 0.0, "mix": 0.0}


def test_a_search_tells_its_weights_and_no_search_tells_nothing(tmp_path, monkeypatch):
    assert search_facts(tmp_path, "done in 3 s") == {}
    document = {
        "adapters": [{"name": "a"}, {"name": "b"}],
        "coefficients": [[0.5, -0.1], [0.1, 0.3]],
        "provenance": {"evaluations": 16, "winner": "mean", "seed": 3},
    }
    (tmp_path / "coefficients.json").write_text(json.dumps(document))
    trace = tiny_trace()
    monkeypatch.setattr(job_module.Trace, "load", lambda path: trace)
    (tmp_path / "trace.jsonl").touch()
    assert search_facts(tmp_path, "x\ndone in 86 s, search ended by evaluations\n") == {
        "evaluations": 16,
        "winner": "mean",
        "ended_by": "evaluations",
        "search_s": round(sum(generation.seconds for generation in trace.generations), 1),
        "mean_abs_coefficients": {"a": 0.3, "b": 0.2},
    }
