"""Figures: each is drawn of every odd run, and shows what its table says."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from search import figures, figures_genomes, picture
from search.figures import (
    draw_best_losses,
    draw_experts,
    draw_finalists,
    draw_losses,
    draw_prompts,
    draw_time,
)
from search.figures_genomes import draw_coefficients, draw_projection, draw_spread
from search.picture import Picture, make_axes, plain_text, thin_labels
from search.trace import Trace
from tests.traces import odd_traces, tiny_trace

ALL_FIGURES = [
    draw_losses,
    draw_best_losses,
    draw_finalists,
    draw_experts,
    draw_time,
    draw_prompts,
    draw_coefficients,
    draw_spread,
    draw_projection,
]


def legend_of(figure: Figure) -> list[str]:
    return [
        text.get_text() for ax in figure.axes if (legend := ax.get_legend()) for text in legend.get_texts()
    ]


def texts_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text))


@pytest.mark.parametrize("draw", ALL_FIGURES, ids=lambda draw: draw.__name__)
def test_every_figure_is_drawn_of_every_odd_run(draw, recwarn):
    for label, trace in odd_traces().items():
        assert draw({label: trace}).alt, label
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("draw", ALL_FIGURES, ids=lambda draw: draw.__name__)
def test_every_figure_is_drawn_of_several_runs_at_once_and_names_them(draw, recwarn):
    drawn = draw(odd_traces())
    drawn.figure.set_layout_engine("none")  # many times faster, and the texts are parsed all the same
    drawn.figure.draw_without_rendering()
    for label in odd_traces():
        assert plain_text(label) in texts_of(drawn.figure)
    assert not [str(warning.message) for warning in recwarn]


def test_the_axes_have_units():
    for draw in ALL_FIGURES:
        for ax in draw({"run": tiny_trace()}).figure.axes:
            assert not ax.axison or ax.get_xlabel() or ax.get_ylabel(), draw.__name__


def test_the_line_of_losses_is_the_best_so_far_on_all_prompts():
    by_time, by_tokens = draw_losses({"run": tiny_trace()}).figure.axes
    for ax, clock in ((by_time, [7.0, 17.0, 27.0]), (by_tokens, [100, 200, 300])):
        line = next(line for line in ax.lines if line.get_label() == "best so far")
        assert line.get_xdata().tolist() == clock
        assert line.get_ydata().tolist() == [0.6, 0.6, 0.5]


def test_losses_on_fewer_prompts_are_marks_of_their_own():
    ax = draw_losses({"run": tiny_trace()}).figure.axes[0]
    marks = {m.get_label(): len(m.get_offsets()) for m in ax.collections if isinstance(m, PathCollection)}
    assert marks == {"candidate on 2 prompts": 9, "candidate on all prompts": 6}


def test_references_are_lines_and_the_best_expert_says_which_prompts_it_is_on():
    drawn = draw_losses({"run": tiny_trace()}).figure
    levels = {line.get_label(): line.get_ydata()[0] for line in drawn.axes[0].lines}
    assert levels["base"] == 1.0
    assert levels["uniform"] == 0.8  # on the searched prompts; 0.85 on the unseen ones
    assert levels["best expert b\n(on unseen prompts)"] == 0.7
    assert levels["balanced"] == 0.7
    assert {"uniform", "balanced"} < set(legend_of(drawn))


def test_phases_are_named_where_they_are_wide_enough():
    text = texts_of(draw_losses({"run": tiny_trace()}).figure)
    assert "stage 0\nper model" in text
    assert "stage 1\nprofile per layer" in text


def test_the_winner_is_marked_and_what_was_refused_says_why():
    ax = draw_finalists({"run": tiny_trace()}).figure.axes[0]
    winner = next(mark for mark in ax.collections if mark.get_label() == "winner")
    assert winner.get_offsets().tolist() == [[0.6, 0.0]]
    assert "not finite" in texts_of(ax.figure)
    assert "unseen prompts" in ax.get_title(loc="left")


def test_experts_are_drawn_before_and_after():
    ax = draw_experts({"run": tiny_trace()}).figure.axes[0]
    marks = {mark.get_label(): mark.get_offsets()[:, 0].tolist() for mark in ax.collections[:4]}
    assert marks == {"base": [1.0, 1.0], "uniform": [0.5, 0.9], "balanced": [0.4, 0.8], "winner": [0.6, 0.2]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b (weak)"]


def test_both_heat_maps_of_a_run_share_one_scale_of_colours():
    images = [ax.images[0] for ax in draw_coefficients({"run": tiny_trace()}).figure.axes if ax.images]
    assert [image.get_array().shape for image in images] == [(2, 3), (2, 3)]  # adapters by groups
    assert {image.get_clim() for image in images} == {(0.0, 5.0)}
    np.testing.assert_array_equal(images[1].get_array(), [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize(("n_groups", "labels_at_most"), [(32, 36), (224, 36)])
def test_labels_of_a_wide_heat_map_are_thinned(n_groups, labels_at_most):
    positions, labels = thin_labels([f"group {number}" for number in range(n_groups)], 36)
    assert labels_at_most / 2 < len(labels) <= labels_at_most
    assert [f"group {position}" for position in positions] == labels


def test_each_stage_has_axes_of_its_own():
    for draw in (draw_spread, draw_projection):
        titles = [ax.get_title(loc="left") for ax in draw({"run": tiny_trace()}).figure.axes]
        assert sum("stage 0" in title for title in titles) == 1
        assert sum("stage 1" in title for title in titles) == 1


def test_what_is_missing_is_said():
    empty = {"run": odd_traces()["only a header"]}
    said = {draw.__name__: texts_of(draw(empty).figure) for draw in ALL_FIGURES}
    assert "no generation yet" in said["draw_losses"]
    assert "no finalists" in said["draw_finalists"]
    assert "nothing was scored yet" in said["draw_experts"]
    assert "does not tell" in said["draw_prompts"]
    assert "the search has not begun" in said["draw_coefficients"]
    assert "no generation yet" in said["draw_projection"]


def test_text_is_shown_as_it_is():
    assert plain_text("$a$\n b") == r"\$a\$ b"
    assert len(plain_text("x" * 100)) <= picture.MOST_LETTERS


def test_a_picture_shows_itself_with_a_description():
    figure, _ = make_axes([1.0])
    data, metadata = Picture(figure, "What it shows.")._repr_mimebundle_(include=None, exclude=None)
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == metadata["image/png"]["alt"] == "What it shows."
    assert metadata["image/png"]["width"] == round(picture.WIDTH * 96)


def test_no_global_state_of_matplotlib_is_used():
    for module in (figures, figures_genomes, picture):
        assert "pyplot" not in vars(module)
    before = dict(mpl.rcParams)
    draw_losses({"run": tiny_trace()})
    assert dict(mpl.rcParams) == before


def test_a_run_of_one_dimension_and_many_stages_wraps_its_panels():
    generations = [generation for generation in tiny_trace().generations[:1]]
    stages = []
    for stage in range(5):
        copy = type(generations[0])(
            **{
                **{name: getattr(generations[0], name) for name in generations[0].__slots__},
                "stage": stage,
                "index": stage,
                "genomes": np.arange(3.0)[:, None],
            }
        )
        stages.append(copy)
    panels = draw_spread({"run": Trace(tiny_trace().header, stages, [])}).figure.axes
    assert len(panels) == 6
    assert sum(ax.axison for ax in panels) == 5
