"""The scorer: a case counted by hand, and files that do not fit together."""

import json
import runpy
import sys

import pytest

from benchmarks.score import main

TARGETS = """id,task,target,held_out
1,sum,4,0
2,sum,7,0
3,topic,2,0
4,topic,0,0
5,mix,None,1
"""
PREDICTIONS = """id,prediction,dummy_field
5,None,0
4,1,0
3, 2 ,0
2,7,0
1,"4
",0
"""
SCORES = {"base": {"sum": 0.5, "topic": 0.0, "mix": 0.25}, "experts": {"sum": 1.0, "topic": 0.8}}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/zoo").mkdir(parents=True)
    (tmp_path / "data/test_targets.csv").write_text(TARGETS)
    (tmp_path / "data/zoo/scores.json").write_text(json.dumps(SCORES))
    (tmp_path / "predictions.csv").write_text(PREDICTIONS)
    return tmp_path


def scored(capsys, *arguments):
    assert main(["predictions.csv", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capsys, *arguments):
    assert main(["predictions.csv", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_the_measures_equal_those_counted_by_hand(files, capsys):
    result = scored(capsys)
    assert result["tasks"] == {
        "sum": {"accuracy": 1.0, "base": 0.5, "expert": 1.0, "N": 1.0, "R": 1.0},
        "topic": {"accuracy": 0.5, "base": 0.0, "expert": 0.8, "N": 0.625, "R": 0.625},
        "mix": {"accuracy": 1.0, "base": 0.25, "expert": None, "N": None, "R": None},
    }
    means = {key: value for key, value in result.items() if key not in ("tasks", "predictions", "n")}
    assert means == {
        "held_in": 0.75,
        "held_out": 1.0,
        "held_in_base": 0.25,
        "held_out_base": 0.25,
        "held_in_N": 0.8125,
        "held_in_R": 0.8125,
    }


def test_the_table_shows_every_task_and_the_unknown_as_a_dash(files, capsys):
    assert main(["predictions.csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["sum", "topic", "mix"]
    assert lines[4].split() == ["mix", "held-out", "1", "100.0", "25.0", "-", "-", "-"]


def test_without_scores_the_accuracies_remain(files, capsys):
    (files / "data/zoo/scores.json").unlink()
    result = scored(capsys)
    assert (result["held_in"], result["held_in_N"], result["held_in_R"]) == (0.75, None, None)


def test_an_expert_equal_to_the_base_leaves_nothing_to_recover(files, capsys):
    (files / "data/zoo/scores.json").write_text(json.dumps({"base": {"sum": 0.5}, "experts": {"sum": 0.5}}))
    assert scored(capsys)["tasks"]["sum"] == {
        "accuracy": 1.0,
        "base": 0.5,
        "expert": 0.5,
        "N": 2.0,
        "R": None,
    }


def test_with_the_queries_accuracy_is_split_by_eval_type(files, capsys):
    rows = [f"{i},x,{'multiple_choice' if i in (3, 4) else 'generation'},\n" for i in range(1, 6)]
    (files / "data/test.csv").write_text("id,input,eval_type,answer_choices\n" + "".join(rows))
    assert scored(capsys)["eval_types"] == {"generation": 1.0, "multiple_choice": 0.5}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "predictions.csv",
            PREDICTIONS.replace("2,7,0\n", ""),
            "lacks 1 ids that data/test_targets.csv has, '2'",
        ),
        ("predictions.csv", PREDICTIONS + "9,a,0\n", "has 1 ids that data/test_targets.csv lacks, '9'"),
        ("predictions.csv", PREDICTIONS + "1,a,0\n", "the id '1' is there twice"),
        ("predictions.csv", "id,answer\n1,a\n", "no column 'prediction'; found id, answer"),
        ("predictions.csv", "", "cannot be read as CSV"),
        ("data/test_targets.csv", TARGETS.replace(",1\n", ",yes\n"), "held_out is 0 or 1"),
        ("data/zoo/scores.json", "{", "cannot be read as JSON"),
    ],
)
def test_files_that_do_not_fit_get_one_clear_line(files, capsys, name, content, expected):
    (files / name).write_text(content)
    assert expected in refusal(capsys)


@pytest.mark.parametrize("option", ["--targets", "--expert-scores", "--queries"])
def test_a_file_asked_for_must_exist(files, capsys, option):
    assert "none.csv: cannot be read" in refusal(capsys, option, "none.csv")


def test_bytes_that_are_not_utf8_are_refused(files, capsys):
    (files / "predictions.csv").write_bytes(b"id,prediction\n1,\xe9\n")
    assert "cannot be read as CSV" in refusal(capsys)


def test_it_runs_as_a_module(files, monkeypatch, capsys):
    rows = "".join(f"{i},x,generation,\n" for i in range(1, 6))
    (files / "queries.csv").write_text("id,input,eval_type,answer_choices\n" + rows)
    paths = {
        "targets": "data/test_targets.csv",
        "expert-scores": "data/zoo/scores.json",
        "queries": "queries.csv",
    }
    options = [f"--{option}={files / path}" for option, path in paths.items()]
    monkeypatch.setattr(sys, "argv", ["score", str(files / "predictions.csv"), *options])
    monkeypatch.delitem(sys.modules, "benchmarks.score")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.score", run_name="__main__")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 5
