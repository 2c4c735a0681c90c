"""The bundle: one file that runs in the kit without search/, and finds what the unbundled run finds."""

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from search.__main__ import main
from search.bundle import QUERIES_AHEAD, format_literal, write_bundle
from search.config import load_config
from search.errors import InputError
from search.priors import load_prior, save_prior
from search.run import run_search
from search.trace import Trace
from tests.bundling import QUICK, ROOT, make_kit, run_in
from tests.test_merges import save_toy_zoo

PINNED = ("transformers==4.47.1", "peft==0.10.0", "numpy==1.26.4", "safetensors==0.4.5", "accelerate==1.0.1")
PINNED_TORCH = "torch==2.2.2"
PINNED_TOO = ("tokenizers==0.21.0", "huggingface_hub==0.27.1")
"""What transformers 4.47.1 wants; all else, torch among it, is this environment's."""
OLD_KEYS = (
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "bias"),
    *("alpha_pattern", "target_modules", "use_rslora", "use_dora", "init_lora_weights", "inference_mode"),
)
"""Of adapter_config.json, what PEFT 0.10 knows, as it knows the competition's own."""
REPORT = """
import json, sys
for name in ["search", *MISSING]:
    sys.modules[name] = None  # cannot be imported
from llm_merging.merging.MyMerge import MyMerge
method = MyMerge("my_merge")
method.merge()
json.dump(method.coefficients.tolist(), open("found.json", "w"))
assert not method.base_model.training
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def text(zoo):
    return write_bundle(load_config(zoo, QUICK), queries_ahead=2)


def report(missing=()):
    return f"MISSING = {list(missing)}\n{REPORT}"


def test_it_finds_the_coefficients_of_the_unbundled_run_without_search(zoo, text, tmp_path):
    kit = make_kit(tmp_path / "kit", zoo, text)
    done = run_in(kit, "-c", report())
    assert done.returncode == 0, done.stderr
    assert "the search is by nevergrad" in done.stderr
    result = run_search(load_config(zoo, QUICK), output=tmp_path / "out")
    assert np.count_nonzero(result.coefficients) > len(result.coefficients)  # no single expert
    np.testing.assert_array_equal(json.loads((kit / "found.json").read_text()), result.coefficients)
    ours, theirs = Trace.load(kit / "output/my_merge/trace.jsonl"), Trace.load(tmp_path / "out/trace.jsonl")
    assert ours.header["optimizer_library"] == "nevergrad"
    assert len(ours.generations) == len(theirs.generations) > 1
    for one, other in zip(ours.generations, theirs.generations, strict=True):
        for name in ("genomes", "losses", "per_expert", "evaluations", "n_tokens"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for event, name in (("references", "losses"), ("search", "start"), ("refined", "losses")):
        np.testing.assert_array_equal(ours.last(event)[name], theirs.last(event)[name], err_msg=event)
    for name in ("names", "losses", "verdicts", "prompts"):
        assert ours.last("finalists")[name] == theirs.last("finalists")[name]
    assert {"refined", "mean", "archive 1"} <= set(ours.last("finalists")["names"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "library"), [(["nevergrad"], "pycma"), (["nevergrad", "cma"], "built-in")]
)
def test_without_nevergrad_another_optimizer_searches(zoo, text, tmp_path, missing, library):
    kit = make_kit(tmp_path / "kit", zoo, text)
    done = run_in(kit, "-c", report(missing))
    assert done.returncode == 0, done.stderr
    assert f"the search is by {library}" in done.stderr
    header = json.loads((kit / "output/my_merge/trace.jsonl").read_text().splitlines()[0])
    assert header["optimizer_library"] == library


def test_a_library_that_is_missing_is_named_in_one_line(zoo, text, tmp_path):
    kit = make_kit(tmp_path / "kit", zoo, text)
    done = run_in(kit, "-c", report(["peft", "safetensors"]))
    assert done.returncode != 0
    assert "error: MyMerge.py needs" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def folder():
    """A folder that is gone afterwards: libraries take gigabytes."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def install(python, *arguments):
    order = [python, "-m", "pip", "install", "-q", "--no-cache-dir", *arguments]
    if subprocess.run(order).returncode:
        pytest.skip("the pinned libraries cannot be fetched here")


@pytest.fixture(scope="module")
def pinned(folder):
    """Python with the competition's own libraries, but with this environment's torch, nevergrad and cma."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "mixed")], check=True)
    python = folder / "mixed/bin/python"
    install(python, "--no-deps", *PINNED, *PINNED_TOO)
    install(python, "requests")
    rest = Path(np.__file__).parents[1]
    next((folder / "mixed").glob("lib/python*/site-packages")).joinpath("rest.pth").write_text(str(rest))
    return python


@pytest.fixture(scope="module")
def competition(folder):
    """The competition's own environment, Python and torch included; 5 GB."""
    found, named = shutil.which("python3.10"), {**os.environ, "PYENV_VERSION": "3.10"}
    if found is None or subprocess.run([found, "-m", "venv", str(folder / "whole")], env=named).returncode:
        pytest.skip("there is no Python 3.10 here")
    python = folder / "whole/bin/python"
    install(python, *PINNED, PINNED_TORCH)
    return python


@pytest.fixture
def old_zoo(zoo, tmp_path):
    """The toy zoo as the competition's libraries read it."""
    old = tmp_path / "zoo" / "zoo.yaml"
    shutil.copytree(zoo.parent, old.parent)
    for path in old.parent.rglob("adapter_config.json"):
        content = json.loads(path.read_text())
        content["base_model_name_or_path"] = str(old.parent / "base")
        path.write_text(json.dumps({key: content[key] for key in OLD_KEYS if key in content}))
    path = old.parent / "base/tokenizer_config.json"
    content = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(content))
    return old


def find_with(pythons, old_zoo, text, folder, missing=()):
    found = []
    for place, python in enumerate(pythons):
        kit = make_kit(folder / f"kit{place}", old_zoo, text)
        done = run_in(kit, "-c", report(missing), python=python)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((kit / "found.json").read_text()))
    return found


@pytest.mark.slow
@pytest.mark.network
def test_it_finds_the_same_with_the_competitions_libraries(old_zoo, pinned, text, tmp_path):
    new, old = find_with([sys.executable, pinned], old_zoo, text, tmp_path)
    np.testing.assert_allclose(old, new, atol=1e-3)


@pytest.mark.slow
@pytest.mark.network
def test_it_finds_the_same_and_answers_in_the_competitions_environment(old_zoo, competition, text, tmp_path):
    """Which has neither nevergrad nor pycma: the built-in optimiser searches."""
    new, old = find_with([sys.executable, competition], old_zoo, text, tmp_path, ["nevergrad", "cma"])
    np.testing.assert_allclose(old, new, atol=1e-3)
    done = run_in(make_kit(tmp_path / "kit", old_zoo, text), "llm_merging/main.py", python=competition)
    assert done.returncode == 0, done.stderr
    assert "the search is by built-in" in done.stderr
    assert len((tmp_path / "kit/output/test.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_the_kits_main_merges_saves_and_answers_and_does_without_a_trace(zoo, text, tmp_path):
    kit = make_kit(tmp_path / "kit", zoo, text, empty={})
    (kit / "output").mkdir()
    (kit / "output/my_merge").mkdir()
    (kit / "output/my_merge/trace.jsonl").mkdir()  # cannot be written
    done = run_in(kit, "llm_merging/main.py")
    assert done.returncode == 0, done.stderr
    assert "going on" in done.stderr
    assert load_file(kit / "output/my_merge/safetensor.pt")
    with (kit / "output/test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2"]
    assert all(row["prediction"] for row in rows)
    assert list(rows[0]) == ["id", "prediction", "dummy_field"]


def test_the_file_is_plain_and_the_same_each_time(zoo, text):
    assert text == write_bundle(load_config(zoo, QUICK), queries_ahead=2)
    tree = ast.parse(text, feature_version=(3, 10))
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not any(module.split(".")[0] == "search" for module in modules)
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"exec", "eval", "compile", "__import__"}
    assert str(zoo.parent) not in text
    assert "/home" not in text
    assert "base64" not in text


def check_style(folder):
    for command in (["check"], ["format", "--check"]):
        order = ["ruff", *command, "--config", str(ROOT / "pyproject.toml"), str(folder)]
        done = subprocess.run(order, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_it_is_formatted_and_clean(text, tmp_path):
    (tmp_path / "MyMerge.py").write_text(text)
    check_style(tmp_path)


def test_the_default_bundle_is_short(tmp_path, monkeypatch, capsys):
    """Under 3,000 lines; who adds to it, takes from it."""
    monkeypatch.chdir(ROOT)
    assert main(["bundle", "-o", str(tmp_path / "MyMerge.py")]) == 0
    text = (tmp_path / "MyMerge.py").read_text()
    assert json.loads(capsys.readouterr().out)["lines"] == len(text.splitlines()) < 3000
    assert text == write_bundle(load_config(ROOT / "configs/mistral-7b.yaml"))
    assert f'    "queries_ahead": {QUERIES_AHEAD},\n' in text
    check_style(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        ("search.space={groups: part, genome: profile, shared_profile: true}", "search.optimizer=DE"),
        ("search.space={genome: adapter, sign: non_negative, scale: log, top_k: 2}",),
        ("objective={name: excess_and_top1, combine: worst}", "search.gradient.refine_steps=0"),
    ],
)
def test_what_a_configuration_asks_for_is_bundled_too(settings, tmp_path):
    demo, prior = ROOT / "configs/demo.yaml", ROOT / "configs/priors/demo.json"
    (tmp_path / "MyMerge.py").write_text(write_bundle(load_config(demo, settings), prior))
    check_style(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["{groups: part, genome: profile}", "{groups: layer, sign: non_negative}"])
def test_with_another_space_it_finds_the_same(zoo, tmp_path, space):
    config = load_config(zoo, [*QUICK[:-1], f"search.space={space}", "search.gradient.refine_steps=0"])
    kit = make_kit(tmp_path / "kit", zoo, write_bundle(config, queries_ahead=2))
    done = run_in(kit, "-c", report())
    assert done.returncode == 0, done.stderr
    result = run_search(config, output=tmp_path / "out")
    np.testing.assert_array_equal(json.loads((kit / "found.json").read_text()), result.coefficients)


@pytest.mark.slow
def test_with_a_prior_it_finds_the_same(zoo, tmp_path):
    settings = [
        *QUICK,
        "objective.weak_signal_nats=0",
        "search.space=model",
        "search.allow_changed_adapters=true",
    ]
    known = load_prior(ROOT / "configs/priors/demo.json")
    shown = {"names": ("expert-1", "other"), "hashes": ("0", "1"), "runs_of": (1, 1), "groups": ("model",)}
    start, spread = np.array([[0.3, 0.9]]), np.array([[0.05, 0.1]])
    runs = tuple(replace(run, adapters=shown["names"]) for run in known.runs)
    save_prior(replace(known, **shown, start=start, spread=spread, runs=runs), tmp_path / "prior.json")
    kit = make_kit(
        tmp_path / "kit", zoo, write_bundle(load_config(zoo, settings), tmp_path / "prior.json", 2)
    )
    done = run_in(kit, "-c", report())
    assert done.returncode == 0, done.stderr
    run_search(load_config(zoo, [*settings, f"search.prior={tmp_path}/prior.json"]), output=tmp_path / "out")
    ours, theirs = Trace.load(kit / "output/my_merge/trace.jsonl"), Trace.load(tmp_path / "out/trace.jsonl")
    assert ours.last("search")["start"][0][1] == 0.3
    for one, other in zip(ours.generations, theirs.generations, strict=True):
        np.testing.assert_array_equal(one.genomes, other.genomes)
    assert ours.last("finalists")["losses"] == theirs.last("finalists")["losses"]


REFUSED = {
    "objective.name=mine:loss": "not bundled",
    "search.stages=[{groups: model, share: 1}, {groups: layer, share: 1}]": "not bundled",
    "search.gradient.inject_every=3": "not bundled",
    "search.n_candidates=3": "at least 4 candidates",
    "objective.name=top1_disagreement": "has no gradient",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_not_bundled_is_refused_now(setting):
    config = load_config(ROOT / "configs/demo.yaml", [setting])
    with pytest.raises(InputError, match=REFUSED[setting]):
        write_bundle(config)


def test_how_many_answers_follow_is_chosen_when_it_is_bundled(zoo, text):
    assert '    "queries_ahead": 2,\n' in text
    with pytest.raises(InputError, match="--queries-ahead"):
        write_bundle(load_config(zoo, QUICK), queries_ahead=-1)


def test_literals_are_what_they_say():
    value = {"a": [1.5, None, "x" * 300 + "\n'\"é"], "b": {}, "c": [], "d": 'it\'s "so"', "e": True}
    assert ast.literal_eval(format_literal(value)) == value
