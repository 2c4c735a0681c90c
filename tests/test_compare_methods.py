"""The comparison of methods: scores of answers, summaries over seeds, a failed job."""

import csv
from pathlib import Path

import pytest

from benchmarks.compare_methods import MEASURES, format_run, run_job, score_answers, summarise_runs

ROOT = Path(__file__).parents[1]
TARGETS = ROOT / "data/test_targets.csv"


def run(method, seed, **measures):
    return {"method": method, "seed": seed, **dict.fromkeys(MEASURES, 0.5), **measures}


def test_summaries_are_by_method_over_its_seeds():
    runs = [run("a", 0, held_in_N=0.8), run("a", 1, held_in_N=0.9), run("b", 0, held_in_N=0.1)]
    summary = summarise_runs(runs)
    assert summary["a"]["held_in_N"] == {"mean": 0.85, "min": 0.8, "max": 0.9}
    assert summary["b"]["held_in_N"] == {"mean": 0.1, "min": 0.1, "max": 0.1}
    assert set(summary["a"]) == set(MEASURES)


def test_a_run_is_one_line_with_shares_in_percent():
    line = format_run(run("my_merge", 3, held_in_N=0.987, seconds=91.4, peak_mb=710, ended_by="clock"))
    assert line.split() == ["my_merge", "3", "98.7", "50.0", "50.0", "50.0", "91", "710", "clock"]


def test_right_answers_are_the_experts_own_level_and_a_lost_task_is_the_worst(tmp_path):
    with TARGETS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lost = next(row["task"] for row in rows if row["held_out"] == "0")
    for wrong, expected in ((None, 1.0), (lost, 0.0)):
        with (tmp_path / "test.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "prediction", "dummy_field"])
            writer.writerows([r["id"], "no" if r["task"] == wrong else r["target"], 0] for r in rows)
        scores = score_answers(tmp_path / "test.csv")
        assert scores["held_out"] == 1.0
        assert scores["worst_task"] == pytest.approx(expected)
        assert scores["held_in_N"] == pytest.approx(1.0 if wrong is None else 0.9)


def test_a_job_that_fails_is_told_with_what_it_printed(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)exited with 2.*error: .*none\.yaml"):
        run_job("uniform_average", 0, tmp_path / "none.yaml", tmp_path / "output")
