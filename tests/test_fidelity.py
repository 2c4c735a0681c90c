"""The fidelity command: what it wants, what it has, what it writes; no model is run but in the slow test."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fidelity
from benchmarks.fidelity import main
from benchmarks.fidelity_collect import Batch
from benchmarks.fidelity_plan import BATCH, VISITED, Wanted, spread_out
from benchmarks.rows import read_rows
from search.objective import OBJECTIVES
from tests.fidelity_toys import ranking_rows, search_row, shipped_scene

ROOT = Path(__file__).parents[1]
SMALL = "--variants mixed --merges 8 --prompts 1 --evaluations 64 --seeds 0 --device cpu".split()


@pytest.fixture
def wanted():
    return Wanted(n_merges=40, per_adapter=4, evaluations=10_000, seeds=(0, 1))


def test_every_objective_is_searched_in_two_spaces_and_terms_are_added_a_seed_at_a_time(wanted):
    plans = list(wanted.searches())
    assert len(set(plans)) == len(plans) == 2 * (2 * len(OBJECTIVES) + 8)
    assert {plan.seed for plan in plans[: len(plans) // 2]} == {0}
    plain = [plan for plan in plans if not (plan.retention or plan.pull or plan.smooth)]
    assert {(plan.objective, plan.space) for plan in plain} == {
        (objective, space) for objective in OBJECTIVES for space in ("layer", "model")
    }
    assert [(plan.objective, plan.space) for plan in plans[:2]] == [
        ("entropy_excess", "model"),
        ("entropy_excess", "layer"),
    ]


def test_searches_take_no_more_prompts_than_there_are(wanted, tmp_path):
    scene = shipped_scene(tmp_path)
    assert {(job.source, job.per_adapter) for job in wanted.searched_prompts(scene, [0])} == {
        ("skeleton", 4),
        ("generic", 4),
    }
    assert {job.n_prompts for job in wanted.visiting(scene)} == {4}
    assert [job.plan.evaluations for job in wanted.visiting(scene)] == [480] * 6


def test_merges_are_the_base_visited_and_drawn_ones_in_small_batches(wanted, tmp_path_factory):
    scene = shipped_scene(tmp_path_factory.getbasetemp())
    shape = scene.load().parts.shape
    visited = [np.full((n, *shape), float(n)) for n in (3, 30, 31, 32, 33, 34)]
    batches = wanted.batches(scene, visited)
    kinds = [kind for batch in batches for kind in batch.kinds]
    assert (len(kinds), kinds[0], kinds.count(VISITED)) == (41, "base", 12)
    assert max(len(batch.kinds) for batch in batches) == BATCH
    assert all(len(batch.kinds) == len(batch.tables) for batch in batches)
    assert (batches[0].tables[0] == 0).all()
    assert sorted({table[0, 0] for table in batches[0].tables[1:]}) == [3, 30, 31, 32, 33]


def test_what_is_taken_is_spread_over_all_there_is():
    assert spread_out(np.arange(9.0), 3).tolist() == [0, 4, 8]
    assert spread_out(np.arange(2.0), 3).tolist() == [0, 1]


@pytest.fixture
def done(monkeypatch):
    """Lists the jobs by the function that they are for; each is done at once."""
    jobs = {}

    def run(self, function, wanted, stop_at=None):
        for job in wanted:
            jobs.setdefault(function.__name__, []).append(job)
            yield job, results[function.__name__](job)

    def make_rows(job):
        return [
            {**row, "source": job.source} for row in ranking_rows(n_merges=8) if row["source"] == job.source
        ]

    results = {
        "write_scene_prompts": lambda job: None,
        "visited_merges": lambda job: np.zeros((3, 6, 10)),
        "measure_batch": lambda job: Path("arrays.npz"),
        "make_rows": make_rows,
        "long_search": lambda job: {
            k: v for k, v in search_row().items() if k in ("ended_by", "seconds", "curve")
        },
    }
    monkeypatch.setattr(fidelity.DevicePool, "run", run)
    monkeypatch.setattr(
        fidelity.Wanted, "batches", lambda self, scene, visited: [Batch(scene, 1, (), visited[0])]
    )
    monkeypatch.setattr("benchmarks.command.signal.signal", lambda *_: None)
    return jobs


def arguments(tmp_path, *more):
    return [*SMALL, "--out", str(tmp_path / "f.jsonl"), "--arrays", str(tmp_path / "arrays"), *more]


def test_what_is_recorded_is_not_done_again(done, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fidelity, "draw_all", lambda *_: {})
    assert main(arguments(tmp_path)) == 0
    assert {name: len(jobs) for name, jobs in done.items()} == {
        "write_scene_prompts": 6,
        "visited_merges": 2,
        "measure_batch": 1,
        "make_rows": 4,
    }
    done.clear()
    assert main(arguments(tmp_path, "--parts", "rankings", "searches")) == 0
    assert {name: len(jobs) for name, jobs in done.items()} == {"write_scene_prompts": 2, "long_search": 26}
    done.clear()
    assert main(arguments(tmp_path, "--parts", "rankings", "searches")) == 0
    assert done == {}
    assert main(arguments(tmp_path, "--parts", "rankings", "searches", "--examples", "1")) == 0
    assert len(done["long_search"]) == 26
    parts = [row["part"] for row in read_rows(tmp_path / "f.jsonl")]
    assert parts[0] == "environment"
    assert parts.count("environment") == 3
    assert "(n = 1)" in capsys.readouterr().out


def test_a_search_that_time_cut_short_is_done_again(done, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "draw_all", lambda *_: {})
    main(arguments(tmp_path, "--parts", "rankings", "searches"))
    path = tmp_path / "f.jsonl"
    rows = read_rows(path)
    cut = [{**row, "ended_by": "seconds"} if row.get("objective") == "nll" else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in cut))
    done.clear()
    main(arguments(tmp_path, "--parts", "rankings", "searches"))
    assert {job.plan.objective for job in done["long_search"]} == {"nll"}


def test_a_report_of_other_lines_leaves_the_document_alone(done, tmp_path, capsys):
    document = fidelity.DOCUMENT.read_text()
    main(arguments(tmp_path))
    assert main(["--report", "--out", str(tmp_path / "f.jsonl")]) == 0
    assert "| `forward_kl` | 0.90 / 0.90 / 0.90 |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "fidelity.svg",
        "prompts_needed.svg",
        "retention.svg",
    }
    assert fidelity.DOCUMENT.read_text() == document


def test_the_report_of_its_own_lines_goes_into_the_document(done, tmp_path, monkeypatch):
    document = tmp_path / "METHOD.md"
    document.write_text("before\n<!-- fidelity:begin -->\n<!-- fidelity:end -->\nafter\n")
    monkeypatch.setattr(fidelity, "DOCUMENT", document)
    monkeypatch.setattr(fidelity, "OUT", tmp_path / "f.jsonl")
    assert main(arguments(tmp_path, "--parts", "rankings", "searches")) == 0
    assert "| `forward_kl` | 0.90 / 0.90 / 0.90 |" in document.read_text()
    assert (tmp_path / "figures/goodhart.svg").exists()


def test_nothing_to_report_is_one_line(tmp_path, capsys):
    assert main(["--report", "--out", str(tmp_path / "none.jsonl")]) == 2
    assert "nothing measured" in capsys.readouterr().err


def test_the_committed_document_has_a_place_for_the_report():
    text = (ROOT / "docs/METHOD.md").read_text()
    assert text.index("<!-- fidelity:begin -->") < text.index("<!-- fidelity:end -->")


@pytest.mark.slow
def test_a_small_run_measures_ranks_and_searches(tmp_path, capsys):
    small = "--variants mixed --merges 4 --prompts 1 --evaluations 16 --examples 1 --seeds 0".split()
    paths = ["--out", str(tmp_path / "f.jsonl"), "--arrays", str(tmp_path / "arrays")]
    assert (
        main([*small, *paths, "--device", "cpu", "--parts", "rankings", "searches", "--seconds", "40"]) == 0
    )
    rows = read_rows(tmp_path / "f.jsonl")
    assert {row["part"] for row in rows} >= {
        "ranking",
        "prompts_needed",
        "terms",
        "bound",
        "points",
        "search",
    }
    assert "validation questions (uses data)" in capsys.readouterr().out
