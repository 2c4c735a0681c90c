"""Translate the optimiser's flat vectors (genomes) into merging coefficients, and back.

Pure numpy: knows groups of modules, adapters and boxes; not models, losses or optimisers.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from search.groups import Groups, nest_groups
from search.profiles import fit_knots, fit_weights, make_windows
from search.transforms import Scale, Sign, invert, match_spread, pick_transform

FloatArray = NDArray[np.float64]
GenomeKind = Literal["adapter", "profile", "full"]

SMALLEST_SPREAD = 1e-6
"""Of coefficients: a genome's standard deviation must stay above 0 for the search to move at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the numbers of a genome stand for."""

    genome: GenomeKind = "full"
    """"full": a number for each row and adapter, laid end to end row by row. "adapter": one for each adapter,
    for all groups. "profile": weights (n_adapters,), then knots (n_knots,) or (n_knots, n_adapters) of the
    factor over depth that multiplies them."""
    sign: Sign = "signed"
    scale: Scale = "plain"
    top_k: int | None = None
    """In each group only so many adapters keep their coefficient, those of the largest magnitude."""
    n_knots: int = 4
    """Evenly spaced over the depth of the model."""
    shared_profile: bool = False
    """One factor for all adapters, instead of one each."""

    def __post_init__(self) -> None:
        for name, found, known in (
            ("genome", self.genome, get_args(GenomeKind)),
            ("sign", self.sign, get_args(Sign)),
            ("scale", self.scale, get_args(Scale)),
        ):
            if found not in known:
                raise ValueError(f"layout: {name} is {found!r}, expected one of {str(known)[1:-1]}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"layout: top_k is {self.top_k}, expected at least 1, or None to keep all")
        if self.n_knots < 2:
            raise ValueError(f"layout: n_knots is {self.n_knots}, expected at least 2")


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """The coefficients (n_groups, n_adapters) that genomes (n_params,) reach; a genome itself is unbounded.

    Decoding transforms the numbers to the layout's sign and scale, spreads rows over their groups, keeps the
    top k and clips to the box last, so the optimiser works in a free space.
    """

    groups: Groups
    rows: NDArray[np.int64]
    """(n_groups,) the searched row that each group obeys; every one of the n_rows has a group."""
    n_adapters: int
    layout: Layout
    low: FloatArray
    """(n_adapters,) lower bound of each adapter's coefficients, -inf where free."""
    high: FloatArray
    """(n_adapters,) upper bound, inf where free."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n_groups, n_adapters)."""
        return len(self.groups.names), self.n_adapters

    @property
    def n_rows(self) -> int:
        """How many rows are searched: coarse groups, or the groups themselves."""
        return int(self.rows.max()) + 1

    @property
    def n_params(self) -> int:
        """Length of a genome."""
        if self.layout.genome == "profile":
            return self.n_adapters + self.layout.n_knots * self._n_profiles
        return self.n_adapters * (self.n_rows if self.layout.genome == "full" else 1)

    def to_coefficients(self, genomes: ArrayLike) -> FloatArray:
        """Decode (n_candidates, n_params) into (n_candidates, n_groups, n_adapters), clipped to the box.

        Raises:
            ValueError: on another shape, or on a value that is not finite.
        """
        vectors = np.asarray(genomes, dtype=np.float64)
        if vectors.ndim != 2 or vectors.shape[1] != self.n_params:
            raise ValueError(
                f"genomes have shape {vectors.shape}, expected (n_candidates, {self.n_params}): "
                f"{self.layout.genome!r} for {self.n_rows} rows x {self.n_adapters} adapters. "
                "Pass one as genome[None]."
            )
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"{np.sum(~np.isfinite(vectors))} of {vectors.size} genome values are not finite"
            )
        table = self._decode_rows(vectors)[:, self.rows]
        if self.layout.top_k is not None:
            table = keep_largest(table, self.layout.top_k)
        return np.clip(table, self.low, self.high)

    def encode(self, coefficients: ArrayLike, spread: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return the genome (n_params,) that comes closest to coefficients, and its standard deviations.

        Rows and adapters take the mean of what they stand for; in a non-negative space what is not positive
        becomes a small positive number; a profile's weights are means over rows, its knots least squares of
        what is left. Neither top k nor box is undone. The standard deviations (n_params,) let the decoded
        coefficients spread by about `spread`; in a profile, weights and knots do so each on their own.

        Args:
            coefficients: (n_groups, n_adapters).
            spread: (n_groups, n_adapters), standard deviations of coefficients.

        Raises:
            ValueError: on another shape, a value that is not finite, or a negative spread.
        """
        table, spreads = self._check("coefficients", coefficients), self._check("spread", spread)
        if (spreads < 0).any():
            raise ValueError(f"spread has {np.sum(spreads < 0)} negative values, expected none")
        if self.layout.genome == "adapter":
            table, spreads = table.mean(axis=0, keepdims=True), spreads.mean(axis=0, keepdims=True)
        else:
            table, spreads = self._mean_rows(table), self._mean_rows(spreads)
        spreads = np.maximum(spreads, SMALLEST_SPREAD)
        if self.layout.genome == "profile":
            return self._encode_profile(table, spreads)
        raw, raw_spread = self._encode_values(table, spreads)
        return raw.reshape(-1), raw_spread.reshape(-1)

    def spread_of(
        self, genome: ArrayLike, genome_spread: ArrayLike, rng: np.random.Generator, n_samples: int = 256
    ) -> FloatArray:
        """Return the standard deviation (n_groups, n_adapters) of coefficients whose genomes are Gaussian.

        Args:
            genome: (n_params,) mean.
            genome_spread: (n_params,) standard deviations.
            rng: draws the `n_samples` genomes that are decoded.
            n_samples: more of them estimate better.

        Raises:
            ValueError: on another shape, or a value that is not finite.
        """
        center, width = np.asarray(genome, dtype=np.float64), np.asarray(genome_spread, dtype=np.float64)
        if center.shape != (self.n_params,) or width.shape != (self.n_params,):
            raise ValueError(
                f"genome {center.shape} and its spread {width.shape}, expected ({self.n_params},) both"
            )
        samples = center + width * rng.standard_normal((n_samples, self.n_params))
        deviations: FloatArray = self.to_coefficients(samples).std(axis=0)
        return deviations

    @property
    def _n_profiles(self) -> int:
        return 1 if self.layout.shared_profile else self.n_adapters

    def _decode_rows(self, vectors: FloatArray) -> FloatArray:
        """Decode genomes into (n_candidates, n_rows, n_adapters), before top k and box."""
        forward = pick_transform(self.layout.sign, self.layout.scale).forward
        n_candidates = len(vectors)
        if self.layout.genome == "full":
            return forward(vectors).reshape(n_candidates, self.n_rows, self.n_adapters)
        weights: FloatArray = forward(vectors[:, : self.n_adapters])[:, None]
        if self.layout.genome == "adapter":
            return np.broadcast_to(weights, (n_candidates, self.n_rows, self.n_adapters))
        knots = vectors[:, self.n_adapters :].reshape(n_candidates, self.layout.n_knots, self._n_profiles)
        factors: FloatArray = self._make_row_windows() @ knots  # (n_candidates, n_rows, n_profiles)
        return weights * factors

    def _encode_values(self, values: FloatArray, spreads: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return free numbers that the transform takes to `values`, and their standard deviations."""
        transform = pick_transform(self.layout.sign, self.layout.scale)
        raw = invert(transform, values)
        return raw, match_spread(transform, raw, spreads)

    def _encode_profile(self, table: FloatArray, spreads: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Fit weights and knots to rows (n_rows, n_adapters)."""
        is_shared, is_signed = self.layout.shared_profile, self.layout.sign == "signed"
        spread = spreads.mean(axis=0)
        raw, raw_spread = self._encode_values(
            fit_weights(table, is_shared=is_shared, is_signed=is_signed), spread
        )
        weights = pick_transform(self.layout.sign, self.layout.scale).forward(raw)
        knots = fit_knots(table, weights, self._make_row_windows(), is_shared=is_shared)
        if is_shared:
            weights, spread = np.sqrt((weights**2).mean(keepdims=True)), spread.mean(keepdims=True)
        # A knot that spreads by 1 turns its adapter on and off: more tells the search nothing.
        knot_spread = spread / np.maximum(np.abs(weights), spread)
        return (
            np.concatenate([raw, knots.reshape(-1)]),
            np.concatenate([raw_spread, np.broadcast_to(knot_spread, knots.shape).reshape(-1)]),
        )

    def _make_row_windows(self) -> FloatArray:
        """Return (n_rows, n_knots): the windows at the mean depth of each row's groups."""
        return make_windows(self._mean_rows(self.groups.depths[:, None])[:, 0], self.layout.n_knots)

    def _mean_rows(self, table: FloatArray) -> FloatArray:
        """Average a table (n_groups, k) over the groups of each row, (n_rows, k)."""
        sums = np.zeros((self.n_rows, table.shape[1]))
        np.add.at(sums, self.rows, table)
        return sums / np.bincount(self.rows)[:, None]

    def _check(self, name: str, values: ArrayLike) -> FloatArray:
        """Return a finite table (n_groups, n_adapters), or raise."""
        table = np.asarray(values, dtype=np.float64)
        if table.shape != self.shape:
            raise ValueError(
                f"{name} have shape {table.shape}, expected (n_groups, n_adapters) = {self.shape}"
            )
        if not np.isfinite(table).all():
            raise ValueError(f"{np.sum(~np.isfinite(table))} of {table.size} {name} values are not finite")
        return table


def make_space(
    groups: Groups,
    n_adapters: int,
    *,
    coarse: Groups | None = None,
    layout: Layout = Layout(),
    low: ArrayLike = -np.inf,
    high: ArrayLike = np.inf,
) -> Space:
    """Build a space; `low` and `high` are one number for all adapters, or one each.

    Args:
        groups: the rows of the coefficients, the finest.
        n_adapters: their columns.
        coarse: groups to search by, each of which holds whole groups; without it every group by itself.
        layout: what a genome means.
        low: bounds, applied last.
        high: the same.

    Raises:
        ValueError: when there is no adapter, a lower bound lies above its upper bound, or the groups do not
            nest.
    """
    if n_adapters < 1:
        raise ValueError(f"n_adapters is {n_adapters}, expected at least 1")
    lower = np.broadcast_to(np.asarray(low, dtype=np.float64), (n_adapters,)).copy()
    upper = np.broadcast_to(np.asarray(high, dtype=np.float64), (n_adapters,)).copy()
    if not (lower <= upper).all():
        raise ValueError(f"lower bounds {lower.tolist()} exceed upper bounds {upper.tolist()}")
    rows = np.arange(len(groups.names)) if coarse is None else nest_groups(groups, coarse)
    return Space(groups, rows, n_adapters, layout, lower, upper)


def keep_largest(table: FloatArray, top_k: int) -> FloatArray:
    """Set to 0 all but the `top_k` largest magnitudes along the last axis; of equal ones the first stay."""
    order = np.argsort(-np.abs(table), axis=-1, kind="stable")[..., :top_k]
    kept = np.zeros_like(table)
    np.put_along_axis(kept, order, np.take_along_axis(table, order, axis=-1), axis=-1)
    return kept
