"""The main job on the embedded zoo: what it writes, repeats and must not read; Ctrl-C in a real process."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llm_merging import main as program

ROOT = Path(__file__).parents[1]
N_QUERIES = 24
SMALL = {"max_evaluations": 16, "n_candidates": 8, "n_finalists": 2, "time_box_s": 600}

WATCHED = """
import json, os, sys
opened = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append(os.fsdecode(arguments[0]))
sys.addaudithook(watch)
import pandas
read_csv = pandas.read_csv
def watched_read_csv(source, *args, **kwargs):
    opened.append(str(source))
    return read_csv(source, *args, **kwargs)
pandas.read_csv = watched_read_csv
sys.path.insert(0, sys.argv[1])
from llm_merging import main
code = main.main(sys.argv[3:])
with open(sys.argv[2], "w") as file:
    json.dump(opened, file)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A working directory with the zoo, a few queries, all targets, and a config for a short search."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "data").mkdir()
    (folder / "data/zoo").symlink_to(ROOT / "data/zoo")
    with (ROOT / "data/test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    with (folder / "data/test.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows[: N_QUERIES + 1])
    (folder / "data/test_targets.csv").write_bytes((ROOT / "data/test_targets.csv").read_bytes())
    config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))
    config["adapters"] = config["adapters"][:4]
    config |= {"search": SMALL, "prompts": {"per_adapter": 1, "unseen_per_adapter": 1}}
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    config["search"] = SMALL | {"max_evaluations": 100_000}
    (folder / "endless.yaml").write_text(yaml.safe_dump(config))
    return folder


def arguments(output, config="small.yaml"):
    return ["--config", config, "--seed", "3", "--output_folder", output]


def coefficients(folder):
    return json.loads((folder / "my_merge/coefficients.json").read_text())["coefficients"]


@pytest.fixture(scope="module")
def watched(job):
    """The main job in a process of its own in which every open() and pandas.read_csv is recorded."""
    command = [sys.executable, "-c", WATCHED, str(ROOT), "opened.json", *arguments("watched")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the tests' own process has it
    done = subprocess.run(command, cwd=job, env=one_thread, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_it_writes_merge_record_and_answers_and_says_what_ended_the_search(job, watched):
    written = {str(path.relative_to(job / "watched")) for path in (job / "watched").rglob("*.*")}
    assert written == {
        "test.csv",
        *(f"my_merge/{name}" for name in ("safetensor.pt", "coefficients.json", "trace.jsonl")),
        *(f"my_merge/adapter/adapter_{name}" for name in ("config.json", "model.safetensors")),
        *(f"my_merge/adapter/{name}" for name in ("README.md", "coefficients.json")),
    }
    assert len((job / "watched/test.csv").read_text().splitlines()) >= N_QUERIES + 1
    assert watched.stdout.splitlines()[-1].endswith(" s, search ended by evaluations")


def test_the_targets_are_never_opened(job, watched):
    opened = json.loads((job / "opened.json").read_text())
    assert any(path.endswith("data/test.csv") for path in opened)
    assert any(path.endswith("trace.jsonl") for path in opened)
    assert not [path for path in opened if "targets" in Path(path).name]


def test_the_same_seed_gives_the_same_merge_and_answers(job, watched, monkeypatch):
    monkeypatch.chdir(job)
    assert program.main(arguments("again")) == 0
    assert coefficients(job / "again") == coefficients(job / "watched")
    assert (job / "again/test.csv").read_bytes() == (job / "watched/test.csv").read_bytes()


def test_started_anywhere_without_pythonpath_ctrl_c_merges_the_best_so_far_answers_and_exits_130(job):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "llm_merging/main.py"), *arguments("stopped", "endless.yaml")]
    trace = job / "stopped/my_merge/trace.jsonl"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=job, env=environment, text=True, **pipes)
    try:
        deadline = time.monotonic() + 240
        while not (trace.exists() and trace.read_text().count('"kind": "generation"') >= 2):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, err[-3000:]
    assert out.splitlines()[-1].endswith("search ended by interrupt")
    assert any(any(row) for row in coefficients(job / "stopped"))
    assert len(list(csv.DictReader((job / "stopped/test.csv").open(newline="")))) == N_QUERIES
    assert (job / "stopped/my_merge/adapter/adapter_model.safetensors").exists()
    assert not list(job.rglob("*.partial"))
