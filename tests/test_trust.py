"""Bounds follow from what the prompts are worth."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.trust import HELD, SURE, Evidence, bound, weigh

N = 12
BALANCED = np.linspace(0.2, 0.9, N)
GOOD = Evidence(
    names=[f"expert-{i}" for i in range(N)],
    peak_kl=np.linspace(1, 3, N),
    entropy_ratio=np.linspace(0.01, 0.05, N),
    from_skeleton=np.ones(N, dtype=bool),
    rivals=1 - np.eye(N),
)


def changed(field, index, value):
    values = getattr(GOOD, field).copy()
    values[index] = value
    return replace(GOOD, **{field: values})


def test_who_is_sure_differs_from_the_base_and_has_no_rival_is_free():
    trust = weigh(GOOD, 0.5, BALANCED)
    assert trust.reasons == ("",) * N
    assert np.isneginf(trust.bounds.low).all()
    assert np.isposinf(trust.bounds.high).all()


@pytest.mark.parametrize(
    ("field", "at", "value", "reason"),
    [
        ("peak_kl", 1, 0.3, "0.300 nats from the base at most"),
        ("peak_kl", 1, np.nan, "nan nats from the base at most"),
        ("from_skeleton", 1, False, "free text"),
        ("entropy_ratio", 1, np.nan, "no finite entropy"),
        ("entropy_ratio", 1, 0.7, "0.7 of the base's entropy"),
        ("entropy_ratio", 1, np.inf, "1 of the base's entropy"),
        ("rivals", (2, 1), 0.04, "expert-2 alone answers them as well"),
        ("rivals", (0, 1), 0.0, "expert-0 alone answers them as well"),
    ],
)
def test_without_evidence_a_coefficient_is_held_near_the_balanced_merge(field, at, value, reason):
    trust = weigh(changed(field, at, value), 0.5, BALANCED)
    assert trust.reasons == ("", reason, *[""] * (N - 2))
    low, high = trust.bounds.low / BALANCED, trust.bounds.high / BALANCED
    np.testing.assert_allclose([low[1], high[1]], [HELD, 1 / HELD])
    assert (np.delete(low, 1) < 0.3).all()
    assert (np.delete(high, 1) > 3).all()
    assert not weigh(changed(field, at, value), 0, BALANCED).reasons[1]  # 0 trusts all


def test_an_expert_that_answers_anothers_prompts_may_have_prompts_of_its_own():
    trust = weigh(changed("rivals", (2, 1), 0.0), 0.5, BALANCED)
    assert trust.reasons[2] == ""


@pytest.mark.parametrize("n_unknown", [2, 4])
def test_the_more_is_unknown_the_less_may_the_others_move(n_unknown):
    unknown = np.arange(N) < n_unknown
    trust = weigh(replace(GOOD, from_skeleton=~unknown), 0.5, BALANCED)
    assert trust.reasons == (*["free text"] * n_unknown, *[""] * (N - n_unknown))
    factor = min(0.9, 2 * (n_unknown + GOOD.entropy_ratio[n_unknown:].sum()) / N)
    np.testing.assert_allclose(trust.bounds.low[n_unknown:], factor * BALANCED[n_unknown:])
    np.testing.assert_allclose(trust.bounds.high[n_unknown:], BALANCED[n_unknown:] / factor)


def test_a_rival_that_gives_no_numbers_is_none():
    assert weigh(replace(GOOD, rivals=np.full((N, N), np.nan)), 0.5, BALANCED).reasons == ("",) * N


def test_a_single_adapter_has_no_rival():
    alone = Evidence(
        names=("maths",),
        peak_kl=np.array([2.0]),
        entropy_ratio=np.array([0.25]),
        from_skeleton=np.ones(1, dtype=bool),
        rivals=np.zeros((1, 1)),
    )
    trust = weigh(alone, 0.5, np.ones(1))
    assert trust.reasons == ("0.25 of the base's entropy",)
    assert (trust.bounds.low.tolist(), trust.bounds.high.tolist()) == ([0.5], [2.0])


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 2))
def test_more_doubt_never_allows_more_and_the_balanced_merge_always_fits(first, second, balanced):
    less, more = sorted((first, second))
    wide, narrow = (bound(np.array([doubt]), np.array([balanced])) for doubt in (less, more))
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high
    assert narrow.hold(np.array([[balanced]]))
    assert np.isinf(wide.low) == (less <= SURE)
