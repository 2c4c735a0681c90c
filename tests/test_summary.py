"""The report, line by line."""

import numpy as np
import pytest

from search.finalists import Finalist, Judgement
from search.summary import RunFacts, write_summary

NAMES = ("maths", "code")


def facts(*, with_prior=False, **changes):
    zeros = np.zeros((1, 2))
    finalists = [
        Finalist("base", zeros, True),
        Finalist("uniform", zeros, True),
        Finalist("balanced", zeros, True),
        *([Finalist("prior", zeros, True)] if with_prior else []),
        Finalist("expert maths", zeros, True),
        Finalist("archive 2", zeros, False),
    ]
    losses = [1, 0.8, 0.75, *([0.7] if with_prior else []), 0.9, 0.25]
    judgement = Judgement(
        tuple(finalists),
        np.array(losses),
        np.array([[loss, loss] for loss in losses[:-1]] + [[0.125, 0.5]]),
        changes.pop("agreements", {len(losses) - 1: np.array([7 / 8, 1 / 3])}),
        ("beaten",) * (len(losses) - 1) + ("winner",),
    )
    given = {"ended_by": "evaluations", "n_unseen": (8, 3), "left_out": {}, "weak": (), "back_offs": []}
    given["twins"] = ()
    return RunFacts(names=NAMES, judgement=judgement, evaluations=64, generations=8, **{**given, **changes})


def test_the_whole_report():
    assert write_summary(facts()).splitlines() == [
        "winner: archive 2, loss 0.2500 on prompts that the search has not seen "
        "(base 1.0000, uniform 0.8000, balanced 0.7500, expert maths 0.9000)",
        "search: 64 evaluations in 8 generations, ended by the limit on evaluations",
        "expert  loss left  same answer",
        "maths       0.125  7 of 8",
        "code        0.500  1 of 3",
        "loss left: disagreement with the expert over the base's (0 is the expert itself, 1 the base)",
        "same answer: on how many of the expert's unseen prompts the merge gives its top answer at every "
        "scored position; on inputs like those from a skeleton the two accuracies differ by at most one "
        "minus that share",
    ]


def test_a_prior_is_one_more_rival():
    first = write_summary(facts(with_prior=True)).splitlines()[0]
    assert first.endswith("(base 1.0000, uniform 0.8000, balanced 0.7500, prior 0.7000, expert maths 0.9000)")


@pytest.mark.parametrize(
    ("ended_by", "words"),
    [("clock", "the clock"), ("interrupt", "an interrupt"), ("evaluations", "the limit")],
)
def test_what_ended_the_search_is_said_in_words(ended_by, words):
    assert f"ended by {words}" in write_summary(facts(ended_by=ended_by)).splitlines()[1]


def test_without_unseen_prompts_nothing_is_counted():
    report = write_summary(facts(agreements={}, ended_by="interrupt"))
    assert "on the prompts searched on (base" in report
    assert "ended by an interrupt" in report
    assert "same answer" not in report
    assert " of " not in report.split("expert  ")[1]


@pytest.mark.parametrize(
    ("weak", "last"),
    [
        (("code",), "weak signal, kept near the balanced merge: code."),
        (NAMES, "weak signal from all adapters: the result is close to the balanced merge."),
    ],
)
def test_weak_adapters_are_named(weak, last):
    assert write_summary(facts(weak=weak)).splitlines()[-1].startswith(last)


def test_the_same_weights_under_two_names_are_told():
    assert write_summary(facts(twins=("maths and code",))).splitlines()[-1] == (
        "the same weights under several names: maths and code"
    )


def test_what_is_left_out_is_told_with_its_reason_before_what_is_weak():
    lines = write_summary(facts(left_out={"chess": "its update is zero"}, weak=("code",))).splitlines()
    assert lines[-2] == "left out, coefficient 0: chess: its update is zero"
    assert lines[-1].startswith("weak signal")


def test_memory_back_offs_are_told():
    events = [{"tokens": 9, "tokens_per_forward": 4}, {"tokens": 4, "tokens_per_forward": 2}]
    last = write_summary(facts(back_offs=events)).splitlines()[-1]
    assert last == "memory ran out 2 times; at last 2 tokens to a forward pass"
