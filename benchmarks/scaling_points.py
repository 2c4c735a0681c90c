"""Which points are measured: a centre, and one thing at a time moved away from it.

Knows sizes; builds and measures nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.speed_scene import MISTRAL_7B, TINY, Sizes

RANK = 8
"""Of each adapter, wherever it is not what is swept."""
RANKS_OF = 16
"""Adapters in the sweep of total_rank, all of one rank: 1 at a total of 16, 64 at 1,024."""
PROMPTS_PER_ADAPTER = 1
"""In the sweep of the population: what a candidate is scored on."""

CENTRE = replace(MISTRAL_7B, n_layers=4)
"""Mistral-7B's layers, few of them: a point is built in a second, and a layer costs what it costs."""
TINY_CENTRE = replace(TINY, tokens_per_forward=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement."""

    sweep: str
    value: int
    sizes: Sizes
    rank: int = RANK
    n_candidates: int | None = None
    """Of a generation; None times forward passes alone."""
    has_objective: bool = False
    """Whether what is swept can change what the objective takes."""


def _adapters(value: int, centre: Sizes) -> Point:
    return Point(sweep="adapters", value=value, sizes=replace(centre, n_adapters=value))


def _total_rank(value: int, centre: Sizes) -> Point:
    n_adapters = min(RANKS_OF, value)
    sizes = replace(centre, n_adapters=n_adapters)
    return Point(sweep="total_rank", value=value, sizes=sizes, rank=value // n_adapters)


def _tokens(value: int, centre: Sizes) -> Point:
    sizes = replace(centre, tokens_per_forward=value)
    return Point(sweep="tokens", value=value, sizes=sizes, has_objective=True)


def _population(value: int, centre: Sizes) -> Point:
    return Point(sweep="population", value=value, sizes=centre, n_candidates=value)


def _layers(value: int, centre: Sizes) -> Point:
    return Point(sweep="layers", value=value, sizes=replace(centre, n_layers=value))


def _vocabulary(value: int, centre: Sizes) -> Point:
    sizes = replace(centre, n_vocab=value)
    return Point(sweep="vocabulary", value=value, sizes=sizes, has_objective=True)


_MAKE: dict[str, Callable[[int, Sizes], Point]] = {
    "adapters": _adapters,
    "total_rank": _total_rank,
    "population": _population,
    "layers": _layers,
    "vocabulary": _vocabulary,
    "tokens": _tokens,
}
SWEEPS: dict[str, tuple[int, ...]] = {
    "adapters": (2, 4, 8, 16, 27, 64),
    "total_rank": (16, 32, 64, 128, 256, 512, 1024),
    "population": (1, 4, 16, 64, 256),
    "layers": (2, 4, 8, 16, 32),
    "vocabulary": (8_000, 16_000, 32_000, 64_000, 128_000, 256_000),
    "tokens": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
}
"""What is swept, and its values, in the order in which they are measured: last what takes most compiling."""
TINY_SWEEPS: dict[str, tuple[int, ...]] = {
    "adapters": (2, 6),
    "total_rank": (16, 32),
    "population": (1, 4),
    "layers": (1, 2),
    "vocabulary": (160, 320),
    "tokens": (32, 64),
}


def list_points(names: Sequence[str], *, tiny: bool) -> list[Point]:
    """Return the points of some sweeps, in the sweeps' own order."""
    centre, sweeps = (TINY_CENTRE, TINY_SWEEPS) if tiny else (CENTRE, SWEEPS)
    return [
        _MAKE[name](value, centre) for name, values in sweeps.items() if name in names for value in values
    ]
