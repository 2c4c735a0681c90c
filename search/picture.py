"""A drawn figure with its description, and what all figures share: colours, grids of axes, safe labels.

Knows matplotlib's object-oriented interface and no global state of it; not traces or what is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7A7A7A"
PALETTE = BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK
"""Okabe and Ito's, which colour-blind readers tell apart; without yellow, too pale for a line."""

MOST_LETTERS = 36
WIDTH = 10.5
"""Inches."""
EMPTY_HEIGHT = 1.2
"""Inches of axes that only say why nothing is on them."""
_PNG_DPI, _CSS_DPI = 144, 96


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A figure, and in one sentence what it shows, for those who cannot see it."""

    figure: Figure
    alt: str

    def png(self) -> bytes:
        """Return the figure as a PNG file."""
        buffer = BytesIO()
        self.figure.savefig(buffer, format="png", dpi=_PNG_DPI)
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Show in a notebook, whatever its backend."""
        width = round(self.figure.get_figwidth() * _CSS_DPI)
        data = {"image/png": self.png(), "text/plain": self.alt}
        return data, {"image/png": {"width": width, "alt": self.alt}}


def make_axes(heights: Sequence[float], n_columns: int = 1) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and its axes, a list for each row; heights in inches."""
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    grid = figure.subplots(len(heights), n_columns, squeeze=False, height_ratios=list(heights))
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, grid.tolist()


def set_title(ax: Axes, label: str, runs: Mapping[str, Any], text: str, pad: float = 6) -> None:
    """Say what is shown, after the run's label where there are several runs; `pad` points above the axes."""
    ax.set_title(
        f"{plain_text(label)}: {text}" if len(runs) > 1 else text, size="medium", loc="left", pad=pad
    )


def say_nothing(ax: Axes, why: str) -> None:
    """Say on axes why there is nothing on them."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, why, ha="center", va="center", transform=ax.transAxes, color=GREY, size="large")


def add_legend(ax: Axes, place: Literal["upper left", "center left"]) -> None:
    """Explain what is drawn, if anything is, to the right of the axes."""
    if ax.get_legend_handles_labels()[0]:
        top = 1.0 if place == "upper left" else 0.5
        ax.legend(loc=place, bbox_to_anchor=(1.01, top), frameon=False, fontsize="small")


def plain_text(text: object) -> str:
    """Return text that matplotlib shows as it is: one line, not too long, no formula between dollars."""
    shown = " ".join(str(text).split())
    if len(shown) > MOST_LETTERS:
        shown = shown[: MOST_LETTERS // 2 - 1] + "…" + shown[-MOST_LETTERS // 2 :]
    return shown.replace("$", r"\$")


def thin_labels(names: Sequence[object], most: int) -> tuple[list[int], list[str]]:
    """Return positions and labels of at most `most` names, evenly spaced."""
    step = max(1, -(-len(names) // most))
    return list(range(0, len(names), step)), [plain_text(name) for name in names[::step]]
