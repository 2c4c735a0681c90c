"""What a dry run advises and how it is shown: each line of advice when it is due, and only then."""

import json
from dataclasses import replace

import pytest

from search.diagnosis import (
    AdapterFacts,
    BaseFacts,
    BatchFacts,
    Diagnosis,
    MemoryFacts,
    MemoryPlan,
    PriorFacts,
    PromptFacts,
    StageFacts,
    advise,
)
from search.diagnosis_text import describe_diagnosis, diagnosis_document
from search.forecast import SearchPlan, Timetable, forecast_search

MATHS = AdapterFacts(
    name="maths",
    n_modules=42,
    ranks=(8, 16),
    scalings=(2.0, 2.0),
    sha256="20174221" * 8,
    has_skeletons=True,
    peak_kl_nats=2.19,
    entropy_ratio=0.03,
    weak_reason="",
)
TIMES = Timetable(
    time_box_s=170.0,
    caller_s=0.0,
    load_s=2.0,
    prompts_s=6.0,
    signals_s=5.0,
    rehearsal_s=1.0,
    generation_s=4.0,
    finalists_s=30.0,
    merge_s=1.0,
)


GIB = 2**30
PLAN = MemoryPlan(
    is_measured=True,
    usable_bytes=22 * GIB,
    base_bytes=14 * GIB,
    adapters_bytes=1 * GIB,
    signals_bytes=2 * GIB,
    scoring=BatchFacts(8192, 2 * GIB),
    gradient=BatchFacts(512, 4 * GIB),
    prompts=BatchFacts(16384, 4 * GIB),
    answers=BatchFacts(32768, 7 * GIB),
    choices=BatchFacts(8192, 6 * GIB),
    tokens_asked=None,
)


def diagnosis(*, max_evaluations=320, **changes):
    """Return one in which all is well, but for the changes."""
    times = changes.get("times", TIMES)
    plan = SearchPlan(n_candidates=16, max_evaluations=max_evaluations, shares=(1.0,))
    well = Diagnosis(
        base=BaseFacts(
            id="zoo/base", n_parameters=4_900_000, dtype="float32", device="cpu", device_name=None
        ),
        adapters=(MATHS, replace(MATHS, name="code")),
        left_out={},
        weak_signal_nats=0.5,
        groups=("layer.0", "layer.1"),
        stages=(StageFacts(groups="layer", genome="full", n_params=4, optimizer="CMA, full covariance"),),
        prior=None,
        prompts=PromptFacts(
            n_adapters=2, searched=4, unseen=8, tried_searched=2, tried_unseen=1, tokens_per_prompt=40.0
        ),
        candidate_s=0.3,
        gradient_s=None,
        race_keep=None,
        n_finalists=8,
        times=times,
        plan=plan,
        forecast=forecast_search(times, plan),
        memory=MemoryFacts(
            peak_bytes=600_000_000,
            expected_bytes=700_000_000,
            available_bytes=8_000_000_000,
            tokens_per_forward=None,
            plan=PLAN,
        ),
    )
    return replace(well, **changes)


def only_advice(found):
    (line,) = advise(found)
    return line


def test_where_all_is_well_there_is_no_advice_and_the_text_says_so():
    assert advise(diagnosis()) == ()
    assert describe_diagnosis(diagnosis()).endswith("It fits; nothing to change.")


def test_a_time_box_too_small_for_one_generation_is_told_with_one_that_is_not():
    line = only_advice(diagnosis(times=replace(TIMES, time_box_s=50.0)))
    assert "the time box of 50 s is too small" in line
    least_s, enough_s = TIMES.box_for(1), TIMES.box_for(20)
    assert f"Raise search.time_box_s to at least {least_s} ({enough_s} for 20 generations)" in line
    assert (
        "or lower prompts.per_adapter (4), prompts.unseen_per_adapter (8), search.n_candidates (16)" in line
    )
    assert "search.n_finalists (8)" in line
    assert advise(diagnosis(times=replace(TIMES, time_box_s=float(enough_s) + 1))) == ()


def test_too_few_generations_are_told_with_a_time_box_for_enough():
    line = only_advice(diagnosis(times=replace(TIMES, time_box_s=101.0)))
    assert line.startswith("only 12 generations fit the time box")
    assert f"search.time_box_s to at least {TIMES.box_for(20)}" in line


def test_racing_is_advised_only_where_there_is_none():
    short = replace(TIMES, time_box_s=101.0)
    assert "search.race_keep = 0.5" in only_advice(diagnosis(times=short))
    assert "race_keep" not in only_advice(diagnosis(times=short, race_keep=0.5))


def test_too_small_a_limit_on_evaluations_is_told():
    line = only_advice(diagnosis(max_evaluations=100))
    assert "search.max_evaluations = 100" in line
    assert "raise it to at least 320" in line


def test_memory_that_ran_out_gives_the_batch_that_fitted():
    memory = replace(diagnosis().memory, tokens_per_forward=512)
    assert "set search.tokens_per_forward to 512" in only_advice(diagnosis(memory=memory))


def test_memory_that_will_run_out_is_told_with_what_takes_it():
    line = only_advice(
        diagnosis(
            memory=replace(
                diagnosis().memory, expected_bytes=9_500_000_000, plan=replace(PLAN, is_measured=False)
            )
        )
    )
    assert line.startswith("about 9.5 GB are needed, 8.0 GB are there")
    assert "prompts.per_adapter" in line
    assert "search.tokens_per_forward" in line


def test_a_plan_says_what_each_phase_takes_and_the_most_of_them():
    assert PLAN.search_bytes == PLAN.needed_bytes == 21 * GIB
    assert replace(PLAN, gradient=None).search_bytes == 19 * GIB
    assert replace(PLAN, answers=BatchFacts(65536, 20 * GIB)).needed_bytes == 34 * GIB
    text = describe_diagnosis(diagnosis())
    assert "one gradient          4    512 tokens at a time" in text
    assert "at most               21   of 22.0 that can be used" in text
    assert "forwards are measured" in text


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"usable_bytes": 12 * GIB}, "base and adapters take 15.0. Choose a narrower base.dtype"),
        ({"signals_bytes": 9 * GIB}, "what the experts say takes 9.0. Lower prompts.per_adapter"),
        (
            {"scoring": BatchFacts(65536, 16 * GIB), "tokens_asked": 65536},
            "search.tokens_per_forward is 65536. Leave it out",
        ),
    ],
)
def test_a_plan_that_does_not_fit_names_the_setting(changes, cure):
    memory = replace(diagnosis().memory, plan=replace(PLAN, **changes))
    assert cure in only_advice(diagnosis(memory=memory))


@pytest.mark.parametrize(
    ("has_skeletons", "cure"), [(False, "give them `skeletons:`"), (True, "give them other `skeletons:`")]
)
def test_weak_adapters_are_named_with_a_cure_and_how_little_that_is_judged_by(has_skeletons, cure):
    weak = replace(MATHS, name="chat", weak_reason="free text", has_skeletons=has_skeletons)
    line = only_advice(diagnosis(adapters=(MATHS, weak)))
    assert "chat" in line
    assert "maths" not in line
    assert cure in line
    assert "Measured on 2 prompts each" in line


def test_the_tables_are_aligned_and_show_what_would_run():
    adapters = (MATHS, replace(MATHS, name="a_long_name", ranks=(4, 4), weak_reason="why", peak_kl_nats=0.1))
    text = describe_diagnosis(diagnosis(adapters=adapters, prior=PriorFacts("prior.json", ("maths",))))
    rows = [line for line in text.splitlines() if line.startswith(("adapter", "maths", "a_long_name"))]
    assert len({line.index(word) for line, word in zip(rows, ("modules", "42", "42"), strict=True)}) == 1
    assert "8 to 16" in rows[1]
    assert rows[2].endswith("0.10     0.03     weak: why")
    assert "prior.json: knows 1 of 2 adapters; missing: maths" in text
    assert "4.9 million parameters, float32 on cpu" in text
    assert "40 a prompt, so 320 a candidate" in text
    assert "4 searched and 8 unseen" in text
    assert "CMA, full covariance" in text
    assert "20 generations, 320 evaluations of at most 320, ended by the limit on evaluations" in text
    assert "not raced" in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_what_is_left_out_is_shown_with_its_reason():
    text = describe_diagnosis(diagnosis(left_out={"chess": "its update is zero", "go": "too large"}))
    lines = [line for line in text.splitlines() if line.startswith("left out")]
    assert lines == [
        "left out, coefficient 0: chess: its update is zero",
        "left out, coefficient 0: go: too large",
    ]
    assert "left out" not in describe_diagnosis(diagnosis())


def test_a_search_that_the_clock_ends_is_said_not_to_be_repeatable():
    text = describe_diagnosis(diagnosis(max_evaluations=10_000))
    assert "ended by the clock: then it cannot be repeated exactly" in text


def test_a_search_without_time_is_shown_with_none_left_and_the_one_generation_that_always_runs():
    text = describe_diagnosis(diagnosis(times=replace(TIMES, time_box_s=5.0)))
    assert "of 0.0 s left for it" in text
    assert "about one generation, 16 evaluations" in text


def test_the_document_is_strict_json_with_all_facts_and_the_advice():
    found = diagnosis(
        max_evaluations=100,
        adapters=(replace(MATHS, peak_kl_nats=float("nan")),),
        left_out={"chess": "its update is zero"},
        gradient_s=0.5,
    )
    document = json.loads(json.dumps(diagnosis_document(found), allow_nan=False))
    assert document["adapters"][0]["peak_kl_nats"] is None
    assert document["left_out"] == {"chess": "its update is zero"}
    assert document["advice"] == list(advise(found))
    assert document["forecast"]["generations"] == 6
    assert document["tokens_per_candidate"] == 320
    assert document["search_s"] == pytest.approx(TIMES.search_s)
    assert document["memory"]["expected_bytes"] == 700_000_000
