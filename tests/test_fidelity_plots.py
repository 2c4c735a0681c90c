"""Figures of the fidelity benchmark: what is on which panel, and the same bytes each time."""

import numpy as np
import pytest

from benchmarks.fidelity_plots import draw_all, mean_curve
from benchmarks.fidelity_tables import Lines
from benchmarks.plots import write_svg
from tests.fidelity_toys import ranking_rows, search_row

ROWS = [
    *ranking_rows(),
    *ranking_rows("answer"),
    search_row(),
    search_row(seed=1),
    search_row(objective="nll", space="model"),
    search_row(retention=0.3),
    search_row(retention=1.0),
]
VARIANTS = ["mixed", "answer"]


@pytest.fixture(scope="module")
def pictures():
    return draw_all(Lines(ROWS), VARIANTS)


def test_there_are_panels_for_every_variant(pictures):
    assert {name: len(picture.figure.axes) for name, picture in pictures.items()} == {
        "fidelity": 2,
        "prompts_needed": 2,
        "retention": 4,
        "goodhart": 4,
    }


def test_every_merge_is_a_point(pictures):
    (first, _) = pictures["fidelity"].figure.axes
    points = {line.get_label(): line.get_xydata() for line in first.lines}
    assert sum(map(len, points.values())) == 6
    np.testing.assert_allclose(points["visited"], [[0, 0], [0.6, 60]])


def test_curves_are_means_over_seeds_in_percent_without_the_start(pictures):
    line = pictures["goodhart"].figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[160, 80], [1_600, 96], [10_000, 95]])
    shown = pictures["goodhart"].figure.axes[1].get_legend_handles_labels()[1]
    assert shown == ["entropy_excess", "one coefficient an adapter and layer", "one coefficient an adapter"]


def test_a_converged_search_stays_and_one_that_was_cut_ends_the_mean():
    early = search_row(ended_by="converged")
    curve = {name: values[:3] for name, values in early["curve"].items()}
    assert mean_curve([search_row(), early | {"curve": curve}], "held_in_N")[1].tolist() == [0.8, 0.96, 0.955]
    points, _ = mean_curve([search_row(), early | {"curve": curve, "ended_by": "seconds"}], "held_in_N")
    assert points.tolist() == [160, 1_600]


def test_ends_of_searches_are_joined_in_the_order_of_weights(pictures):
    right = pictures["retention"].figure.axes[1]
    assert [text.get_text() for text in right.texts if text.get_text()][:3] == ["0", "0.3", "1"]


def test_without_searches_there_is_no_figure_of_them():
    assert "goodhart" not in draw_all(Lines(ranking_rows()), ["mixed"])


def test_the_same_lines_give_the_same_bytes(pictures, tmp_path):
    again = draw_all(Lines(ROWS), VARIANTS)
    write_svg(pictures["retention"], tmp_path / "one.svg")
    write_svg(again["retention"], tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
