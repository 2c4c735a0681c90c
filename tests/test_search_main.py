"""The command `python -m search run`: what it prints, writes and refuses."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from search import __main__ as program
from search.evaluate import PopulationEvaluator
from search.run import run_search
from tests.test_merges import save_toy_zoo
from tests.test_run import QUICK


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return program.main(["run", *map(str, arguments)])


def test_a_run_writes_its_folder_and_one_json_line(zoo, capsys):
    assert run(zoo, "--set", *QUICK, "--set", "search.seed=2") == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    outcome = json.loads(line)
    assert outcome.keys() == {"output", "winner", "loss", "evaluations", "ended_by"}
    assert outcome["output"] == "output/search/config"
    assert (outcome["evaluations"], outcome["ended_by"]) == (24, "evaluations")
    document = json.loads(Path("output/search/config/coefficients.json").read_text())
    assert document["objective"]["loss"] == outcome["loss"]
    assert document["provenance"]["seed"] == 2
    assert "24/24 evaluations, best loss" in err
    assert f"winner: {outcome['winner']}, loss" in err


def test_it_runs_as_a_module(zoo, here, monkeypatch, capsys):
    command = ["search", "run", str(zoo), "--out", "deep/out", "--set", *QUICK]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.delitem(sys.modules, "search.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("search", run_name="__main__")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["output"] == "deep/out"
    assert (here / "deep/out/adapter/adapter_model.safetensors").exists()


def test_an_interrupt_while_searching_exits_130_with_the_best_written(zoo, monkeypatch, capsys):
    def interrupt(self, genomes):
        raise KeyboardInterrupt

    monkeypatch.setattr(PopulationEvaluator, "evaluate", interrupt)
    assert run(zoo, "--out", "out", "--set", *QUICK) == 130
    assert json.loads(capsys.readouterr().out)["ended_by"] == "interrupt"
    assert Path("out/coefficients.json").exists()


def test_an_interrupt_before_that_exits_130_with_one_line(zoo, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run_search", interrupt)
    assert run(zoo) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_the_seconds_since_the_start_are_the_runs_too(zoo, monkeypatch):
    asked = {}

    def watch(config, **options):
        asked.update(options)
        return run_search(config, **options)

    monkeypatch.setattr(program, "run_search", watch)
    run(zoo, "--set", *QUICK)
    assert asked["reserve_s"] > 0


def refusal(capsys, *arguments):
    assert program.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND. See --help."),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "the following arguments are required: config"),
        (["run", "missing.yaml"], "missing.yaml: cannot read the config: No such file or directory"),
        (["run", "ZOO", "--set", "search.sead=1"], "unknown key; did you mean 'seed'?"),
        (["run", "ZOO", "--set", "search.n_candidates=many"], "search.n_candidates=many"),
        (["run", "ZOO", "--set", "search.optimizer=CAM"], "unknown optimizer 'CAM'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(zoo, here, capsys, arguments, message):
    line = refusal(capsys, *(zoo if argument == "ZOO" else argument for argument in arguments))
    assert message in line
    assert not (here / "output").exists()


def test_a_folder_that_holds_a_trace_is_refused_and_left_alone(zoo, capsys):
    Path("out").mkdir()
    Path("out/trace.jsonl").write_text("precious")
    line = refusal(capsys, "run", zoo, "--out", "out")
    assert (
        line == "error: out/trace.jsonl exists: a search was run there. Choose another --out, or delete it."
    )
    assert Path("out/trace.jsonl").read_text() == "precious"


def test_an_output_that_cannot_be_written_is_refused(zoo, capsys):
    Path("file").write_text("")
    assert "cannot write file/out/trace.jsonl" in refusal(capsys, "run", zoo, "--out", "file/out")
