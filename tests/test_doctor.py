"""A dry run on a toy zoo: what it reports, that it writes nothing, and how its forecast compares to a run."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from search import Trace, run_search
from search.base import load_base
from search.config import load_config
from search.diagnosis import PriorFacts, advise
from search.diagnosis_text import describe_diagnosis, diagnosis_document
from search.doctor import examine
from search.errors import InputError
from search.evaluate import PopulationEvaluator
from search.forecast import Cost, fit_cost
from search.passes import Passes
from search.priors import save_prior
from search.setup import load_setup
from search.trial import try_run
from tests.test_merges import save_toy_zoo
from tests.test_priors import make_prior
from tests.test_setup import spoil

ROOT = Path(__file__).parents[1]
DUMMIES = """
base: dummy:tiny
objective: {weak_signal_nats: 0}
adapters:
  - {source: "dummy:tiny/q_proj,v_proj/r8#1", name: one}
  - {source: "dummy:tiny/q_proj,v_proj/r8#2", name: two}
"""
QUICK = (
    *("device=cpu", "prompts.per_adapter=3", "prompts.unseen_per_adapter=4", "prompts.max_new_tokens=10"),
    "objective.weak_signal_nats=0",  # without skeletons all would be weak
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def configure(zoo):
    return lambda *overrides: load_config(zoo, [*QUICK, *overrides])


@pytest.fixture(scope="module")
def found(zoo):
    """One diagnosis that several tests look at."""
    return examine(load_config(zoo, [*QUICK, "search.max_evaluations=400"]))


def test_it_reports_base_adapters_stages_and_prompts_as_a_run_would_have_them(found, configure):
    parts = load_setup(configure()).parts
    assert found.base.n_parameters == sum(parameter.numel() for parameter in parts.model.parameters())
    assert (found.base.dtype, found.base.device, found.base.device_name) == ("float32", "cpu", None)
    assert [facts.name for facts in found.adapters] == ["expert-0", "expert-1", "expert-2"]
    assert [facts.sha256 for facts in found.adapters] == [adapter.sha256 for adapter in parts.adapters]
    assert [facts.ranks for facts in found.adapters] == [(2, 2), (4, 4), (1, 6)]
    assert [facts.scalings[1] for facts in found.adapters] == pytest.approx([4.0, 2.0, 5.0])
    assert not any(facts.has_skeletons for facts in found.adapters)
    assert all(facts.peak_kl_nats > 0 for facts in found.adapters)
    (stage,) = found.stages
    assert (stage.groups, stage.n_params, stage.optimizer) == ("model", 3, "CMA, full covariance")
    assert found.groups == ("model",)
    assert found.left_out == {}
    assert (found.prompts.searched, found.prompts.unseen) == (3, 4)
    assert 1 < found.prompts.tokens_per_prompt <= 11
    assert found.prompts.tokens_per_candidate == pytest.approx(9 * found.prompts.tokens_per_prompt)
    assert found.prior is None
    assert found.gradient_s is None


def test_adapters_without_skeletons_are_weak_and_what_is_left_out_is_told(configure, zoo, tmp_path):
    found = examine(configure("objective.weak_signal_nats=0.5", spoil(zoo, tmp_path, expert_0=1000)))
    assert [(facts.name, facts.is_weak) for facts in found.adapters] == [
        ("expert-1", True),
        ("expert-2", True),
    ]
    assert found.prompts.n_adapters == 2
    text = describe_diagnosis(found)
    assert f"left out, coefficient 0: expert-0: {found.left_out['expert-0']}" in text.splitlines()
    assert (
        "weak signal, to be kept near the balanced merge: expert-1, expert-2; give them `skeletons:`" in text
    )


def test_seconds_and_memory_are_measured(found):
    times = found.times
    assert min(times.load_s, times.prompts_s, times.signals_s, times.rehearsal_s) > 0
    assert min(times.generation_s, times.finalists_s, times.merge_s, found.candidate_s) > 0
    assert times.search_s == pytest.approx(0.95 * 1200 - 1, abs=60)
    assert 0 < found.memory.peak_bytes < found.memory.expected_bytes < found.memory.available_bytes


def test_on_a_cpu_the_plan_has_the_batches_of_always_and_estimates_what_they_take(found, configure):
    plan, parts = found.memory.plan, load_setup(configure()).parts
    assert not plan.is_measured
    assert plan.base_bytes == 4 * sum(parameter.numel() for parameter in parts.model.parameters())
    assert (plan.scoring.tokens, plan.answers.tokens, plan.choices.tokens) == (1024, 4096, 4096)
    assert plan.gradient is None
    assert 0 < plan.signals_bytes < plan.needed_bytes < plan.usable_bytes < found.memory.available_bytes
    assert "forwards are estimated from the model's shape" in describe_diagnosis(found)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """A diagnosis of random weights on a GPU."""
    dummies = tmp_path_factory.mktemp("dummies") / "dummies.yaml"
    dummies.write_text(DUMMIES)
    small = ("prompts.per_adapter=2", "prompts.unseen_per_adapter=2", "prompts.max_new_tokens=8")
    gradient = "search.gradient={refine_steps: 2}"
    return examine(load_config(dummies, ["device=cuda", gradient, *small]))


@pytest.mark.gpu
def test_on_a_gpu_the_plan_is_measured_and_fits(on_gpu):
    plan = on_gpu.memory.plan
    assert plan.is_measured
    assert plan.gradient.n_bytes > 0
    assert plan.needed_bytes <= plan.usable_bytes < on_gpu.memory.available_bytes
    assert 1 <= plan.scoring.tokens <= 16_384
    assert 1 <= plan.gradient.tokens <= 16_384
    assert 4096 <= plan.answers.tokens <= 65_536
    assert not [line for line in advise(on_gpu) if "GiB" in line]


def test_the_toy_zoo_fits_and_the_report_can_be_shown_and_written(found):
    assert (found.forecast.generations, found.forecast.ended_by) == (25, "evaluations")
    assert advise(found) == ()
    assert "expert-2" in describe_diagnosis(found)
    json.dumps(diagnosis_document(found), allow_nan=False)


def test_nothing_is_written_where_it_is_run_and_nothing_is_left_elsewhere(configure, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    examine(configure())
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "temporary"]


def test_few_prompts_are_written_and_the_configured_numbers_reported(configure, monkeypatch):
    asked = []
    prompts_of = PopulationEvaluator.__init__

    def watched(self, model, stacked, groups, prompts, *rest):
        asked.append(prompts.n_prompts)
        prompts_of(self, model, stacked, groups, prompts, *rest)

    monkeypatch.setattr(PopulationEvaluator, "__init__", watched)
    found = examine(configure("prompts.per_adapter=500", "prompts.unseen_per_adapter=300"))
    assert asked == [6, 3]
    assert found.prompts.tokens_per_candidate == pytest.approx(1500 * found.prompts.tokens_per_prompt)
    assert found.memory.expected_bytes > found.memory.peak_bytes


def test_stages_are_foreseen_as_configured(configure):
    stages = "search.stages=[{share: 1, groups: model}, {share: 3}]"
    found = examine(configure(stages, "search.space=module"))
    n_fine = 3 * len(found.groups)
    assert [(stage.groups, stage.n_params) for stage in found.stages] == [("model", 3), ("module", n_fine)]
    assert found.plan.shares == (1.0, 3.0)


def test_gradient_steps_are_timed_where_there_are_any(configure):
    assert examine(configure("search.gradient.refine_steps=1")).gradient_s > 0
    assert examine(configure("search.gradient.inject_every=2", "search.n_candidates=8")).gradient_s > 0


def test_the_prior_is_named_with_the_adapters_that_it_does_not_know(configure, found, tmp_path):
    known = found.adapters[:2]
    prior = replace(
        make_prior(groups=found.groups),
        names=(*(facts.name for facts in known), "other"),
        hashes=(*(facts.sha256 for facts in known), "1" * 64),
    )
    save_prior(prior, path := tmp_path / "prior.json")
    assert examine(configure(f"search.prior={path}")).prior == PriorFacts(str(path), ("expert-2",))


def test_many_parameters_are_said_to_have_a_diagonal_covariance(configure, monkeypatch):
    monkeypatch.setattr("search.doctor.DIAGONAL_ABOVE", 2)
    assert examine(configure()).stages[0].optimizer == "CMA, diagonal covariance"


def test_another_optimizer_is_named(configure):
    assert examine(configure("search.optimizer=DE")).stages[0].optimizer == "DE"


def watch_timings(monkeypatch):
    """Count what is scored to be timed, and catch what is made of it."""
    scored, timings = [], []
    score_blocks = PopulationEvaluator.score_blocks

    def watched(self, coefficients, blocks):
        scored.append(len(coefficients))
        return score_blocks(self, coefficients, blocks)

    def kept(*measured):
        timings.extend(measured)
        return fit_cost(*measured)

    monkeypatch.setattr(PopulationEvaluator, "score_blocks", watched)
    monkeypatch.setattr("search.trial.fit_cost", kept)
    return scored, timings


def test_one_candidate_and_a_generation_on_one_block_and_on_two_are_timed_three_times(configure, monkeypatch):
    scored, timings = watch_timings(monkeypatch)
    found = examine(configure("search.n_candidates=7", "prompts.unseen_per_adapter=1"))
    assert scored.count(7) == 6
    one, many, more = timings
    assert (one.n_candidates, many.n_candidates, more.n_candidates) == (1, 7, 7)
    assert one.n_tokens == many.n_tokens < more.n_tokens < 9 * found.prompts.tokens_per_prompt
    assert more.n_tokens >= 6 * 2  # two tokens a prompt at least


def test_what_takes_long_is_timed_once(configure, monkeypatch):
    scored, _ = watch_timings(monkeypatch)
    monkeypatch.setattr("search.trial.LONG_S", 1e-9)
    examine(configure("search.n_candidates=7"))
    assert scored.count(7) == 2


def test_weak_adapters_are_marked(configure):
    found = examine(configure("objective.weak_signal_nats=100"))
    assert all(facts.is_weak for facts in found.adapters)
    assert "weak signal" in advise(found)[0]


def test_a_time_box_that_is_gone_before_the_run_is_told(configure):
    found = examine(configure("search.time_box_s=5"), reserve_s=100)
    assert found.times.caller_s == 100
    assert found.times.search_s < 0
    assert "the time box of 5 s is too small" in advise(found)[0]


def test_memory_that_runs_out_on_the_way_is_reported_with_what_fitted(configure, monkeypatch):
    score = Passes.sums

    def greedy(self, objective, logp, prompts):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, objective, logp, prompts)

    monkeypatch.setattr(Passes, "sums", greedy)
    found = examine(configure())
    assert found.memory.tokens_per_forward > 0
    assert f"set search.tokens_per_forward to {found.memory.tokens_per_forward}" in advise(found)[0]


def test_memory_for_not_even_one_prompt_is_one_line(configure, monkeypatch):
    def never_fits(self, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Passes, "sums", never_fits)
    with pytest.raises(
        InputError, match=r"memory ran out before .* \(CUDA out of memory\.\)\. Free the device"
    ) as caught:
        examine(configure())
    assert "\n" not in str(caught.value)


def test_bad_input_is_refused_as_a_run_refuses_it(configure, tmp_path):
    config = configure("search.optimizer=NoSuch")
    with pytest.raises(InputError) as examined:
        examine(config)
    with pytest.raises(InputError) as ran:
        run_search(config, output=tmp_path)
    assert str(examined.value) == str(ran.value)


def test_a_base_that_is_loaded_already_is_used(configure, monkeypatch):
    config = configure()
    base = load_base(config.base.source, device="cpu")
    monkeypatch.setattr("search.setup.load_base", None)
    assert examine(config, base).base.id == config.base.source


@pytest.fixture
def measured(monkeypatch):
    """Replace what was measured by round numbers."""

    def fix(**numbers):
        monkeypatch.setattr(
            "search.doctor.try_run", lambda setup, folder: replace(try_run(setup, folder), **numbers)
        )

    return fix


@pytest.mark.parametrize(("race", "n_scored"), [("null", 16 * 8), ("0.5", 16 * 1 + 8 * 1 + 4 * 2 + 2 * 4)])
def test_a_generation_is_foreseen_as_it_would_be_raced_and_scaled_to_all_prompts(
    configure, measured, race, n_scored
):
    measured(cost=Cost(0.0, 0.0, 0.01))
    found = examine(configure("prompts.per_adapter=8", "search.n_candidates=16", f"search.race_keep={race}"))
    block_tokens = 3 * found.prompts.tokens_per_prompt
    assert found.times.generation_s == pytest.approx(0.01 * n_scored * block_tokens)
    assert found.candidate_s == pytest.approx(0.01 * 8 * block_tokens)
    n_judged = (8 + 2 + 6) + (8 + 2 + 2)  # archive, mean, refined; references; and their agreements
    assert found.times.finalists_s == pytest.approx(0.01 * n_judged * 4 * block_tokens)


def test_every_phase_is_scaled_from_the_few_prompts_to_all(configure, measured):
    measured(prompts_s=3.0, signals_s=6.0, rehearsal_s=0.5, gradient_s=2.0, cost=Cost(0.0, 1.0, 0.0))
    found = examine(
        configure(
            *("prompts.per_adapter=6", "prompts.unseen_per_adapter=9", "search.n_finalists=4"),
            *("search.n_candidates=8", "search.gradient={refine_steps: 3, inject_every: 4, inject_steps: 1}"),
        )
    )
    times = found.times
    assert (times.prompts_s, times.signals_s, times.rehearsal_s) == (15.0, 30.0, 0.5)  # 15 prompts for 3
    assert found.gradient_s == 6.0  # 6 searched for 2
    assert times.generation_s == 8 * 1.0 + 2 * 6.0 / 4  # two gradients every fourth generation
    n_judged = (4 + 2 + 6) + (4 + 2 + 2)  # archive, mean, refined; references; and their agreements
    assert times.finalists_s == 4 * 6.0 + n_judged
    assert times.merge_s == 0.5 + 1.0


@pytest.mark.slow
def test_the_shipped_zoo_has_the_generations_that_a_run_under_the_same_clock_has(tmp_path):
    overrides = ("device=cpu", "search.time_box_s=60", "search.max_evaluations=100000")
    small = ("prompts.unseen_per_adapter=2", "search.n_finalists=2")
    config = load_config(ROOT / "configs/demo.yaml", [*overrides, *small])
    foreseen = examine(config).forecast
    run_search(config, output=tmp_path)
    n_generations = len(Trace.load(tmp_path / "trace.jsonl").generations)
    assert foreseen.ended_by == "clock"
    assert 0.5 <= foreseen.generations / n_generations <= 2


def test_the_toy_zoo_has_the_generations_that_a_run_under_the_same_clock_has(
    configure, tmp_path, monkeypatch
):
    row_sums = Passes.sums

    def slow(self, objective, logp, prompts):  # so that what else the machine does weighs little
        time.sleep(0.003 * len(prompts))
        return row_sums(self, objective, logp, prompts)

    monkeypatch.setattr(Passes, "sums", slow)
    sizes = ("search.n_candidates=6", "search.n_finalists=2", "search.race_keep=0.5")
    config = configure("search.time_box_s=4", "search.max_evaluations=1000000", *sizes)
    foreseen = examine(config).forecast
    run_search(config, output=tmp_path)
    n_generations = len(Trace.load(tmp_path / "trace.jsonl").generations)
    assert foreseen.ended_by == "clock"
    assert 0.5 <= foreseen.generations / n_generations <= 2, (foreseen.generations, n_generations)
