"""The studies: which runs they want, which they have, and what they write; no model is run."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import missing, studies
from benchmarks.job import Outcome
from benchmarks.rows import read_rows
from benchmarks.studies import main, parse_arguments, plan_jobs, run_arm
from benchmarks.study_arms import STUDIES
from search.config import load_config

DEMO = Path(__file__).parents[1] / "configs/demo.yaml"
SHARES = {"held_in_N": 0.9, "held_in_R": 0.9, "worst_task": 0.8, "held_out": 0.7}
MEASURES = {**SHARES, "search_s": 50.0, "evaluations": 480, "n_tokens": 440_000, "seconds": 90.0}
FREE = "--study no_skeleton --variants mixed --seeds 0 1 --cores 1".split()
NAMES = ["default", "no skeletons", "uniform merge", "balanced merge", "no skeletons, all free"]
FEW = {*NAMES, "optimizer DE", "optimizer CMA", "prompts an adapter: 8", "temperature 1.0", "no race"}


@pytest.fixture(autouse=True)
def few_arms(monkeypatch):
    """Leaves some arms in each study: planning takes a hundredth of a second an arm."""
    for name, study in list(STUDIES.items()):
        kept = tuple(arm for arm in study.arms if arm.name in FEW)
        monkeypatch.setitem(STUDIES, name, replace(study, arms=kept))


@pytest.fixture
def asked(monkeypatch):
    """Lists the runs that were asked for, each done at once; those put into `failing` fail."""
    runs, failing = [], set()

    def run_pinned(wanted, core_sets, folder, run):
        for job in wanted:
            assert job.config.exists()
            runs.append((job.label, job.seed))
            failed = runs[-1] in failing
            yield Outcome(job, {} if failed else MEASURES, "exited with 1:\nno luck\n" if failed else "")

    monkeypatch.setattr(missing, "run_pinned", run_pinned)
    monkeypatch.setattr("benchmarks.command.signal.signal", lambda *_: None)
    return runs, failing


def plan(tmp_path, *words):
    return plan_jobs(parse_arguments(words), tmp_path)


def test_searches_run_once_a_seed_and_merges_without_one_once(tmp_path):
    jobs = plan(tmp_path, *FREE)
    seeds = {name: [job.seed for job in jobs if job.arm.name == name] for name in NAMES}
    assert seeds == {name: [0] if "merge" in name else [0, 1] for name in NAMES}


def test_some_arms_can_be_asked_for(tmp_path):
    jobs = plan(tmp_path, *FREE, "--arms", "no skeletons", "balanced merge")
    assert [(job.label, job.seed) for job in jobs] == [
        *(("no skeletons", seed) for seed in (0, 1)),
        ("balanced merge", 0),
    ]


def test_arms_that_come_to_the_same_are_run_once_under_all_their_names(tmp_path):
    chosen = plan(tmp_path, *"--study ablation --variants mixed --seeds 0".split())
    every = plan(tmp_path, *"--variants mixed --seeds 0".split())
    (alone,) = [job for job in chosen if job.arm.name == "default"]
    (among,) = [job for job in every if job.label == "default" and "ablation" in job.studies]
    assert alone.names == among.names
    assert {"default", "prompts an adapter: 8", "temperature 1.0"} <= set(alone.names)
    assert len({(job.digest, job.seed) for job in every}) == len(every)


def test_at_equal_tokens_searches_are_longer_and_none_is_shared_with_another_study(tmp_path):
    jobs = plan(tmp_path, *"--study tokens --variants mixed --seeds 0".split())
    assert {load_config(job.config, job.overrides).search.max_evaluations for job in jobs} == {1280}
    assert {job.studies for job in jobs} == {("tokens",)}


def test_seconds_end_the_study_of_searches_and_evaluations_the_others(tmp_path):
    jobs = plan(tmp_path, *"--study search ablation --variants mixed --seeds 0 --seeds 0".split())
    default, timed = ([j for j in jobs if j.label == label] for label in ("default", "default, 300 s"))
    assert (len(default), len(timed)) == (1, 1)
    settings = [load_config(j.config, j.overrides).search for j in (default[0], timed[0])]
    own = load_config(DEMO).search.max_evaluations
    assert [found.max_evaluations for found in settings] == [own, 10**6]
    assert [found.time_box_s for found in settings] == [10**6, 10**6]


def test_settings_of_all_arms_go_over_an_arms_own(tmp_path):
    jobs = plan(tmp_path, *FREE, "--set", "objective.weak_signal_nats=0.25", "search.max_evaluations=32")
    for job in jobs:
        config = load_config(job.config, job.overrides)
        assert (config.objective.weak_signal_nats, config.search.max_evaluations) == (0.25, 32)


def test_changed_skeletons_are_in_the_configuration(tmp_path):
    for job in plan(tmp_path, *FREE):
        has_skeletons = [bool(adapter.skeletons) for adapter in load_config(job.config).adapters]
        assert set(has_skeletons) == {not job.arm.name.startswith("no skeletons")}


def test_what_is_recorded_is_not_run_again_and_what_failed_is(asked, tmp_path, capsys):
    runs, failing = asked
    out = ["--out", str(tmp_path / "studies.jsonl")]
    failing.add(("no skeletons", 1))
    assert main([*FREE, *out]) == 1
    assert len(runs) == 8
    assert "FAILED: no luck" in capsys.readouterr().out
    runs.clear()
    failing.clear()
    assert main([*FREE, *out]) == 0
    assert runs == [("no skeletons", 1)]
    row = read_rows(tmp_path / "studies.jsonl")[0]
    assert {"commit", "versions", "machine", "cores", "code_sha256", "config_sha256", "arms"} < set(row)


def test_other_checkpoints_or_queries_are_other_runs(tmp_path):
    digests = [
        {job.digest for job in plan(tmp_path, *FREE, *more) if not job.arm.reference}
        for more in ((), ("--queries", "3"), ("--tokens", "5"), ("--seconds", "9"))
    ]
    assert len(set.union(*digests)) == sum(map(len, digests))


def test_a_report_of_other_lines_leaves_the_document_alone(asked, tmp_path, capsys):
    document = studies.DOCUMENT.read_text()
    out = ["--out", str(tmp_path / "mine.jsonl")]
    words = [*"--study search --variants mixed --seeds 0 --cores 1".split(), *out]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["--report", *out]) == 0
    assert "| optimizer DE | 90.0 | 80.0 | 70.0 | 50 | 480 | 440,000 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "mine_search.svg").exists()
    assert studies.DOCUMENT.read_text() == document


def test_the_report_of_its_own_lines_goes_into_the_document(asked, tmp_path, monkeypatch):
    document = tmp_path / "METHOD.md"
    document.write_text("before\n<!-- studies:begin -->\n<!-- studies:end -->\nafter\n")
    monkeypatch.setattr(studies, "DOCUMENT", document)
    monkeypatch.setattr(studies, "OUT", tmp_path / "studies.jsonl")
    assert main([*FREE, "--out", str(studies.OUT)]) == 0
    assert "| no skeletons | 90.0 |" in document.read_text()


def test_nothing_to_report_is_told_in_one_line(tmp_path, capsys):
    assert main(["--report", "--out", str(tmp_path / "none.jsonl")]) == 2
    assert "no run that worked" in capsys.readouterr().err


def test_a_wrong_setting_is_told_before_anything_runs(asked, tmp_path, capsys):
    out = tmp_path / "studies.jsonl"
    assert main([*FREE, "--set", "search.speed=9", "--out", str(out)]) == 2
    assert "unknown key" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_gets_its_settings_and_its_measures_come_back(tmp_path, monkeypatch):
    jobs = plan(tmp_path, *FREE, "--seconds", "1", "2", "--tokens", "5", "--queries", "3")
    commands = []

    def run_process(command, log_path, running, environment):
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        commands.append(command)
        Path(command[command.index("--out") + 1]).write_text('{"held_in_N": 0.5}')
        return "", {"seconds": 3.0}, ""

    monkeypatch.setattr(studies, "run_process", run_process)
    job = next(job for job in jobs if job.arm.name == "no skeletons, all free" and job.seed == 1)
    outcome = run_arm(job, tmp_path / "run", set())
    assert outcome.measures == {"held_in_N": 0.5, "seconds": 3.0}
    text = " ".join(commands[0])
    assert "--seconds 1.0 2.0 --tokens 5 --evaluations --queries 3" in text
    assert "search.max_evaluations=1000000 objective.weak_signal_nats=0 search.seed=1" in text
    assert not (tmp_path / "run").exists()


def test_the_committed_document_has_a_place_for_the_report():
    text = studies.DOCUMENT.read_text()
    assert text.index("<!-- studies:begin -->") < text.index("<!-- studies:end -->")
