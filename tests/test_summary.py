"""The report, line by line."""

import numpy as np
import pytest

from search.finalists import Finalist, Judgement
from search.loop import SearchOutcome
from search.summary import RunFacts, write_summary

NAMES = ("maths", "code")


def facts(**changes):
    zeros = np.zeros((1, 2))
    finalists = [
        Finalist("base", zeros, True),
        Finalist("uniform", zeros, True),
        Finalist("expert maths", zeros, True),
        Finalist("archive 2", zeros, False),
    ]
    judgement = Judgement(
        tuple(finalists),
        np.array([1, 0.8, 0.9, 0.25]),
        np.array([[1, 1], [0.8, 0.8], [0, 1.2], [0.125, 0.5]]),
        changes.pop("agreements", {3: np.array([7 / 8, 1 / 3])}),
        ("beaten", "beaten", "beaten", "winner"),
    )
    outcome = SearchOutcome(np.zeros((1, 2)), np.zeros(1), np.zeros(2), 64, "evaluations", 8)
    given = {"ended_by": "evaluations", "weak": (), "back_offs": [], "n_unseen": (8, 3), **changes}
    return RunFacts(names=NAMES, judgement=judgement, outcome=outcome, **given)


def test_the_whole_report():
    assert write_summary(facts()).splitlines() == [
        "winner: archive 2, loss 0.2500 on prompts that the search has not seen "
        "(base 1.0000, uniform 0.8000, expert maths 0.9000)",
        "search: 64 evaluations in 8 generations, ended by the limit on evaluations",
        "expert  loss left  same answer",
        "maths       0.125  7 of 8",
        "code        0.500  1 of 3",
        "loss left: disagreement with the expert over the base's (0 is the expert itself, 1 the base)",
        "same answer: on how many of the expert's unseen prompts the merge gives its top answer at every "
        "scored position; on inputs like those from a skeleton the two accuracies differ by at most one "
        "minus that share",
    ]


def test_without_unseen_prompts_nothing_is_counted():
    report = write_summary(facts(agreements={}, ended_by="interrupt"))
    assert "on the prompts searched on (base" in report
    assert "ended by an interrupt" in report
    assert "same answer" not in report
    assert " of " not in report.split("expert  ")[1]


@pytest.mark.parametrize(
    ("weak", "last"),
    [
        (("code",), "weak signal, kept near the uniform merge: code."),
        (NAMES, "weak signal from all adapters: the result is essentially the uniform merge."),
    ],
)
def test_weak_adapters_are_named(weak, last):
    assert write_summary(facts(weak=weak)).splitlines()[-1].startswith(last)


def test_memory_back_offs_are_told():
    events = [{"tokens": 9, "tokens_per_forward": 4}, {"tokens": 4, "tokens_per_forward": 2}]
    last = write_summary(facts(back_offs=events)).splitlines()[-1]
    assert last == "memory ran out 2 times; at last 2 tokens to a forward pass"
