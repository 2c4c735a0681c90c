"""The command `python -m search run`: what it prints, writes and refuses."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from search import __main__ as program
from search.run import run_search
from tests.test_layers import ROOT
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


def test_without_time_for_a_search_the_line_is_json_all_the_same(zoo, capsys):
    assert run(zoo, "--set", *QUICK, "search.time_box_s=0.01") == 0
    outcome = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert (outcome["winner"], outcome["loss"], outcome["ended_by"]) == ("balanced", None, "clock")


def test_it_runs_as_a_module(zoo, here, monkeypatch, capsys):
    command = ["search", "run", str(zoo), "--out", "deep/out", "--set", *QUICK]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.delitem(sys.modules, "search.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("search", run_name="__main__")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["output"] == "deep/out"
    assert (here / "deep/out/adapter/adapter_model.safetensors").exists()


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
        (["run"], "the following arguments are required: CONFIG"),
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


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(zoo, capsys):
    Path("out").mkdir()
    Path("out/trace.jsonl").write_text("precious\n")
    assert "out/trace.jsonl" in refusal(capsys, "run", zoo, "--out", "out")
    assert Path("out/trace.jsonl").read_text() == "precious\n"


def test_a_run_again_changes_nothing_and_another_setting_is_refused_by_name(zoo, capsys):
    assert run(zoo, "--out", "out", "--set", *QUICK) == 0
    before = Path("out/trace.jsonl").read_bytes()
    first = json.loads(capsys.readouterr().out)
    assert run(zoo, "--out", "out", "--set", *QUICK) == 0
    assert json.loads(capsys.readouterr().out) == first
    after = Path("out/trace.jsonl").read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["event"] for line in after[len(before) :].splitlines()] == ["resumed"]
    line = refusal(capsys, "run", zoo, "--out", "out", "--set", *QUICK, "search.seed=5")
    assert "begun with config.search.seed = 0, now it is 5" in line
    assert Path("out/trace.jsonl").read_bytes() == after


@pytest.fixture(scope="module")
def two_runs(zoo, tmp_path_factory):
    """Folders of two finished searches with other seeds; random experts leave a search little to win."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("1", "2"):
        arguments = ["run", str(zoo), "--out", str(folder / seed), "--set", *QUICK, f"search.seed={seed}"]
        assert program.main(arguments) == 0
    return folder


def outcome_of(capsys, *arguments):
    assert program.main([str(argument) for argument in arguments]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_resume_needs_nothing_but_the_folder(two_runs, zoo, here, capsys):
    whole = (two_runs / "1/trace.jsonl").read_bytes().splitlines(keepends=True)
    cut = next(place for place, line in enumerate(whole) if b'"index": 2' in line and b'"generation"' in line)
    (here / "cut").mkdir()
    (here / "cut/trace.jsonl").write_bytes(b"".join(whole[:cut]))
    resumed = outcome_of(capsys, "resume", "cut")
    assert resumed["evaluations"] == 24
    written = [
        here / "cut/adapter/adapter_model.safetensors",
        two_runs / "1/adapter/adapter_model.safetensors",
    ]
    assert len({path.read_bytes() for path in written}) == 1
    assert "no trace" in refusal(capsys, "resume", two_runs) or "cannot read" in refusal(
        capsys, "resume", two_runs
    )


def test_resume_looks_for_weights_where_the_run_began(zoo, here, monkeypatch, capsys):
    shutil.copytree(zoo.parent, here / "there" / "zoo")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "there")
    Path("mine.yaml").write_text("base: zoo/base\nadapters: zoo/adapters\n")
    names = [f"adapters={sorted(str(path) for path in Path('zoo/adapters').iterdir())}"]
    whole = outcome_of(capsys, "run", "mine.yaml", "--out", "out", "--set", *QUICK, *names)
    monkeypatch.chdir(here / "elsewhere")
    assert outcome_of(capsys, "resume", here / "there/out")["loss"] == whole["loss"]


def test_resumed_where_it_began_a_run_has_the_same_coefficients_json(zoo, here, capsys):
    shutil.copytree(zoo.parent, "zoo")
    Path("mine.yaml").write_text("base: zoo/base\nadapters: [zoo/adapters/expert-0, zoo/adapters/expert-1]\n")
    outcome_of(capsys, "run", "mine.yaml", "--out", "out", "--set", *QUICK)
    whole = Path("out/coefficients.json").read_bytes()
    assert b'"id": "zoo/adapters/expert-0"' in whole
    lines = Path("out/trace.jsonl").read_bytes().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if b'"index": 2' in line and b'"generation"' in line)
    Path("out/trace.jsonl").write_bytes(b"".join(lines[:cut]))
    outcome_of(capsys, "resume", "out")
    assert Path("out/coefficients.json").read_bytes() == whole


def test_ctrl_c_while_libraries_are_imported_ends_without_a_traceback(here):
    (here / "pydantic.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-m", "search", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(here)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_an_interrupt_is_survived_when_nobody_reads_stderr(zoo, here):
    command = [sys.executable, "-W", "ignore", "-m", "search", "run", str(zoo), "--out", str(here / "out")]
    settings = ["--set", *QUICK, "search.max_evaluations=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command + settings, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    trace = here / "out/trace.jsonl"
    deadline_s = time.monotonic() + 120
    while b'"index": 2' not in (trace.read_bytes() if trace.exists() else b""):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert json.loads(process.stdout.read())["ended_by"] == "interrupt"
    assert process.wait(30) == 130
    assert (here / "out/adapter/adapter_model.safetensors").exists()


def test_priors_of_two_runs_start_the_next(two_runs, zoo, capsys):
    traces = [Path(f"{seed}.jsonl") for seed in ("1", "2")]
    for trace in traces:
        text = (two_runs / trace.stem / "trace.jsonl").read_text()
        trace.write_text(re.sub(r'"winner": "[^"]*"', '"winner": "archive 1"', text))
    learnt = outcome_of(capsys, "priors", *traces, "-o", "prior.json")
    assert learnt == {"output": "prior.json", "runs": 2, "adapters": 3, "groups": 1}
    outcome_of(capsys, "run", zoo, "--out", "ahead", "--set", *QUICK, "search.prior=prior.json")
    events = [json.loads(line) for line in Path("ahead/trace.jsonl").read_text().splitlines()]
    (references,) = [line for line in events if line.get("event") == "references"]
    assert references["names"] == ["base", "uniform", "balanced", "prior"]
    (began,) = [line for line in events if line.get("event") == "search"]
    assert began["start"] == json.loads(Path("prior.json").read_text())["start"]


def test_merge_writes_what_is_asked_for(two_runs, here, capsys):
    source = two_runs / "1"
    exact = outcome_of(capsys, "merge", source, "-o", "exact")
    cut = outcome_of(capsys, "merge", source / "trace.jsonl", "-o", "cut", "--rank", 1)
    dense = outcome_of(capsys, "merge", source / "coefficients.json", "-o", "dense", "--dense")
    assert exact["relative_error"] is None
    assert 0 < cut["relative_error"] < 1
    assert (cut["rank"], dense["rank"]) == (1, None)
    assert AutoModelForCausalLM.from_pretrained(here / "dense").config.num_hidden_layers == 2
    assert "--dense" in refusal(capsys, "merge", source, "-o", "new", "--dense", "--rank", 2)


def test_doctor_searches_and_writes_nothing(zoo, here, capsys):
    found = outcome_of(capsys, "doctor", zoo, "--set", *QUICK)
    assert list(here.iterdir()) == []
    assert json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("command", ["run", "resume", "priors", "merge", "report", "doctor"])
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main([command, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    example = text.partition("example: python -m search ")[2].split()
    assert program.parse_command(example).command == command


@pytest.mark.parametrize("command", ["report {trace}", "priors {trace}", "bundle {trace}", "merge {trace}"])
def test_an_output_that_would_replace_an_input_is_refused(here, capsys, command):
    trace = here / "trace.jsonl"
    trace.write_text("a night's work")
    assert (
        program.main([*command.format(trace=trace).split(), "-o", f"{here}/../{here.name}/trace.jsonl"]) == 2
    )
    assert "it is read here, and would be replaced. Choose another" in capsys.readouterr().err
    assert trace.read_text() == "a night's work"


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("something was loaded")

    for name in ("search.setup.load_adapters", "search.setup.load_base", "search.report._render_notebook"):
        monkeypatch.setattr(name, load)


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    zoo, capsys, out, nothing_loads
):
    Path("file").write_text("")
    assert f"cannot write to {out}: Not a directory" in refusal(capsys, "run", zoo, "--out", out)


@pytest.mark.parametrize("command", ["merge RUN", "submission RUN", "report TRACE", "priors TRACE", "bundle"])
def test_so_is_one_of_every_other_command(two_runs, capsys, command, nothing_loads):
    Path("file").write_text("")
    words = (
        command.replace("RUN", str(two_runs / "1")).replace("TRACE", str(two_runs / "1/trace.jsonl")).split()
    )
    line = refusal(capsys, *words, "-o", "file/out")
    assert re.search(r"cannot write to file(/out)?: Not a directory. Choose another -o\.", line)
    Path("folder").mkdir()
    makes_file = words[0] in ("report", "priors", "bundle")
    wrong, found = (
        ("folder", "a folder, expected a file") if makes_file else ("file", "a file, expected a folder")
    )
    assert refusal(capsys, *words, "-o", wrong) == f"error: -o {wrong}: is {found}. Choose another -o."


@pytest.mark.parametrize("name", ["base", "adapters/expert-1"])
def test_a_run_is_not_written_among_what_it_reads(zoo, capsys, name, nothing_loads):
    folder = zoo.parent / name
    before = sorted(folder.iterdir())
    line = refusal(capsys, "run", zoo, "--out", folder)
    assert f"{folder}: the base or an adapter is read from there" in line
    assert sorted(folder.iterdir()) == before


def test_nor_is_an_adapter_replaced_that_is_merged(zoo, capsys):
    own = shutil.copytree(zoo.parent / "adapters/expert-1", "out/adapter")
    Path("mine.yaml").write_text(
        f"base: {zoo.parent / 'base'}\nadapters: [{own}, {zoo.parent}/adapters/expert-0]\n"
    )
    assert "out/adapter: the base or an adapter is read" in refusal(
        capsys, "run", "mine.yaml", "--out", "out"
    )
