"""The quality benchmark: which runs it wants, which it has, and what it writes; no model is run."""

import os
from pathlib import Path

import pytest

from benchmarks import missing, quality
from benchmarks.job import Outcome
from benchmarks.quality import SEEDED, main, parse_arguments, plan_jobs
from benchmarks.rows import read_rows
from llm_merging.merging import METHODS

ROOT = Path(__file__).parents[1]
MEASURES = {
    "held_in_N": 0.9,
    "held_in_R": 0.9,
    "worst_task": 0.8,
    "held_out": 0.7,
    "seconds": 9.0,
    "peak_mb": 600,
}
ARGUMENTS = "--methods my_merge uniform_average --variants mixed --sets two --seeds 0 1 --cores 1".split()


@pytest.fixture
def asked(monkeypatch):
    """Lists the jobs that were asked for, each done at once; those put into `failing` fail."""
    jobs, failing = [], set()

    def run_pinned(wanted, core_sets, folder, run):
        for job in wanted:
            assert job.config.exists()
            jobs.append((job.method, job.experts, job.seed))
            failure = "exited with 1: no luck" if jobs[-1] in failing else ""
            yield Outcome(job, MEASURES, failure)

    monkeypatch.setattr(missing, "run_pinned", run_pinned)
    monkeypatch.setattr("benchmarks.command.signal.signal", lambda *_: None)
    return jobs, failing


def test_seeded_methods_run_once_a_seed_and_others_once(tmp_path):
    jobs = plan_jobs(parse_arguments(ARGUMENTS), tmp_path)
    assert [(job.method, job.experts, job.seed) for job in jobs] == [
        *(("my_merge", "mixed", seed) for seed in (0, 1)),
        ("uniform_average", "mixed", 0),
        ("uniform_average", "two", 0),
        *(("my_merge", "two", seed) for seed in (0, 1)),
    ]
    assert jobs[-1].held_in == ("maths", "chat")
    assert jobs[0].scores == ROOT / "data/zoo/scores.json"


def test_every_seeded_method_is_there():
    assert set(METHODS) >= SEEDED
    assert not {"balanced", "uniform_average"} & SEEDED


def test_what_is_recorded_is_not_run_again_and_what_failed_is(asked, tmp_path, capsys):
    jobs, failing = asked
    out = tmp_path / "quality.jsonl"
    failing.add(("my_merge", "two", 1))
    assert main([*ARGUMENTS, "--out", str(out)]) == 1
    assert len(jobs) == 6
    assert "FAILED after 9 s: exited with 1: no luck" in capsys.readouterr().out
    jobs.clear()
    failing.clear()
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    assert jobs == [("my_merge", "two", 1)]
    rows = read_rows(out)
    assert len(rows) == 7
    assert {"commit", "versions", "machine", "cores", "code_sha256", "config_sha256"} < set(rows[0])


def test_other_code_settings_or_cores_are_other_runs(asked, tmp_path, monkeypatch):
    jobs, _ = asked
    arguments = [*ARGUMENTS, "--variants", "mixed", "--sets", "--out", str(tmp_path / "quality.jsonl")]
    changed = tmp_path / "changed.yaml"
    changed.write_text(
        (ROOT / "configs/demo.yaml").read_text().replace("n_candidates: 16", "n_candidates: 8")
    )
    for more in ([], ["--config", str(changed)]):
        jobs.clear()
        assert main([*arguments, *more]) == 0
        assert len(jobs) == 3
    monkeypatch.setattr(quality, "code_hash", lambda: "other")
    jobs.clear()
    assert main(arguments) == 0
    assert len(jobs) == 3


def test_a_report_of_other_lines_leaves_the_document_alone(asked, tmp_path, capsys):
    out = tmp_path / "quality.jsonl"
    document = quality.DOCUMENT.read_text()
    main([*ARGUMENTS, "--out", str(out)])
    capsys.readouterr()
    assert main(["--report", "--out", str(out)]) == 0
    assert "| `my_merge` | 90.0 |" in capsys.readouterr().out
    assert (tmp_path / "quality.svg").exists()
    assert quality.DOCUMENT.read_text() == document


def test_the_report_of_its_own_lines_goes_into_the_document(asked, tmp_path, monkeypatch):
    document = tmp_path / "METHOD.md"
    document.write_text("before\n<!-- quality:begin -->\n<!-- quality:end -->\nafter\n")
    monkeypatch.setattr(quality, "DOCUMENT", document)
    monkeypatch.setattr(quality, "OUT", tmp_path / "quality.jsonl")
    assert main([*ARGUMENTS, "--out", str(quality.OUT)]) == 0
    assert "| `my_merge` | 90.0 |" in document.read_text()
    assert (tmp_path / "figures/quality.svg").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "no run that worked"), ("{}\n{torn", "quality.jsonl:2: no JSON"), (None, "no run that worked")],
)
def test_nothing_to_report_and_damaged_lines_get_one_line(tmp_path, capsys, content, expected):
    out = tmp_path / "quality.jsonl"
    if content is not None:
        out.write_text(content)
    assert main(["--report", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error


def test_more_jobs_than_cores_are_refused(tmp_path, capsys):
    jobs = str(len(os.sched_getaffinity(0)) + 1)
    assert main([*ARGUMENTS, "--jobs", jobs, "--out", str(tmp_path / "q.jsonl")]) == 2
    assert "do not fit" in capsys.readouterr().err


def test_the_committed_document_has_a_place_for_the_report():
    text = (ROOT / "docs/METHOD.md").read_text()
    assert text.index("<!-- quality:begin -->") < text.index("<!-- quality:end -->")
