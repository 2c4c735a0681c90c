"""The check on one's own adapters: what it measures, resumes, refuses and tells; toy models."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from benchmarks import own_adapters
from benchmarks.own_adapters import answer_base, identify, label_free_facts, main, plan_alone
from benchmarks.own_question import match_experts, read_question
from benchmarks.own_tables import format_row, loss_of, loss_text
from benchmarks.rows import read_rows
from llm_merging import main as program
from llm_merging.data import COLUMNS, read_queries
from search.config import load_config
from search.trace import TraceWriter
from tests.test_merges import save_toy_zoo

ROOT = Path(__file__).parents[1]
EXPERT_OF = {"add": "expert-0", "expert-1": "expert-1", "pick": "expert-2"}
NAMED = ["--expert", "expert-0=add", "expert-2=pick"]
INPUTS = ("abc", "b-a:\n", "ccab", "2 cab")
CHOICES = ("a", 'it\'s "so"', "b\n")
SETTINGS = {
    "device": "cpu",
    "search": {
        "max_evaluations": 8,
        "n_candidates": 4,
        "n_finalists": 1,
        "time_box_s": 600,
        "race_keep": None,
    },
    "prompts": {"per_adapter": 1, "unseen_per_adapter": 2, "max_new_tokens": 4},
}


def rows_of(task):
    """Query rows of a task."""
    choices = ("multiple_choice", repr(list(CHOICES))) if task == "pick" else ("generation", "")
    return [(f"{task} {text}", text, *choices) for text in INPUTS]


def write_csv(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def run_here(command, log, running, environment):
    """Stands in for a process of its own: the same arguments, the same files."""
    assert environment == os.environ  # the GPU is not hidden
    if command[1] == "-c":
        answer_base(*command[3:])
    else:
        assert program.main(command[2:]) == 0
    return "", {"seconds": 1.0, "peak_mb": 2}, ""


def answer_x(command, log, running, environment):
    """Stands in for a process that answers x to everything."""
    queries = Path(command[command.index("--dataset_filepaths") + 1] if "-m" in command else command[4])
    output = Path(command[-1]) / queries.name if "-m" in command else Path(command[-1])
    output.parent.mkdir()
    write_csv(output, ["id", "prediction"], [(query.id, "x") for query in read_queries(queries)])
    return "", {"seconds": 1.0, "peak_mb": 2}, ""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A toy zoo, queries, and as targets what each expert answers alone; of "both" what the base does."""
    folder = tmp_path_factory.mktemp("given")
    zoo = save_toy_zoo(folder)
    settings = {**yaml.safe_load(zoo.read_text()), **SETTINGS}
    zoo.write_text(yaml.safe_dump(settings))
    targets, queries, answers = [], folder / "own.csv", folder / "answers/own.csv"
    for task, name in {**EXPERT_OF, "both": None}.items():
        write_csv(queries, COLUMNS, rows_of(task))
        if name is None:
            answer_base(str(zoo), str(queries), str(answers))
        else:
            alone = {**settings, "adapters": [f"{settings['adapters']}/{name}"]}
            (folder / "own.yaml").write_text(yaml.safe_dump(alone))
            arguments = ["-m", "uniform_average", "--config", str(folder / "own.yaml")]
            arguments += ["--dataset_filepaths", str(queries), "--output_folder", str(answers.parent)]
            assert program.main(arguments) == 0
        found = pd.read_csv(answers, dtype=str, keep_default_na=False)
        targets += [(i, task, p, int(name is None)) for i, p in found[["id", "prediction"]].values]
    write_csv(folder / "q.csv", COLUMNS, [row for task in (*EXPERT_OF, "both") for row in rows_of(task)])
    write_csv(folder / "t.csv", ["id", "task", "target", "held_out"], reversed(targets))
    return folder


@pytest.fixture
def check(given, tmp_path, monkeypatch):
    """Runs the command on the toy zoo; its runs, in this process, are listed in `check.asked`."""
    asked = []

    def run(command, *more):
        asked.append("base" if "-c" in command else command[3])
        return run_here(command, *more)

    def check(*arguments, out=tmp_path / "out.jsonl"):
        files = ["--queries", str(given / "q.csv"), "--targets", str(given / "t.csv")]
        return main([str(given / "config.yaml"), *files, "--out", str(out), *arguments])

    monkeypatch.setattr(own_adapters, "run_process", run)
    monkeypatch.setattr("benchmarks.command.signal.signal", lambda *_: None)
    check.asked, check.out = asked, tmp_path / "out.jsonl"
    return check


def test_base_experts_and_merges_are_measured_told_and_not_run_again(check, capsys):
    methods = ["--methods", "my_merge", "uniform_average", "--seeds", "0", "1"]
    assert check(*NAMED, *methods) == 0
    rows = {(row["method"], row["seed"]): row for row in read_rows(check.out)}
    searched = [("my_merge", 0), ("my_merge", 1)]
    assert [*rows] == [
        ("base", 0),
        *((f"expert {name}", 0) for name in ("expert-0", "expert-1", "expert-2")),
        *searched,
        ("uniform_average", 0),
    ]
    assert {task: rows[f"expert {name}", 0]["tasks"] for task, name in EXPERT_OF.items()} == {
        task: {task: 1.0} for task in EXPERT_OF
    }
    assert rows["base", 0]["tasks"]["both"] == 1
    for key in searched:
        assert set(rows[key]["agreement"]) == set(EXPERT_OF.values())
        assert rows[key]["loss"] == rows[key]["finalist_losses"][rows[key]["winner"]]
        assert rows[key]["tasks"].keys() == {*EXPERT_OF, "both"}
        held_in = [rows[key]["tasks"][task] for task in EXPERT_OF]
        assert rows[key]["held_in_N"] == pytest.approx(sum(held_in) / 3, abs=1e-4)
        assert rows[key]["held_out"] == rows[key]["tasks"]["both"]
    printed = capsys.readouterr().out
    assert "| base (no option) |" in printed
    assert "| add | expert-0 |" in printed
    assert printed.endswith("3 runs have a loss on unseen prompts; a rank correlation takes 5.\n")
    check.asked.clear()
    assert check(*NAMED, *methods, "--seeds", "1") == 0
    assert not check.asked


def test_a_failed_run_is_told_and_tried_again_alone(given, check, tmp_path, capsys, monkeypatch):
    def run(command, *more):
        check.asked.append("base" if "-c" in command else command[3])
        if failing.isdisjoint(command):
            return answer_x(command, *more)
        return "", {"seconds": 9.0, "peak_mb": 2}, "exited with 2: log\nerror: no luck"

    failing = {"-c", "tsv_m"}
    monkeypatch.setattr(own_adapters, "run_process", run)
    question = read_question(given / "q.csv", given / "t.csv")
    question.targets.assign(target="x").to_csv(tmp_path / "t.csv")
    arguments = ["--targets", str(tmp_path / "t.csv"), *NAMED, "--limit-queries", "2"]
    arguments += ["--methods", "tsv_m", "uniform_average"]
    assert check(*arguments) == 1
    told = capsys.readouterr()
    assert "FAILED after 9 s: error: no luck" in told.out
    assert told.err.endswith("no N without base and experts. The same command goes on.\n")
    assert len(check.asked) == 4  # base and experts, and no merge
    failing.remove("-c")
    check.asked.clear()
    assert check(*arguments) == 1
    assert check.asked == ["base", "tsv_m", "uniform_average"]
    assert "| `uniform_average` |" in capsys.readouterr().out
    failing.clear()
    check.asked.clear()
    assert check(*arguments) == 0
    assert check.asked == ["tsv_m"]
    assert "\n\n0 runs have a loss" in capsys.readouterr().out
    assert read_rows(check.out)[-1]["tasks"].keys() == {*EXPERT_OF, "both"}


def test_changed_targets_and_adapters_are_other_runs(given):
    config = load_config(given / "config.yaml")
    question = read_question(given / "q.csv", given / "t.csv")
    base, alone, *_ = plan_alone(config, question, EXPERT_OF)
    hashes = dict.fromkeys(EXPERT_OF.values(), "a")
    other = replace(question, targets=question.targets.assign(target="x"))
    assert identify(alone, question, hashes) == identify(alone, question, hashes)
    assert identify(alone, question, hashes) != identify(alone, other, hashes)
    assert identify(alone, question, hashes) != identify(alone, question, {**hashes, "expert-0": "b"})
    assert identify(alone, question, hashes) == identify(alone, question, {**hashes, "expert-1": "b"})
    assert (alone.method, alone.tasks, set(base.tasks)) == ("expert expert-0", ("add",), {*EXPERT_OF, "both"})


def test_queries_come_back_as_they_were_written(given, tmp_path):
    question = read_question(given / "q.csv", given / "t.csv")
    assert [*question.targets.index] == [query.id for query in question.queries]
    question.write_queries(tmp_path / "again.csv")
    assert read_queries(tmp_path / "again.csv") == list(question.queries)
    few = question.of_tasks(["pick", "both"]).first(1)
    assert [query.id for query in few.queries] == ["pick abc", "both abc"] == [*few.targets.index]
    assert few.queries[0].answer_choices == CHOICES


BAD = {
    "no expert": ([], {}, "the held-in task 'add' has no expert"),
    "no adapter": (["--expert", "maths=add"], {}, "there is no adapter 'maths', only expert-0, expert-1"),
    "no task": (["--expert", "expert-0=sum"], {}, "there is no held-in task 'sum', only"),
    "no pair": (["--expert", "expert-0"], {}, "Expected NAME=TASK"),
    "two experts": ([*NAMED, "--expert", "expert-1=add"], {}, "the task has the expert 'expert-0' already"),
    "no queries": ([*NAMED, "--queries", "none.csv"], {}, "none.csv: cannot be read"),
    "no targets": ([*NAMED, "--targets", "none.csv"], {}, "none.csv: cannot be read as CSV"),
    "limit": ([*NAMED, "--limit-queries", "0"], {}, "--limit-queries 0"),
    "a row less": (NAMED, {"t.csv": lambda text: text.replace("add abc,", "abc,")}, "t.csv: 2 ids are only"),
    "held_out": (NAMED, {"t.csv": lambda text: text.replace(",1\n", ",yes\n")}, "held_out is 0 or 1"),
    "all held-out": (NAMED, {"t.csv": lambda text: text.replace(",0\n", ",1\n")}, "all tasks are held-out"),
    "too long": (
        NAMED,
        {"q.csv": lambda text: text.replace(",ccab,", f",{'a' * 5000},")},
        "the model's context",
    ),
}


@pytest.mark.parametrize(("arguments", "changes", "expected"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_before_anything_runs(
    given, check, tmp_path, capsys, arguments, changes, expected
):
    files = {"q.csv": "--queries", "t.csv": "--targets"}
    paths = []
    for name, change in changes.items():
        (tmp_path / name).write_text(change((given / name).read_text()))
        paths += [files[name], str(tmp_path / name)]
    assert check(*paths, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert not check.asked


def test_targets_that_no_expert_meets_are_refused_after_the_experts(check, capsys, monkeypatch):
    monkeypatch.setattr(own_adapters, "run_process", answer_x)
    assert check(*NAMED) == 2
    assert "no expert alone gets a query of its own tasks right" in capsys.readouterr().err
    assert len(read_rows(check.out)) == 4


def test_an_expert_may_have_several_tasks_and_a_name_goes_before_the_same_name():
    names, tasks = ["maths", "chat"], ["sums", "maths", "chat"]
    assert match_experts(["maths=sums"], names, tasks) == {"sums": "maths", "maths": "maths", "chat": "chat"}
    assert match_experts(["maths=sums", "chat=maths"], names, tasks)["maths"] == "chat"


def write_trace(path, prompts="unseen", left_out=()):
    with TraceWriter(path) as trace:
        adapters = [{"name": "maths"}, {"name": "chat"}]
        trace.header({"adapters": adapters, "left_out": dict.fromkeys(left_out), "device_name": "a card"})
        trace.event(
            "finalists",
            prompts=prompts,
            names=["base", "uniform", "mean"],
            losses=[1.0, 0.5, 0.2],
            agreement=[None, [0.0, 0.5], [0.75, 1.0]],
            winner="mean",
        )


def test_a_search_tells_loss_and_agreement_of_its_winner_on_unseen_prompts_alone(tmp_path):
    path = tmp_path / "trace.jsonl"
    assert label_free_facts(path) == {}
    write_trace(path)
    assert label_free_facts(path) == {
        "loss": 0.2,
        "agreement": {"maths": 0.75, "chat": 1.0},
        "finalist_losses": {"base": 1.0, "uniform": 0.5, "mean": 0.2},
        "device_name": "a card",
    }
    write_trace(path, left_out=["broken"])
    assert label_free_facts(path)["finalist_losses"] == {}
    write_trace(path, prompts="searched")
    assert label_free_facts(path) == {}


def merge_line(method, seed, share, **more):
    return {"method": method, "seed": seed, "held_in_N": share, "held_out": None, "seconds": 3.0, **more}


def test_losses_that_rank_as_labels_do_correlate_fully_and_few_not_at_all():
    found = ({"uniform": 0.8, "balanced": 0.7, "expert a": 0.9}, {"uniform": 0.6, "balanced": 0.5})
    searched = [
        merge_line("my_merge", seed, share, loss=loss, finalist_losses=losses)
        for seed, share, loss, losses in zip((0, 1), (0.97, 0.99), (0.2, 0.1), found, strict=True)
    ]
    others = [
        merge_line("uniform_average", 0, 0.4),
        merge_line("balanced", 0, 0.6),
        merge_line("best_single", 0, 0.2, winner="expert a"),
        merge_line("tsv_m", 0, 0.9),
    ]
    merges = [*searched, *others]
    assert [loss_of(row, merges) for row in others] == [pytest.approx(0.7), pytest.approx(0.6), 0.9, None]
    assert "5 runs; 1: the loss ranks as the labels do) with held-in N +1.00, held-out" in loss_text(merges)
    assert "tsv_m" not in loss_text(merges)
    assert loss_text([*searched, *others[:2]]).endswith(
        "4 runs have a loss on unseen prompts; a rank correlation takes 5."
    )


def test_a_line_says_what_is_known_of_a_run():
    line = merge_line("my_merge", 3, 0.984, worst_task=0.9, loss=0.12345)
    assert format_row(line).split() == "my_merge 3 N, worst, held-out 98.4 90.0 -, loss 0.1235, 3 s".split()
    alone = {"method": "base", "seed": 0, "tasks": {"a": 0.5, "b": 0.25}, "seconds": 7.4}
    assert format_row(alone).endswith("accuracy 37.5, mean of 2 tasks, 7 s")


@pytest.mark.slow
def test_in_processes_of_their_own(given, tmp_path):
    out = tmp_path / "out.jsonl"
    files = ["--queries", str(given / "q.csv"), "--targets", str(given / "t.csv"), "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.own_adapters", str(given / "config.yaml"), *files, *NAMED]
    done = subprocess.run(
        [*command, "--methods", "my_merge", "--seeds", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["method"] for row in read_rows(out)][::4] == ["base", "my_merge"]
    assert "| `my_merge` |" in done.stdout
