"""Tables and limits of the fidelity benchmark, of lines as if measured."""

import pytest

from benchmarks.fidelity_tables import Lines, make_table, prompt_table, source_table
from benchmarks.goodhart_tables import fidelity_text, limits, search_table, term_search_table
from tests.fidelity_toys import ranking_rows, search_row

VARIANTS = ("mixed", "sequence", "answer")


@pytest.fixture
def lines():
    searches = [
        search_row(),
        search_row(seed=1),
        search_row(space="model"),
        search_row(retention=0.3),
        search_row(objective="entropy_gap", ended_by="seconds"),
    ]
    return Lines([*ranking_rows(rho=0.96), *ranking_rows("answer", rho=0.7), *searches])


def test_variants_come_in_the_known_order(lines):
    assert lines.variants(VARIANTS) == ["mixed", "answer"]


def test_the_larger_measurement_and_the_longer_search_count_whenever_they_were_made():
    rows = [
        *ranking_rows(rho=0.9),
        *ranking_rows(rho=0.1, n_merges=8),
        search_row(),
        search_row(evaluations=64),
    ]
    lines = Lines(rows)
    assert lines.entry("mixed", "free", "nll", "mean", "all")["held_in"] == 0.9
    assert [row["evaluations"] for row in lines.searches] == [10_000]


def test_a_whole_search_counts_before_one_that_was_cut_short():
    cut, whole = search_row(ended_by="seconds"), search_row(seconds=7.0)
    for rows in ([cut, whole], [whole, cut]):
        assert [row["seconds"] for row in Lines(rows).searches] == [7.0]
    assert len(Lines([cut]).searches) == 1


def test_each_source_has_a_line_with_intervals(lines):
    table = source_table(lines, ["mixed"]).splitlines()
    assert len(table) == 2 + 4
    assert "| mixed | skeletons, as in a search | 0.96 (0.94 to 0.99) |" in table[2]
    assert "uses data" in "".join(table)


def test_prompts_needed_are_told_with_their_tokens(lines):
    assert "| 4 | 0.96 / 0.96 / 0.96 (1,600 tokens) | 0.70 / 0.70 / 0.70 (1,600 tokens) |" in prompt_table(
        lines, ["mixed", "answer"]
    )


def test_searches_are_means_over_seeds_with_a_star_where_time_cut_them(lines):
    table = search_table(lines, ["mixed"])
    assert "| `entropy_excess`, an adapter and layer | 96.0 / 95.0 / 65.0 (n = 2) |" in table
    assert "| `entropy_gap`, an adapter and layer | 96.0 / 95.0 / 65.0 (n = 1)* |" in table
    assert "| `nll`, an adapter | - |" in table


def test_added_terms_are_compared_with_none(lines):
    table = term_search_table(lines, ["mixed"]).splitlines()
    assert table[2:] == [
        "| none | 96.0 / 95.0 / 65.0 (n = 2) |",
        "| retention 0.3 | 96.0 / 95.0 / 65.0 (n = 1) |",
    ]


def test_limits_say_what_is_met_and_what_is_missed(lines):
    told = limits(lines, ["mixed", "answer"])
    assert "met    mixed: Spearman held_in 0.960, wanted 0.95" in told
    assert "MISSED answer: Spearman held_in_best 0.700, wanted 0.75" in told
    assert any(line.startswith("met    mixed, layer, seed 1: 1.0 points below") for line in told)


def test_the_text_has_all_tables_and_figures_and_none_of_searches_without_any(lines):
    text = fidelity_text(lines, ["mixed", "answer"], "figures")
    assert text.count("](figures/") == 4
    assert text.count("| --- |") == 9
    without = fidelity_text(Lines(ranking_rows()), ["mixed"], "figures")
    assert "goodhart" not in without
    assert without.count("| --- |") == 7


def test_searches_alone_are_a_report_too():
    assert "(n = 1)" in fidelity_text(Lines([search_row()]), ["mixed"], ".")


def test_a_table_without_lines_is_its_header():
    assert make_table(["a", "b"], []) == "| a | b |\n| --- | ---: |"
