"""One arm of a study: where a search is looked at, what is told of it, and a whole run."""

import json
from pathlib import Path

import pytest

from benchmarks.arm import (
    SHARES,
    Checkpoints,
    answer_of,
    describe_answers,
    main,
)
from benchmarks.zoo.sets import write_config
from search.config import load_config
from search.trace import Trace
from tests.traces import make_event, make_header

ROOT = Path(__file__).parents[1]
OWN = "### Task: Add.\n### Problem:{problem}\n### Answer:"
OTHER = "### Task: Count.\n### Exercise:{exercise}\n### Result:"
TINY = (
    *("prompts.per_adapter=1", "prompts.unseen_per_adapter=1", "prompts.max_new_tokens=12"),
    *("search.n_candidates=4", "search.max_evaluations=1000000", "search.gradient.refine_steps=2"),
    "device=cpu",
)


def test_the_last_seconds_end_the_search_and_the_others_are_looked_at():
    points = Checkpoints(seconds=(60.0, 15.0, 300.0), tokens=(9, 5), evaluations=(16,))
    assert points.limit_s == 300
    seconds, tokens = [("seconds", 15), ("seconds", 60)], [("n_tokens", 5), ("n_tokens", 9)]
    assert points.looked_at == [*seconds, *tokens, ("evaluations", 16)]
    assert Checkpoints(tokens=(5,)).limit_s is None


def test_answers_are_what_comes_after_the_cue_of_the_skeleton_that_was_used():
    assert answer_of("### Task: Add.\n### Problem: 1 + 1\n### Answer: 2", [OWN]) == "2"
    assert answer_of("### Task: Count.\n### Exercise: 1, 1\n### Result: two", [OWN, OTHER]) == "two"


def test_alike_answers_are_counted_over_all_prompts_of_an_adapter():
    config = load_config(ROOT / "configs/demo.yaml")
    answers = {"sentiment": ["good", "bad", "good", "good"], "sql": ["a", "b"]}
    prompts = [
        {"expert": name, "text": f"### Answer: {answer}"} for name, own in answers.items() for answer in own
    ]
    skeletons = dict.fromkeys(answers, ("{x}### Answer:",)) | {"chat": ()}
    kept = [a.model_copy(update={"skeletons": skeletons.get(a.name, ())}) for a in config.adapters]
    event = make_event("prompts", searched=prompts[:3], unseen=prompts[3:], seconds=1.0)
    trace = Trace(make_header("ab", ["layer.0"]), [], [event])
    found = describe_answers(trace, config.model_copy(update={"adapters": tuple(kept)}))
    assert found["answers_top_share"] == {"sentiment": 0.75, "sql": 0.5}
    assert found["answers_distinct"] == {"sentiment": 2, "sql": 2}


def test_one_arm_from_start_to_measures(tmp_path):
    write_config(tmp_path / "two.yaml", "two", generated=tmp_path, template=ROOT / "configs/demo.yaml")
    out = tmp_path / "measures.json"
    points = ["--seconds", "1", "--evaluations", "4"]
    main([str(tmp_path / "two.yaml"), "--queries", "1", "--out", str(out), *points, "--set", *TINY])
    found = json.loads(out.read_text())
    assert found["ended_by"] == "clock"
    assert found["evaluations"] == 4 * found["generations"]
    assert 0.2 < found["search_s"] < 5
    assert found.keys() >= {"held_in_N", "held_in_R", "worst_task", "tasks", "winner", "answers_top_share"}
    (point,) = found["checkpoints"]
    assert (point["clock"], point["at"], point["evaluations"]) == ("evaluations", 4, 4)
    assert all(point[name].keys() == set(SHARES) for name in ("chosen", "mean", "best"))


@pytest.mark.parametrize("name", ["uniform", "balanced"])
def test_a_merge_without_a_search_is_measured_too(tmp_path, name):
    out = tmp_path / "measures.json"
    main([str(ROOT / "configs/demo.yaml"), "--reference", name, "--queries", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["evaluations"] == 0
    assert 0 <= found["held_in_N"] <= 1.1
