"""Figures of benchmarks: a mark for each method where its numbers are, and the same bytes each time."""

from benchmarks.plots import draw_quality, write_svg
from tests.test_quality_tables import row

ROWS = [
    *(row("my_merge", seed, seconds=80 + seed, held_in_N=0.9 + 0.02 * seed) for seed in range(3)),
    row("ties", seconds=15.0, held_in_N=0.4),
    row("joint LoRA", labels=True, seconds=None, held_in_N=1.0),
    row("ties, best scale", labels=True, seconds=None),
    row("ties", experts="answer", seconds=16.0),
]


def lines(ax):
    return {container.get_label(): container.lines[0] for container in ax.containers}


def test_each_variant_that_was_run_has_a_panel_a_measure_with_means_where_they_belong():
    figure = draw_quality(ROWS, ["mixed", "sequence", "answer"]).figure
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["experts: mixed"] * 2 + [
        "experts: answer"
    ] * 2
    marks = lines(figure.axes[0])
    assert [v.item() for v in marks["my_merge"].get_xydata()[0]] == [81.0, 92.0]
    assert [v.item() for v in marks["ties"].get_xydata()[0]] == [15.0, 40.0]
    assert lines(figure.axes[2]).keys() == {"ties"}


def test_the_legend_has_every_method_once_and_what_was_not_timed_is_a_line():
    figure = draw_quality(ROWS, ["mixed", "answer"]).figure
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["my_merge", "ties", "joint LoRA"]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_label() == "joint LoRA"] == [
        100.0
    ]


def test_the_same_runs_give_the_same_bytes_without_a_date(tmp_path):
    for name in ("one.svg", "two.svg"):
        write_svg(draw_quality(ROWS, ["mixed", "answer"]), tmp_path / name)
    content = (tmp_path / "one.svg").read_bytes()
    assert content == (tmp_path / "two.svg").read_bytes()
    assert b"dc:date" not in content
    assert b"my_merge" in content
