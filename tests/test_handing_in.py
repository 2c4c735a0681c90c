"""The folder that is handed in: what is in it, what it says, and what is refused with nothing written."""

import json
import re
import shutil

import pytest

from search import __main__ as program
from search.bundle import write_bundle
from search.config import load_config
from search.files import sha256_file
from tests.test_verify import change_answers, cut_after
from tests.verifying import RUN, copy_work, edit_json, edit_line, make_work, run_job


@pytest.fixture
def run(finished_work, tmp_path):
    """A copy of a finished run; its folder."""
    return copy_work(finished_work, tmp_path / "there")


@pytest.fixture
def quick(monkeypatch):
    """Bundles that take no time."""
    monkeypatch.setattr("search.handing_in.write_bundle", lambda *_: "a line\n")


def submit(capsys, run, output, *arguments):
    code = program.main(["submission", str(run), "-o", str(output), *arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else err.splitlines()[-1]


def test_bundle_answers_trace_coefficients_and_readme_are_there_and_verify(
    run, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "submission"
    code, document = submit(capsys, run, output, "--queries-ahead", "7")
    assert code == 0
    names = ["README.md", "MyMerge.py", "queries.csv", "trace.jsonl", "coefficients.json"]
    bundle = (output / "MyMerge.py").read_text()
    lines = len(bundle.splitlines())
    assert document == {"output": str(output), "files": names, "rows": 3, "lines": lines}
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    monkeypatch.chdir(run.parents[1])
    assert bundle == write_bundle(load_config(run.parents[1] / "config.yaml"), None, 7)
    assert sha256_file(output / "queries.csv") == sha256_file(run.parent / "queries.csv")
    for name in ("trace.jsonl", "coefficients.json"):
        assert (output / name).read_bytes() == (run / name).read_bytes()
    (tmp_path / "queries.csv").write_text("id\nanother file where the run's would lie\n")
    assert program.main(["verify", str(output)]) == 0


def test_the_readme_says_how_each_rule_was_kept_from_the_run_itself(run, tmp_path, capsys, quick):
    submit(capsys, run, tmp_path / "submission")
    text = (tmp_path / "submission/README.md").read_text()
    header, *_, answered = map(json.loads, (run / "trace.jsonl").read_text().splitlines())
    rules = dict(re.findall(r"^- \*\*(.+?)\.\*\* (.*)$", text, re.MULTILINE))
    assert list(rules) == [
        "One file",
        "No data",
        "Listed adapters only",
        "Time",
        "Memory",
        "Reproducible",
        "Answers",
    ]
    assert "on 12 prompts that base and experts wrote, 0 of them from skeletons" in rules["No data"]
    assert rules["Listed adapters only"].startswith("3 of 3 that are configured")
    assert rules["Time"].startswith(f"{answered['job_s']:.0f} s from the start")
    assert f"{answered['host_peak_bytes'] / 2**30:.1f} GiB of the host's memory; no GPU" in rules["Memory"]
    assert f"Seed 0; concord {header['versions']['concord']}, python" in rules["Reproducible"]
    assert "How it ended: by evaluations, not by the clock." in rules["Reproducible"]
    assert rules["Answers"].startswith("3 rows, ids as in the queries, none empty; 0 generations were cut")
    for adapter in header["adapters"]:
        assert f"| {adapter['name']} |" in text
        assert adapter["sha256"] in text
    assert "merged by coefficients that a search found without data. The merge that won is" in text
    assert "Adapters whose prompts leave doubt: expert-0, expert-1, expert-2." in text
    assert all(len(line) < 700 for line in text.splitlines())


def test_what_was_not_as_wanted_is_said_too(run, tmp_path, capsys, quick):
    left_out = {"broken": "its update is 9 times as large"}
    edit_line(run, "header", lambda line: line.update(left_out=left_out))
    edit_json(run / "coefficients.json", lambda d: d["provenance"].update(left_out=left_out))
    edit_line(run, "header", lambda line: line.update(prior={"source": "p.json", "sha256": "ab" * 32}))
    late = {"job_s": 4000.0, "cut": 3, "placeholders": 4, "peak_bytes": 2**31, "choice_scoring": "kit"}
    edit_line(run, "answered", lambda line: line.update(late))
    assert submit(capsys, run, tmp_path / "submission")[0] == 0
    text = (tmp_path / "submission/README.md").read_text()
    for said in (
        "left out: broken (its update is 9 times as large).",
        "It started from a prior, learnt from earlier searches (file of sha256 abababababab).",
        "4000 s from the start",
        "BEYOND the hour",
        "At most 2.0 GiB of the GPU's memory in tensors",
        "How it ended: 3 answers cut and 4 not read: another run may end otherwise",
        "3 generations were cut for want of time and 4 queries not read; choices are scored as the kit does.",
    ):
        assert said in text


def test_a_run_that_had_no_time_to_search_says_so(tmp_path, capsys, quick):
    folder = make_work(tmp_path / "here", time_box_s=1.0)
    assert run_job(folder) == 0
    capsys.readouterr()
    assert submit(capsys, folder / RUN, tmp_path / "submission")[0] == 0
    text = (tmp_path / "submission/README.md").read_text()
    assert (
        "merged by coefficients that need no search, without data. The merge that won is `balanced`" in text
    )
    assert "How it ended: no time to search" in text
    assert "Nothing was searched, for want of time, so nothing was compared." in text


REFUSED = {
    "a deleted answer": (
        change_answers(lambda rows: rows[:-1]),
        r"error: answers .*queries\.csv: rows recorded 3, found 2; ids differ: no id third; .*"
        r"See python -m search verify ",
    ),
    "an empty answer": (
        change_answers(lambda rows: [*rows[:-1], ["third", "", "0"]]),
        "1 without a prediction",
    ),
    "other coefficients": (
        lambda run: edit_json(run / "coefficients.json", lambda d: d["coefficients"][0].reverse()),
        r"error: coefficients: coefficients\.json, model of expert-0 recorded",
    ),
    "no answers at all": (
        lambda run: cut_after(run, "merged"),
        "the run answered no queries. Run python llm",
    ),
    "half a run": (lambda run: cut_after(run, "finalists"), "half a run"),
    "an objective of one's own": (
        lambda run: edit_line(run, "header", own_objective),
        "objective.name: 'mine:loss' is your own code",
    ),
}


def own_objective(line):
    """As the header of such a run has it, the hash excepted, which the record's check is not to see."""
    line["config"]["objective"]["name"] = "mine:loss"


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_be_handed_in_is_refused_and_nothing_is_written(
    run, tmp_path, capsys, monkeypatch, name
):
    spoil, message = REFUSED[name]
    spoil(run)
    if name == "an objective of one's own":
        monkeypatch.setattr("search.handing_in.check_record", lambda record: [])
    before = sorted(tmp_path.rglob("*"))
    code, line = submit(capsys, run, tmp_path / "submission")
    assert code == 2
    assert re.search(message, line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_other_versions_than_the_runs_are_no_reason_not_to_hand_it_in(
    run, tmp_path, capsys, quick, monkeypatch
):
    monkeypatch.setattr("search.verify_record.library_versions", dict)
    assert submit(capsys, run, tmp_path / "submission")[0] == 0


def test_an_earlier_submission_is_replaced_and_anything_else_is_left_alone(run, tmp_path, capsys, quick):
    output = tmp_path / "submission"
    assert submit(capsys, run, output)[0] == 0
    (output / "coefficients.json").write_text("old")
    assert submit(capsys, run, output)[0] == 0
    assert (output / "coefficients.json").read_bytes() == (run / "coefficients.json").read_bytes()
    (output / "notes.txt").write_text("precious")
    assert "holds 'notes.txt', which replacing it would delete" in submit(capsys, run, output)[1]
    (output / "notes.txt").unlink()
    (output / "README.md").write_text("# Mine\n")
    assert "holds 'MyMerge.py'" in submit(capsys, run, output)[1]
    shutil.rmtree(output)
    output.write_text("a file")
    assert "is a file, expected a folder" in submit(capsys, run, output)[1]
    output.unlink()
    output.mkdir()
    assert submit(capsys, run, output)[0] == 0


def test_a_disk_that_is_full_leaves_nothing_half_written(run, tmp_path, capsys, quick, monkeypatch):
    def fill_up(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("search.handing_in.shutil.copyfile", fill_up)
    code, line = submit(capsys, run, tmp_path / "submission")
    assert (code, "No space left on device" in line) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
