"""Prompts chosen without knowing what an adapter is for: criteria, pools, runs, and what they write."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from benchmarks import selection, selection_pool
from benchmarks.rows import append_row, read_rows
from benchmarks.selection import ARMS, main, parse_arguments, plan_jobs
from benchmarks.selection_criteria import CRITERIA, Signals, choose
from benchmarks.selection_pool import TEMPLATE, Pool, write_pool
from benchmarks.selection_run import Arm, PoolJob, SelectionJob, keep_prompts, own_share, run_arm
from benchmarks.selection_tables import halfway, selection_text
from benchmarks.zoo.sets import write_config
from search.config import load_config
from search.drafts import Draft, DraftSettings
from search.parts import assemble_parts
from search.population import mixed_weights
from search.setup import load_setup
from search.skeleton import parse_skeleton
from tests.toys import BASE_NAME

ROOT = Path(__file__).parents[1]
SHARES = {"held_in_N": 0.9, "held_in_R": 0.9, "worst_task": 0.8, "held_out": 0.7}
MEASURES = {**SHARES, "search_s": 50.0, "evaluations": 320}
TINY = (
    *("prompts.per_adapter=2", "prompts.unseen_per_adapter=2", "prompts.max_new_tokens=16"),
    *("search.n_candidates=4", "search.max_evaluations=4", "search.gradient.refine_steps=1", "device=cpu"),
)


def signals_of(*questions: tuple[float, float, float]) -> Signals:
    """One expert; each question is (divergence, entropy ratio, nearest)."""
    divergence, ratio, nearest = np.array(questions).T[:, None]
    return Signals(np.ones(divergence.shape, dtype=bool), divergence, ratio, nearest)


CONTRARY = signals_of((9, 0.9, 0.5), (1, 0.0, 2.0), (5, 0.1, 0.1), (6, 0.2, 0.9), (2, 0.5, 0.0))
"""The questions best by: divergence; owned; certain; certain and owned (and certain second); and, if all were
let in, shared."""


@pytest.mark.parametrize(
    ("name", "best"),
    [("divergence", 0), ("owned", 1), ("certain", 2), ("certain and owned", 3), ("shared", 2)],
)
def test_each_criterion_keeps_what_it_is_for(name, best):
    assert choose(CONTRARY, CRITERIA[name], 1).tolist() == [[best]]


@pytest.mark.parametrize("name", ["certain", "certain and owned", "shared"])
def test_only_answers_that_diverge_more_than_the_median_one_count(name):
    assert set(choose(CONTRARY, CRITERIA[name], 3)[0]) == {0, 2, 3}


def test_any_keeps_questions_at_random_and_not_the_same_for_all_experts():
    blind, other = (Signals(np.ones((6, 90), bool), *np.full((3, 6, 90), value)) for value in (0.0, 1.0))
    chosen = choose(blind, CRITERIA["any"], 8)
    assert (chosen == choose(other, CRITERIA["any"], 8)).all()
    assert len({tuple(row) for row in chosen.tolist()}) == 6
    assert len(np.unique(chosen)) > 24  # of 48 drawn


@pytest.mark.parametrize("name", CRITERIA)
def test_unusable_answers_are_kept_last_however_good(name):
    rng = np.random.default_rng(1)
    usable = rng.random((4, 20)) < 0.5
    signals = Signals(usable, *rng.random((3, 4, 20)))
    chosen = choose(signals, CRITERIA[name], 99)
    assert (np.sort(chosen, axis=1) == np.arange(20)).all()
    assert (np.diff(np.take_along_axis(usable, chosen, 1).astype(int)) <= 0).all()


@given(st.sampled_from(["divergence", "certain", "owned", "shared"]), st.integers(0, 999))  # no ties
def test_choice_follows_questions_around_and_knows_order_not_size(name, seed):
    rng = np.random.default_rng(seed)
    values, order = rng.random((3, 3, 11)), rng.permutation(11)
    usable = np.ones((3, 11), dtype=bool)
    chosen = choose(Signals(usable, *values), CRITERIA[name], 4)
    assert (order[choose(Signals(usable, *values[..., order]), CRITERIA[name], 4)] == chosen).all()
    assert (choose(Signals(usable, *np.exp(3 * values)), CRITERIA[name], 4) == chosen).all()


@pytest.fixture
def parts(toy_model, toy_adapters):
    base = SimpleNamespace(model=toy_model("llama"), tokenizer=None, sha256="")
    return assemble_parts(base, toy_adapters("llama"), base_name=BASE_NAME, kind="layer")


def make_drafts(n_experts: int, n_questions: int) -> list[list[Draft]]:
    """Questions of unequal length, each with an answer of its own from every expert."""
    rng, skeleton = np.random.default_rng(0), parse_skeleton(TEMPLATE)
    prompts = [rng.integers(3, 48, 3 + question).tolist() for question in range(n_questions)]
    return [
        [
            Draft(e, skeleton, "", list(prompt), rng.integers(3, 48, 1 + (e + i) % 3).tolist(), f"{e} {i}")
            for i, prompt in enumerate(prompts)
        ]
        for e in range(n_experts)
    ]


def answer_logp(parts, draft: Draft, expert: int | None) -> torch.Tensor:
    """(n_answer, n_vocab) by dense weights, one sequence at a time."""
    table = torch.zeros(parts.shape, dtype=torch.float64)
    if expert is not None:
        table[:, expert] = 1
    weights = mixed_weights(parts.model, parts.stacked, table, parts.groups)
    ids = torch.tensor([[*draft.prompt, *draft.answer]])
    logits = functional_call(parts.model, weights, (), {"input_ids": ids}).logits[0]
    return logits[len(draft.prompt) - 1 : -1].log_softmax(-1)


def js(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean Jensen-Shannon divergence of log-probabilities, by its definition."""
    middle = ((p.exp() + q.exp()) / 2).log()
    return float(sum((x.exp() * (x - middle)).sum(-1).mean() for x in (p, q)) / 2)


def test_signals_are_those_of_single_sequences_in_dense_models(parts, monkeypatch):
    monkeypatch.setattr(selection_pool, "QUESTIONS_TOGETHER", 2)  # and one left over
    drafts = make_drafts(3, 5)
    drafts[1][2].problem = "blank"
    found = selection_pool._measure(parts, drafts)
    assert np.argwhere(~found.usable).tolist() == [[1, 2]]
    for expert, own in enumerate(drafts):
        for question, draft in enumerate(own):
            base, *all_logp = (answer_logp(parts, draft, which) for which in (None, 0, 1, 2))
            mine = all_logp.pop(expert)
            kl = (mine.exp() * (mine - base)).sum(-1).max()
            ratio = (mine.exp() * mine).sum(-1).mean() / (base.exp() * base).sum(-1).mean()
            nearest = min(js(other, mine) for other in all_logp) / max(js(base, mine), 0.02)
            at = expert, question
            expected = [float(kl), float(ratio), nearest]
            values = [found.divergence[at], found.entropy_ratio[at], found.nearest[at]]
            assert values == pytest.approx(expected, rel=1e-4)


def test_kept_prompts_are_ordered_by_expert_and_score_the_answer():
    drafts = make_drafts(2, 3)
    prompts = Pool(drafts, CONTRARY).keep(np.array([[2, 0], [1, 2]]))
    assert prompts.texts == ("0 2", "0 0", "1 1", "1 2")
    assert prompts.expert.tolist() == [0, 0, 1, 1]
    for row, draft in enumerate([drafts[0][2], drafts[0][0], drafts[1][1], drafts[1][2]]):
        assert [prompts.ids[row][t + 1] for t in prompts.scored[row]] == draft.answer


def test_own_share_counts_prompts_that_begin_as_their_experts_skeleton():
    adapters = load_config(ROOT / "configs/demo.yaml").adapters
    task = "### Task: Solve the sum.\n### Problem: 1 plus 1\n### Answer: 2"
    prompts = [{"expert": name, "text": task} for name in ("maths", "sql", "chat", "maths")]
    assert own_share(prompts, adapters) == 0.5
    assert own_share(prompts, [a.model_copy(update={"skeletons": ()}) for a in adapters]) == 0


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.yaml"
    write_config(path, "two", generated=tmp_path, template=ROOT / "configs/demo.yaml")
    return path


@pytest.mark.parametrize(
    ("region", "weak"),
    [("confined", ["maths", "chat"]), pytest.param("free", [], marks=pytest.mark.slow)],
)
def test_a_pool_is_written_kept_and_searched_on(two, region, weak):
    kept = keep_prompts(PoolJob("two", 0, two, TINY, TEMPLATE, 6))
    assert kept.keys() == CRITERIA.keys()
    prompts = kept["certain and owned"]
    assert prompts.expert.tolist() == [0] * 4 + [1] * 4
    assert all(text.startswith("### Task:") and "\n### Answer:" in text for text in prompts.texts)
    arm = Arm("certain and owned", region)
    found = run_arm(SelectionJob(arm, "mixed", 0, two, TINY, 1, prompts))
    assert found["prompt_tokens"] == prompts.split(2)[0].n_tokens
    assert (found["evaluations"], found["weak"]) == (4, weak)
    assert found.keys() >= {"held_in_N", "worst_task", "held_out", "own_task", "tasks"}


def test_each_question_is_there_once_for_every_expert(two):
    setup = load_setup(load_config(two, TINY))
    settings = DraftSettings(temperature=0.0, max_slot_tokens=32, max_new_tokens=4, seed=0)
    pool = write_pool(setup.parts, TEMPLATE, 3, settings)  # without chance the base repeats itself
    assert [len(own) for own in pool.drafts] == [1, 1]
    assert pool.drafts[0][0].text == pool.drafts[1][0].text
    assert [own[0].adapter for own in pool.drafts] == [0, 1]


@pytest.fixture
def asked(monkeypatch):
    """Lists the pools and runs that were asked for, each done at once."""
    pools, runs = [], []

    def keep(job):
        pools.append((job.experts, job.seed))
        return {name: f"{name} of {job.experts} {job.seed}" for name in CRITERIA}

    def run(job):
        assert job.config.exists()
        if job.arm.is_pooled:
            assert job.prompts == f"{job.arm.prompts} of {job.experts} {job.seed}"
        else:
            assert job.prompts is None
        runs.append((job.arm.name, job.experts, job.seed))
        return MEASURES

    monkeypatch.setattr(selection, "keep_prompts", keep)
    monkeypatch.setattr(selection, "run_arm", run)
    monkeypatch.setattr("benchmarks.command.signal.signal", lambda *_: None)
    return pools, runs


SOME = ["--variants", "mixed", "--arms", "uniform merge", "own skeletons", "certain, free", "any, confined"]


def test_one_pool_serves_all_criteria_and_what_is_recorded_is_not_run_again(asked, tmp_path, capsys):
    pools, runs = asked
    out = ["--out", str(tmp_path / "selection.jsonl"), "--set", "device=cpu"]
    assert main([*SOME, "--seeds", "0", *out]) == 0
    assert (pools, len(runs)) == ([("mixed", 0)], 4)
    assert "| certain, free | 90.0 | 80.0 | 70.0 |" in capsys.readouterr().out
    assert main([*SOME, "--seeds", "0", "1", *out]) == 0
    assert (pools[1:], len(runs)) == ([("mixed", 1)], 7)  # the uniform merge once for all seeds
    assert main([*SOME, "--seeds", "0", "1", "--questions", "9", *out]) == 0
    assert (len(pools), len(runs)) == (4, 11)  # other pools, the same skeletons
    rows = read_rows(tmp_path / "selection.jsonl")
    assert rows[-1].keys() > {"method", "region", "commit", "machine", "cores", "code_sha256"}
    assert [row["questions"] for row in rows if row["method"] == "any, confined"] == [900, 900, 9, 9]


def test_configurations_have_skeletons_but_for_free_text(tmp_path):
    jobs = list(plan_jobs(parse_arguments(["--variants", "answer", "--seeds", "0"]), tmp_path))
    assert [job.arm for job in jobs] == list(ARMS)
    for job in jobs:
        has_skeletons = [bool(adapter.skeletons) for adapter in load_config(job.config).adapters]
        assert set(has_skeletons) == {job.arm.prompts != "own free text"}


def test_a_report_of_nothing_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.command.signal.signal", lambda *_: None)
    assert main(["--report", "--out", str(tmp_path / "none.jsonl")]) == 2
    assert "nothing to report" in capsys.readouterr().err


def make_row(method: str, seed: int, share: float, experts: str = "mixed") -> dict[str, object]:
    named = {"method": method, "experts": experts, "seed": seed, "cores": 1}
    pool = {"template": "a{b}c", "questions": 5, "own_task": 0.25} if "," in method else {}
    return {**named, **MEASURES, "held_in_N": share, **pool}


def test_the_report_has_a_table_a_variant_with_means_over_seeds_and_the_last_line_of_each():
    rows = [make_row("certain, free", seed, share) for seed, share in ((0, 0.1), (0, 0.4), (1, 0.6))]
    rows += [make_row("uniform merge", 0, 0.2), make_row("own skeletons", 0, 1.0, "answer")]
    text = selection_text(rows, [arm.name for arm in ARMS], ("mixed", "sequence", "answer"))
    assert "| certain, free | 50.0 (40.0 to 60.0) | 80.0 | 70.0 | 25.0 | 50 | 2 |" in text
    assert text.index("uniform merge") < text.index("certain, free") < text.index("`answer`")
    assert "sequence" not in text
    assert "Pool: 5 questions from the template 'a{b}c'." in text
    assert "Halfway" not in text  # neither variant has both ends


def test_halfway_is_between_the_uniform_merge_and_skeletons():
    rows = [make_row("uniform merge", 0, 0.2), *(make_row("own skeletons", s, 0.9 + s / 10) for s in (0, 1))]
    assert "N 57.5" in halfway(rows)
    assert halfway(rows[:1]) == ""


def test_the_shipped_lines_are_reported_in_their_place(monkeypatch, tmp_path):
    document, out = tmp_path / "METHOD.md", tmp_path / "selection.jsonl"
    document.write_text((ROOT / "docs/METHOD.md").read_text())
    append_row(out, make_row("certain, free", 0, 0.4))
    monkeypatch.setattr(selection, "DOCUMENT", document)
    monkeypatch.setattr(selection, "OUT", out)
    monkeypatch.setattr("benchmarks.command.signal.signal", lambda *_: None)
    assert main(["--report", "--out", str(out)]) == 0
    text = document.read_text()
    assert text.index("<!-- selection:begin -->") < text.index("| certain, free | 40.0 |")
    assert text.count("<!-- studies:end -->") == 1
