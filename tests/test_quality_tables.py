"""Tables of the quality benchmark: what they say of hand-made runs."""

import pytest

from benchmarks.quality_tables import (
    by_method,
    method_table,
    quality_text,
    set_table,
    worthless_weight,
)


def row(method, seed=0, experts="mixed", **measures):
    found = dict.fromkeys(("held_in_N", "held_in_R", "worst_task", "held_out"), 0.5)
    where = {"machine": "x86 Maker, 2 cores", "cores": 2, "commit": "abc", "config": "demo.yaml"}
    identity = {"method": method, "experts": experts, "seed": seed, "held_in_tasks": ["a", "b"]}
    return {**identity, **found, "seconds": 80.0, "worthless": [], **where, **measures}


def cells(table, start):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_methods_go_best_first_and_those_with_labels_last():
    rows = [row("low", held_in_N=0.2), row("joint", held_in_N=1.0, labels=True), row("high", held_in_N=0.9)]
    assert list(by_method(rows)) == ["high", "low", "joint"]


def test_a_method_shows_means_and_intervals_where_there_are_seeds():
    rows = [
        row("ours", seed, held_in_N=0.9 + 0.02 * seed, evaluations=480, search_s=50) for seed in range(3)
    ] + [row("ties")]
    table = method_table(rows)
    assert cells(table, "`ours`") == [
        "`ours`",
        "92.0 (90.0 to 94.0)",
        "50.0",
        "50.0",
        "50.0",
        "80",
        "50",
        "480",
        "3",
    ]
    assert cells(table, "`ties`") == ["`ties`", "50.0", "50.0", "50.0", "50.0", "80", "-", "-", "1"]


def test_labels_are_marked_and_what_was_not_timed_is_a_dash():
    table = method_table([row("joint", labels=True, seconds=None)])
    assert cells(table, "joint")[0] == "joint (labels)"
    assert cells(table, "joint")[5:8] == ["-", "-", "-"]


def test_what_the_command_does_not_offer_is_marked_and_ranked_among_the_data_free():
    other = row("tsv_m, weights searched", held_in_N=0.8, no_option=True, seconds=None, search_s=60.0)
    table = method_table([row("ours", held_in_N=0.9), other, row("joint", labels=True, held_in_N=1.0)])
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| `ours`",
        "| tsv_m, weights searched (no option)",
        "| joint (labels)",
    ]
    assert cells(table, "tsv_m")[5:7] == ["-", "60"]


def test_a_set_compares_the_search_with_the_uniform_merge_of_the_same_experts():
    weights = {"a": 0.3, "b": 0.5, "code": 0.02}
    found = {"worthless": ["code"], "mean_abs_coefficients": weights}
    searched = [row("my_merge", s, "broken", held_in_N=0.7 + 0.1 * s, **found) for s in range(2)]
    rows = [*searched, row("uniform_average", 0, "broken", held_in_N=0.4), row("my_merge", 0, "mixed")]
    table = set_table(rows, ["broken", "never run"])
    expected = ["broken", "2", "40.0", "75.0 (70.0 to 80.0)", "35.0 (30.0 to 40.0)", "+30.0", "5.0", "2"]
    assert cells(table, "broken") == expected
    assert "never run" not in table


@pytest.mark.parametrize(
    ("worthless", "weights", "expected"),
    [
        (["c"], {"a": 0.2, "b": 0.4, "c": 0.03}, 0.1),
        ([], {"a": 0.2}, None),
        (["c"], {}, None),
        (["c"], {"a": 0.0, "c": 0.1}, None),
    ],
)
def test_the_weight_of_the_worthless_is_relative_to_that_of_the_others(worthless, weights, expected):
    found = worthless_weight({"worthless": worthless, "mean_abs_coefficients": weights})
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_whole_section_says_where_it_ran_and_what_failed():
    rows = [
        row("ours"),
        row("ours", experts="two"),
        row("uniform_average", experts="two"),
        row("ties", failure="x"),
    ]
    text = quality_text(rows, ["mixed", "answer"], ["two"], "figures/quality.svg")
    assert "Experts `mixed`" in text
    assert "Experts `answer`" not in text
    assert "](figures/quality.svg)" in text
    assert text.endswith(
        "Machine: x86 Maker, 2 cores. Commit: abc. Configuration: demo.yaml. Cores a run was pinned to: 2. "
        "Failed: ties on mixed, seed 0."
    )
