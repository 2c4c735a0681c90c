"""Tables and figure of the studies: what they say of hand-made runs."""

from benchmarks.plots import write_svg
from benchmarks.study_plots import draw_families
from benchmarks.study_tables import (
    delivery_table,
    end_table,
    list_points,
    studies_text,
    study_rows,
    way_table,
)

WHERE = {"machine": "x86 Maker, 2 cores", "cores": 2, "commit": "abc", "config": "demo.yaml"}


def shares(N, held_out=0.5):
    return {"held_in_N": N, "worst_task": N, "held_out": held_out}


def point(at, N, clock="seconds"):
    found = {"chosen": shares(N, 0.25), "mean": shares(N - 0.1), "best": shares(N - 0.2)}
    return {"clock": clock, "at": at, **found}


def row(*arms, seed=0, limit_s=300.0, N=0.9, **more):
    identity = {"method": arms[0], "arms": list(arms), "limit_s": limit_s, "experts": "mixed", "seed": seed}
    spent = {"search_s": limit_s or 40.0, "evaluations": 480, "n_tokens": 440_000}
    identity["studies"] = ["search", "ablation", "no_skeleton"]
    return {**identity, **shares(N), **spent, "checkpoints": [point(15.0, N - 0.2)], **WHERE, **more}


def cells(table, start):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_run_is_shown_under_each_of_its_names_in_the_studies_order():
    runs = study_rows([row("no race"), row("default", "space model", "race keeps 0.25")], "search", "mixed")
    assert list(runs) == ["default", "space model", "no race", "race keeps 0.25"]
    assert runs["space model"] == runs["default"]


def test_the_last_run_of_a_seed_counts_even_if_the_arm_had_another_name():
    rows = [row("space model", N=0.1), row("default", "space model"), row("space model", seed=1, N=0.7)]
    assert [run["held_in_N"] for run in study_rows(rows, "search", "mixed")["space model"]] == [0.9, 0.7]


def test_only_the_longest_searches_of_a_study_count():
    rows = [row("default"), row("default", limit_s=15.0, N=0.1), row("no race")]
    rows += [row("default", limit_s=None, N=0.5, studies=["ablation"])]
    assert [run["held_in_N"] for run in study_rows(rows, "search", "mixed")["default"]] == [0.9]


def test_the_default_alone_is_no_study():
    assert study_rows([row("default", "space model")], "search", "mixed") == {}


def test_merges_without_a_search_stand_beside_searches():
    merge = row("uniform merge", limit_s=None, N=0.2)
    del merge["search_s"]
    for limit_s in (None, 60.0):
        runs = study_rows([merge, row("default", limit_s=limit_s)], "no_skeleton", "mixed")
        assert list(runs) == ["default", "uniform merge"]


def test_an_arm_shows_means_with_intervals_and_what_was_spent():
    runs = {"default": [row("default", seed=seed, N=0.9 + 0.02 * seed) for seed in range(3)]}
    expected = ["92.0 (90.0 to 94.0)", "92.0 (90.0 to 94.0)", "50.0", "300", "480", "440,000", "3"]
    assert cells(end_table(runs), "default")[1:] == expected


def test_prompts_show_how_alike_their_answers_are():
    own = [row("default", answers_top_share={"a": 0.5, "b": 0.25}), row("default", answers_top_share={})]
    table = end_table({"default": own}, with_answers=True)
    assert cells(table, "default")[-2:] == ["37.5", "2"]


def test_on_the_way_an_arm_shows_what_it_would_have_returned_and_a_dash_where_it_had_ended():
    runs = {
        "default": [row("default")],
        "no race": [row("no race", checkpoints=[point(5_000, 0.4, "n_tokens")])],
    }
    table = way_table(runs)
    assert cells(table, "arm") == ["arm", "15 s: N; held-out", "5,000 tokens: N; held-out"]
    assert cells(table, "default")[1:] == ["70.0; 25.0", "-"]
    assert cells(table, "no race")[1:] == ["-", "40.0; 25.0"]
    assert way_table({"default": [row("default", checkpoints=[])]}) == ""


def test_what_could_be_delivered_is_compared():
    table = delivery_table([row("default")])
    assert cells(table, "mean of the distribution")[1:] == ["60.0; 50.0"]
    assert cells(table, "best on searched prompts")[1:] == ["50.0; 50.0"]


def test_checkpoints_come_clock_by_clock():
    found = list_points(
        [row("default", checkpoints=[point(9, 1, "evaluations"), point(60.0, 1), point(15.0, 1)])]
    )
    assert [p.label for p in found] == ["15 s", "60 s", "9 evaluations"]


def test_the_section_has_each_study_that_was_run_and_says_what_failed():
    rows = [row("default"), row("no race", seed=0, failure="x"), row("no race", seed=1)]
    text = studies_text(rows, {("search", "mixed"): "figures/studies_search.svg"})
    assert "**Which search, where seconds end it**, experts `mixed`:" in text
    assert "](figures/studies_search.svg)" in text
    assert "Which prompts" not in text
    assert text.endswith("Failed: no race on mixed, seed 0.")


def test_a_figure_has_the_default_in_each_familys_row_and_the_same_bytes_each_time(tmp_path):
    rows = [row("default", "space model"), row("space layer", N=0.8), row("optimizer DE", N=0.7)]
    runs = study_rows(rows, "search", "mixed")
    figure = draw_families(runs, "mixed").figure
    labels = [[container.get_label() for container in ax.containers] for ax in figure.axes]
    assert labels == [["default", "space layer"]] * 2 + [["default", "optimizer DE"]] * 2
    curve = figure.axes[0].containers[1].lines[0].get_xydata().tolist()
    assert [[round(value, 6) for value in xy] for xy in curve] == [[15.0, 60.0], [300.0, 80.0]]
    for name in ("one.svg", "two.svg"):
        write_svg(draw_families(runs, "mixed"), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
