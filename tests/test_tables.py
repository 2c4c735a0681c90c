"""Tables from traces: against values computed by hand, and on runs that lack something."""

import numpy as np
import pandas as pd
import pytest

from search import tables
from search.movement import projection_table, spread_table
from search.tables import (
    best_candidate,
    candidate_table,
    coefficient_table,
    elapsed_s,
    expert_table,
    finalist_table,
    generation_table,
    prompt_table,
    reference_table,
    run_table,
    stage_title,
    tabulate,
    time_table,
)
from search.trace import Trace
from tests.traces import NAMES, beginning, make_event, make_plain, odd_traces, tiny_end, tiny_trace

ALL_TABLES = [
    run_table,
    candidate_table,
    generation_table,
    reference_table,
    finalist_table,
    expert_table,
    coefficient_table,
    spread_table,
    projection_table,
    time_table,
    prompt_table,
]


def test_a_run_is_one_row():
    row = run_table(tiny_trace()).iloc[0]
    expected = {
        "base": "toy",
        "adapters": 2,
        "groups": 3,
        "objective": "entropy_excess, mean_sqrt",
        "seed": 7,
        "device": "cpu",
        "generations": 3,
        "evaluations": 9,
        "n_tokens": 300,
        "elapsed_s": 30.0,
        "ended_by": "evaluations",
        "winner": "archive 1",
        "loss": 0.6,
        "prompts": "unseen",
    }
    assert row.to_dict() == expected


def test_candidates_come_once_for_each_rung_that_they_were_in():
    table = candidate_table(tiny_trace())
    second = table[table["generation"] == 1]
    assert second["candidate"].tolist() == [0, 1, 2, 1, 2]
    assert second["prompts"].tolist() == [2, 2, 2, 4, 4]
    assert second["on_all"].tolist() == [False, False, False, True, True]
    np.testing.assert_array_equal(second["loss"], [0.8, 0.3, 0.4, np.nan, 0.62])
    assert second["n_tokens"].unique().tolist() == [200]


def test_the_loss_so_far_leaves_out_candidates_on_fewer_prompts():
    table = generation_table(tiny_trace())
    assert table["loss"].tolist() == [0.6, 0.62, 0.5]  # the smaller 0.3 and 0.2 are on two of four prompts
    assert table["best_loss"].tolist() == [0.6, 0.6, 0.5]
    assert table["on_all"].tolist() == [2, 2, 2]
    assert table["n_tokens"].tolist() == [100, 200, 300]
    assert table["stage"].tolist() == [0, 1, 1]


def test_the_loss_so_far_survives_a_generation_without_a_finite_loss():
    generations = [make_plain(0, 2), make_plain(1, 2, loss=np.nan)]
    table = generation_table(Trace(tiny_trace().header, generations, []))
    assert table["best_loss"].tolist() == [0.4, 0.4]


def test_an_old_trace_without_losses_in_its_rungs_gives_the_losses_told():
    generation = make_plain(0, 2)
    object.__setattr__(generation, "rungs", [{"prompts": 4, "candidates": [0, 1, 2, 3]}])
    table = candidate_table(Trace(tiny_trace().header, [generation], []))
    assert table["loss"].tolist() == [0.4] * 4
    assert table["on_all"].all()


def test_the_best_candidate_is_the_best_on_all_prompts():
    best = best_candidate(tiny_trace())
    assert best is not None
    assert (best[0].index, best[1]) == (2, 1)
    assert best_candidate(odd_traces()["no finite loss"]) is None


def test_references_are_on_searched_prompts_and_finalists_say_theirs():
    assert reference_table(tiny_trace())["loss"].to_dict() == {"base": 1.0, "uniform": 0.8, "balanced": 0.7}
    table = finalist_table(tiny_trace())
    found, experts, references = ["archive 1"], ["expert b", "expert a"], ["balanced", "uniform", "base"]
    assert table.index.tolist() == [*found, *experts, *references, "mean"]
    assert table["kind"].tolist() == ["candidate", *["expert"] * 2, *["reference"] * 3, "candidate"]
    assert set(table["prompts"]) == {"unseen"}
    assert table.loc["archive 1", ["worst", "agreement"]].tolist() == [0.6, 0.75]
    assert np.isnan(table.loc["mean", "loss"])
    assert np.isnan(table.loc["base", "agreement"])


def test_experts_before_and_after_are_on_the_same_prompts():
    table = expert_table(tiny_trace())
    assert table["uniform"].tolist() == [0.5, 0.9]  # of the finalists, not the 0.8 of the searched prompts
    assert table["balanced"].tolist() == [0.4, 0.8]
    assert table["winner"].tolist() == [0.6, 0.2]
    assert set(table["prompts"]) == {"unseen"}
    assert table["weak"].to_dict() == {"a": False, "b": True}
    unfinished = expert_table(odd_traces()["one generation, unfinished"])
    assert unfinished["uniform"].tolist() == [0.8, 0.8]
    assert unfinished["best so far"].tolist() == [0.1, 0.2]
    assert set(unfinished["prompts"]) == {"searched"}


def test_what_a_run_wrote_of_its_end_is_void_once_it_searched_on():
    resumed = odd_traces()["resumed and unfinished"]
    assert finalist_table(resumed).empty
    assert run_table(resumed).iloc[0][["winner", "ended_by"]].tolist() == [None, None]
    assert coefficient_table(resumed).index.unique("point").tolist() == ["start"]


def test_coefficients_have_a_row_for_each_group_and_a_column_for_each_adapter():
    table = coefficient_table(tiny_trace())
    assert table.columns.tolist() == list(NAMES)
    assert table.loc[("winner", "layer.2"), "b"] == 5.0
    assert (table.loc["start"] == 0.3).all(axis=None)
    search = make_event("search", start=[[0.1] * 2] * 3, prior={"source": "p.json"})
    trace = Trace(tiny_trace().header, [], [search, tiny_end()[0] | {"generations": 0}])
    assert coefficient_table(trace).index.unique("point").tolist() == ["prior", "mean"]


def test_time_adds_up_to_the_run():
    table = time_table(tiny_trace())
    assert table["seconds"].to_dict() == {
        "prompts": 2.0,
        "signals": 1.0,
        "references": 0.5,
        "stage 0, per model": 5.0,
        "stage 1, profile per layer": 10.0,
        "finalists": 1.5,
        "merge": 0.5,
        "load and the rest": 9.5,
    }
    assert table["seconds"].sum() == elapsed_s(tiny_trace()) == 30.0
    assert table["share"].sum() == pytest.approx(1)


def test_prompts_are_ordered_by_the_mean_of_their_known_spreads():
    table = prompt_table(tiny_trace())
    assert table.index.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(table["spread"], [0.5, 0.3, 0.1, np.nan])
    assert table["generations"].tolist() == [3, 2, 3, 0]
    assert table["expert"].tolist() == ["b", "b", "a", "a"]
    assert table["n_scored"].tolist() == [2, 4, 1, 3]


def test_of_equal_stages_the_last_one_counts():
    events = [make_event("stage", index=0, space={"groups": groups}) for groups in ("model", "block")]
    assert stage_title(Trace({}, [], events), 0) == "stage 0, per block"
    assert stage_title(Trace({}, [], []), 3) == "stage 3"


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: table.__name__)
def test_every_table_is_made_of_every_odd_trace(table):
    traces = odd_traces()
    stacked = tabulate(table, traces)
    whole = table(traces["whole"])
    assert not whole.empty
    pd.testing.assert_frame_equal(stacked.loc["whole"][whole.columns], whole, check_dtype=False)


def test_no_table_changes_the_trace():
    trace = tiny_trace()
    for table in ALL_TABLES:
        table(trace)
    assert [event["event"] for event in trace.events] == [
        e["event"] for e in [*beginning(NAMES, "123"), *tiny_end()]
    ]
    assert tables.expert_names(trace) == list(NAMES)
