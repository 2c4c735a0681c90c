"""Prompts, signals and bounds, recorded and fit to search with."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from search import steering
from search.base import LoadedBase
from search.errors import InputError
from search.evaluate import Scoring
from search.parts import assemble_parts
from search.prompts import PromptRequest
from search.steering import SteeringRequest, WrittenPrompts, prepare_prompts, prepare_steering
from search.trace import Trace, TraceWriter
from tests.test_experts import make_prompts
from tests.toys import BASE_NAME


@pytest.fixture
def parts(toy_model, toy_adapters):
    base = LoadedBase(toy_model("llama"), None, BASE_NAME, None, None)
    return assemble_parts(base, toy_adapters("llama"), base_name=BASE_NAME, kind="layer")


@pytest.fixture
def trace(tmp_path):
    with TraceWriter(tmp_path / "trace.jsonl") as writer:
        writer.header({})
        yield writer


BALANCED = np.array([0.2, 0.5, 0.8])


def written():
    prompts = make_prompts(lengths=(9, 4, 12, 7, 5, 10, 6, 8, 11))
    return WrittenPrompts(*prompts.split(2))


def steer(parts, trace, weak_signal_nats=0.0, *, prior=None, recorded=None, prompts=None):
    request = SteeringRequest(
        scoring=Scoring(),
        weak_signal_nats=weak_signal_nats,
        balanced=BALANCED,
        prior=prior,
        recorded=recorded,
    )
    return prepare_steering(parts, prompts or written(), request, trace)


def last_events(tmp_path):
    return {event["event"]: event for event in Trace.load(tmp_path / "trace.jsonl").events}


def test_prompts_are_split_and_recorded(parts, trace, tmp_path, monkeypatch):
    prompts = make_prompts(lengths=(5,) * 9)
    asked = {}
    monkeypatch.setattr(steering, "write_prompts", lambda *given: asked.update(given=given) or prompts)
    request = PromptRequest(per_adapter=3)
    both = prepare_prompts(parts, [(), (), ("{x}:",)], request, 2, trace, None)
    assert asked["given"][-2:] == ([(), (), ("{x}:",)], request)
    assert (both.searched.n_prompts, both.unseen.n_prompts) == (6, 3)
    event = last_events(tmp_path)["prompts"]
    assert event["sha256"] == prompts.sha256
    assert [prompt["expert"] for prompt in event["unseen"]] == ["expert-0", "expert-1", "expert-2"]
    first = event["searched"][0]
    assert first["ids"] == list(prompts.ids[0])
    assert first["scored"] == list(prompts.scored[0])
    assert (first["text"], first["from_skeleton"]) == (prompts.texts[0], True)


def test_without_weak_adapters_the_space_is_free(parts, trace, tmp_path, caplog):
    found = steer(parts, trace)
    assert found.weak == ()
    assert np.isinf(found.bounds.low).all()
    assert np.isinf(found.bounds.high).all()
    start = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(found.confine(start), start)
    assert not caplog.records
    events = last_events(tmp_path)
    assert events["signals"]["low"] == [None] * 3
    assert events["references"]["names"] == ["base", "uniform", "balanced"]
    assert events["references"]["losses"][0] == pytest.approx(1)
    assert found.unseen_candidate_s > 0
    assert found.reference_scores.losses.tolist() == events["references"]["losses"]


def test_the_two_evaluators_are_on_different_prompts(parts, trace):
    found, both = steer(parts, trace), written()
    uniform = found.references[1].coefficients[None]
    n_tokens = [evaluator.score(uniform).n_tokens for evaluator in (found.searched, found.unseen)]
    assert n_tokens == [both.searched.n_tokens, both.unseen.n_tokens]


def test_weak_adapters_are_confined_start_within_bounds_and_are_named_loudly(parts, trace, tmp_path, caplog):
    peak_kl = np.array([0.5, 0.01, 0.2])
    signals = steering.expert_signals

    def with_known_kl(*given, **options):
        return replace(signals(*given, **options), peak_kl=peak_kl, entropy_ratio=np.array([0.05, 0.05, 0.3]))

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(steering, "expert_signals", with_known_kl)
        found = steer(parts, trace, weak_signal_nats=0.2)  # not below: not weak
    assert found.weak == ("expert-1", "expert-2")
    (record,) = caplog.records
    assert record.message.startswith("WEAK SIGNAL: the prompts of 2 of 3 adapters leave doubt")
    assert (
        "expert-1 (0.010 nats from the base at most), expert-2 (0.3 of the base's entropy)." in record.message
    )
    factors = np.array([0.9, 0.9, 0.9])  # twice the mean doubt is more
    np.testing.assert_allclose(found.bounds.low, BALANCED * factors)
    np.testing.assert_allclose(found.bounds.high, BALANCED / factors)
    given = np.array([[0.4, 0.4, 0.5], [0.6, 0.9, 0.7]])
    start = found.confine(given)
    np.testing.assert_array_equal(start, np.clip(given, found.bounds.low, found.bounds.high))
    assert found.bounds.hold(start)
    assert found.bounds.hold(found.references[2].coefficients)
    event = last_events(tmp_path)["signals"]
    assert event["weak"] == ["expert-1", "expert-2"]
    assert event["reasons"] == ["0.010 nats from the base at most", "0.3 of the base's entropy"]
    assert event["entropy_ratio"] == [0.05, 0.05, 0.3]


@pytest.mark.parametrize(("weak_signal_nats", "weak"), [(1e-6, ("expert-0", "expert-2")), (0.0, ())])
def test_who_has_no_prompt_from_a_skeleton_is_weak_whatever_it_says_unless_nobody_is(
    parts, trace, weak_signal_nats, weak
):
    both = written()
    from_skeleton = tuple(
        bool(expert == 1 and index < 3) for index, expert in enumerate(both.searched.expert)
    )
    assert sum(from_skeleton) == 1  # one of its two
    prompts = replace(both, searched=replace(both.searched, from_skeleton=from_skeleton))
    found = steer(parts, trace, weak_signal_nats, prompts=prompts)
    because = zip(found.weak, found.reasons, strict=True)
    assert tuple(name for name, reason in because if reason == "free text") == weak
    assert np.isfinite(found.bounds.low).all() == bool(weak)  # toys answer as unsurely as their base


def test_a_signal_that_is_not_a_number_is_weak(parts, trace, monkeypatch):
    signals = steering.expert_signals
    kl = np.array([np.nan, 1, 1])
    monkeypatch.setattr(steering, "expert_signals", lambda *a, **k: replace(signals(*a, **k), peak_kl=kl))
    found = steer(parts, trace, weak_signal_nats=0.5)
    assert found.reasons[found.weak.index("expert-0")] == "nan nats from the base at most"


def test_the_balanced_merge_is_scored_as_one_more_reference(parts, trace):
    found = steer(parts, trace)
    assert [reference.name for reference in found.references[:3]] == ["base", "uniform", "balanced"]
    np.testing.assert_array_equal(found.references[2].coefficients, [BALANCED] * parts.shape[0])
    alone = found.searched.score(np.stack([[BALANCED] * parts.shape[0]]))
    np.testing.assert_allclose(found.reference_scores.losses[2], alone.losses[0], rtol=1e-9)


def test_a_priors_start_is_scored_as_one_more_reference(parts, trace, tmp_path):
    prior = np.array([[0.5, 0.1, 0.2], [0.3, 0.9, -0.1]])
    found = steer(parts, trace, prior=prior)
    names = [reference.name for reference in found.references]
    general, experts = ["base", "uniform", "balanced", "prior"], [f"expert expert-{i}" for i in range(3)]
    assert names == [*general, *experts]
    np.testing.assert_array_equal(found.references[3].coefficients, prior)
    event = last_events(tmp_path)["references"]
    assert event["names"] == general
    assert event["losses"] == found.reference_scores.losses.tolist()
    alone = found.searched.score(prior[None])
    np.testing.assert_allclose(found.reference_scores.losses[3], alone.losses[0], rtol=1e-9)
    np.testing.assert_allclose(event["per_expert"][3], alone.per_expert[0], rtol=1e-9)


def test_the_bases_own_disagreement_is_recorded_beside_the_references(parts, trace, tmp_path):
    found = steer(parts, trace)
    event = last_events(tmp_path)["references"]
    assert event["base_per_expert"] == found.searched.base_per_expert.tolist()
    assert event["per_expert"][0] == pytest.approx([1, 1, 1])


def test_one_budget_is_shared_by_both_evaluators(parts, trace):
    found = steer(parts, trace)
    found.budget.oom_events.append({"tokens": 9, "tokens_per_forward": 4})
    assert found.searched.oom_events == found.unseen.oom_events == found.budget.oom_events


def test_a_resumed_run_takes_the_recorded_prompts_and_writes_none(parts, trace, tmp_path, monkeypatch):
    in_turn = make_prompts(lengths=(5, 8, 4, 6, 9, 7, 3, 5, 10))
    prompts = in_turn.select([0, 3, 6, 1, 4, 7, 2, 5, 8])  # adapter by adapter, as they are written
    monkeypatch.setattr(steering, "write_prompts", lambda *given: prompts)
    request = PromptRequest(per_adapter=3)
    both = prepare_prompts(parts, [()] * 3, request, 2, trace, None)
    event = last_events(tmp_path)["prompts"]
    n_bytes = (tmp_path / "trace.jsonl").stat().st_size
    monkeypatch.setattr(steering, "write_prompts", lambda *given: pytest.fail("prompts were written anew"))
    again = prepare_prompts(parts, [()] * 3, request, 2, trace, event)
    for found, expected in ((again.searched, both.searched), (again.unseen, both.unseen)):
        assert (found.ids, found.scored, found.texts) == (expected.ids, expected.scored, expected.texts)
        np.testing.assert_array_equal(found.expert, expected.expert)
    assert (tmp_path / "trace.jsonl").stat().st_size == n_bytes
    event["searched"][0]["ids"][0] += 1
    with pytest.raises(InputError, match=r"the trace's prompts have hash .*--out"):
        prepare_prompts(parts, [()] * 3, request, 2, trace, event)


@pytest.mark.parametrize("weak", [[], ["expert-2"]])
def test_in_a_resumed_run_adapters_are_weak_and_confined_as_recorded_whatever_is_measured(
    parts, trace, weak, caplog
):
    low, high = 1 / 6, 1 / 2  # of a run whose weak adapters were kept near the uniform merge
    recorded = {
        "weak": weak,
        "reasons": ["free text"] * len(weak),
        "low": [None, None, low if weak else None],
        "high": [None, None, high if weak else None],
    }
    found = steer(parts, trace, weak_signal_nats=0 if weak else 99, recorded=recorded)
    assert list(found.weak) == weak
    assert found.bounds.low.tolist() == [-np.inf, -np.inf, low if weak else -np.inf]
    assert found.bounds.high.tolist() == [np.inf, np.inf, high if weak else np.inf]
    assert found.confine(np.zeros((2, 3)))[:, 2].tolist() == [low if weak else 0.0] * 2
    assert len(caplog.records) == len(weak)
