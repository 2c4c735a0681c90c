"""Learn a prior from traces: where several searches ended, and how far they disagree.

Knows headers and last events of traces (docs/TRACE.md); not models, optimisers or how a prior is used.

With x[r] the answer of run r, w[r] the standard deviation of the distribution that its search ended with,
both (n_groups, n_adapters), and n the number of runs that had an adapter, for each entry over these runs:

    start = mean of x                                                                           (1)
    disagreement = (POOLED_RUNS * pooled + sum of (x - start)^2) / (POOLED_RUNS + n - 1)        (2)
    spread = max(MIN_SPREAD, sqrt(disagreement / n + mean of w^2))                              (3)

(3) is how far the start may be off: the variance of a mean of n runs, and what each run left open. It is not
how far runs lie apart, which counts directions that make no difference: with that, searches began too wide
(benchmarks/LOG.md). In (2), two or three runs tell an entry's variance badly, so it is drawn to `pooled`,
the variance of all entries, as if POOLED_RUNS runs more had shown that (Smyth 2004, SAGMB 3(1), article 3).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.errors import InputError
from search.files import sha256_file
from search.priors import (
    Prior,
    PriorBase,
    PriorObjective,
    PriorProvenance,
    PriorRun,
    describe_flaw,
    find_misshapen,
)
from search.provenance import checkout_commit, library_versions
from search.space import FloatArray
from search.trace import Trace

MIN_SPREAD = 0.02
"""Smallest spread of a prior, in coefficients: below it a search could hardly leave its start."""
POOLED_RUNS = 4.0
"""Runs that the pooled disagreement counts for beside an entry's own."""
UNKNOWN_DISAGREEMENT = 0.5
"""Disagreement that is assumed where no adapter was in two runs, over the root mean square of the start."""


def learn_prior(paths: Sequence[Path]) -> Prior:
    """Combine finished runs over one base and the same groups; their order does not matter.

    A run's answer is its winner: of all it offers the one point compared on prompts that its search had not
    seen. Left out with a warning are runs without such a point, after an interrupt or for lack of time, and
    runs that a reference won (base, uniform or balanced merge, one expert, a prior): a coefficient of 0 or 1
    would be taken for what a search found, and an earlier prior would count twice.

    All others weigh the same, whatever their budget: each has beaten its references, and one that was short
    of time ends with a wider distribution, which widens (3). Adapters are matched by hash. With fewer
    adapters coefficients tend to be larger: runs over subsets then disagree, and the spread says so.

    Raises:
        InputError: for traces that are unfinished, damaged or equal, or differ in base, groups or weights.
    """
    runs = [run for path in paths if (run := _read_run(path))]
    if not runs:
        raise InputError(
            f"nothing to learn a prior from: none of {len(paths)} traces has a winner that its search found "
            "and compared on unseen prompts; give at least one that has, or search longer"
        )
    runs.sort(key=lambda run: (run.header.seed, run.ended.evaluations, run.sha256))
    _check_alike(runs)
    name_of = _name_adapters(runs)
    hashes = tuple(name_of)
    start, spread = _combine_runs(
        np.stack([_spread_out(run, run.answer, hashes) for run in runs]),
        np.stack([_spread_out(run, run.spread, hashes) for run in runs]),
    )
    return Prior(
        names=tuple(name_of.values()),
        hashes=hashes,
        runs_of=tuple(sum(sha256 in run.hashes for run in runs) for sha256 in hashes),
        groups=runs[0].header.groups,
        start=start,
        spread=spread,
        runs=tuple(_describe_run_of(run, name_of) for run in runs),
        base=runs[0].header.base,
        provenance=PriorProvenance(checkout_commit(), library_versions()),
    )


class _TracedLine(BaseModel):
    """A part of a trace; fields that are not needed are left aside."""

    model_config = ConfigDict(allow_inf_nan=False)


class _TracedAdapter(_TracedLine):
    name: str
    sha256: str


class _TracedConfig(_TracedLine):
    objective: PriorObjective


class _TracedHeader(_TracedLine):
    config: _TracedConfig
    seed: int
    base: PriorBase
    adapters: Annotated[list[_TracedAdapter], Field(min_length=1)]
    groups: Annotated[tuple[str, ...], Field(min_length=1)]


class _TracedEnd(_TracedLine):
    ended_by: str
    evaluations: int
    spread: list[list[Annotated[float, Field(ge=0)]]]


class _TracedFinalists(_TracedLine):
    prompts: str
    names: list[str]
    losses: list[float | None]
    winner: str
    winner_coefficients: list[list[float]]


@dataclass(frozen=True, slots=True, eq=False)
class _FinishedRun:
    """What one trace says."""

    path: Path
    sha256: str
    header: _TracedHeader
    ended: _TracedEnd
    finalists: _TracedFinalists
    loss: float  # the winner's

    @property
    def hashes(self) -> list[str]:
        """(n_adapters of this run,)."""
        return [adapter.sha256 for adapter in self.header.adapters]

    @property
    def answer(self) -> FloatArray:
        """(n_groups, n_adapters of this run)."""
        return np.array(self.finalists.winner_coefficients, dtype=np.float64)

    @property
    def spread(self) -> FloatArray:
        """(n_groups, n_adapters of this run)."""
        return np.array(self.ended.spread, dtype=np.float64)


def _read_run(path: Path) -> _FinishedRun | None:
    """Read one trace; None, with a warning, where its winner is no answer."""
    trace = Trace.load(path)
    finalists, ended = trace.ending("finalists"), trace.ending("search_ended")
    if finalists is None or ended is None:
        raise InputError(f"{path}: unfinished; resume it first: python -m search resume {path.parent}")
    said = _validate_line(_TracedFinalists, finalists, f"{path}: event finalists")
    run = _FinishedRun(
        path,
        sha256_file(path),
        _validate_line(_TracedHeader, trace.header, f"{path}: header"),
        _validate_line(_TracedEnd, ended, f"{path}: event search_ended"),
        said,
        _loss_of_winner(path, said),
    )
    _check_run(run)
    if flaw := _find_no_answer(run):
        logging.getLogger(__name__).warning("%s: left out of the prior: %s", path, flaw)
        return None
    return run


def _find_no_answer(run: _FinishedRun) -> str | None:
    """Say why a run's winner tells nothing of where a search ends; None where it does."""
    winner, prompts = run.finalists.winner, run.finalists.prompts
    if winner in ("base", "uniform", "balanced", "prior") or winner.startswith("expert "):
        return f"its winner is {winner!r}, which its search did not find"
    if run.ended.ended_by == "interrupt":
        return f"its search was interrupted; to use it: python -m search resume {run.path.parent}"
    if prompts != "unseen":
        return f"its winner was compared on {prompts} prompts only, not on unseen ones"
    return None


_Line = TypeVar("_Line", bound=_TracedLine)


def _validate_line(kind: type[_Line], line: dict[str, Any], where: str) -> _Line:
    try:
        return kind.model_validate(line)
    except ValidationError as error:
        raise InputError(f"{where}: {describe_flaw(error)}; leave this trace out") from None


def _loss_of_winner(path: Path, finalists: _TracedFinalists) -> float:
    loss = dict(zip(finalists.names, finalists.losses, strict=False)).get(finalists.winner)
    if loss is None:
        found = f"{path}: event finalists: losses: found none of the winner {finalists.winner!r}"
        raise InputError(f"{found}, expected a number; leave this trace out")
    return loss


def _check_run(run: _FinishedRun) -> None:
    """Refuse a trace whose parts do not fit each other."""
    shape = len(run.header.groups), len(run.header.adapters)
    flaws = (
        ("finalists: winner_coefficients", find_misshapen(run.finalists.winner_coefficients, shape)),
        ("search_ended: spread", find_misshapen(run.ended.spread, shape)),
    )
    for where, flaw in flaws:
        if flaw:
            raise InputError(f"{run.path}: event {where}: {flaw}; leave this trace out")
    if len(set(run.hashes)) < len(run.hashes):
        twice = max(run.hashes, key=run.hashes.count)
        names = " and ".join(adapter.name for adapter in run.header.adapters if adapter.sha256 == twice)
        raise InputError(
            f"{run.path}: header: {names} have the same weights (sha256 {twice[:12]}), "
            "expected each once: leave this trace out"
        )


def _check_alike(runs: Sequence[_FinishedRun]) -> None:
    """Refuse runs that are the same one, or of another base, or with other groups."""
    first, seen = runs[0], dict[str, Path]()
    for run in runs:
        if run.sha256 in seen:
            raise InputError(f"{run.path}: the same trace as {seen[run.sha256]}; give it once")
        seen[run.sha256] = run.path
        base, expected = (r.header.base.sha256 or r.header.base.id for r in (run, first))
        if base != expected:
            raise InputError(
                f"{run.path}: found base {base}, but {expected} in {first.path}; "
                "a prior is learnt over one base: leave the others out"
            )
        found, known = (_shorten_groups(r.header.groups) for r in (run, first))
        if run.header.groups != first.header.groups:
            raise InputError(
                f"{run.path}: found groups {found}, but {known} in {first.path}; "
                "a prior is learnt over one grouping: leave the others out"
            )


def _shorten_groups(groups: tuple[str, ...]) -> str:
    return f"({', '.join(groups)})" if len(groups) < 5 else f"({groups[0]}, ..., {groups[-1]}: {len(groups)})"


def _name_adapters(runs: Sequence[_FinishedRun]) -> dict[str, str]:
    """Map each adapter's hash to the first name that it has; refuse a name with two hashes."""
    name_of: dict[str, str] = {}
    owner_of: dict[str, tuple[str, Path]] = {}
    for run in runs:
        for adapter in run.header.adapters:
            sha256, path = owner_of.setdefault(adapter.name, (adapter.sha256, run.path))
            if sha256 != adapter.sha256:
                raise InputError(
                    f"{run.path}: adapter {adapter.name!r} has sha256 {adapter.sha256[:12]}, but "
                    f"{sha256[:12]} in {path}; leave out the runs with the weights that you no longer use"
                )
            name_of.setdefault(adapter.sha256, adapter.name)
    return name_of


def _spread_out(run: _FinishedRun, table: FloatArray, hashes: Sequence[str]) -> FloatArray:
    """Put a run's columns where the prior has them, (n_groups, n_adapters); NaN for adapters it had not."""
    wide = np.full((len(table), len(hashes)), np.nan)
    wide[:, [hashes.index(sha256) for sha256 in run.hashes]] = table
    return wide


def _combine_runs(answers: FloatArray, spreads: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return start and spread (n_groups, n_adapters) of (n_runs, n_groups, n_adapters), NaN where not had."""
    n = np.isfinite(answers).sum(axis=0)
    start = np.nansum(answers, axis=0) / n  # (1)
    squares = np.nansum((answers - start) ** 2, axis=0)
    if (n > 1).any():
        pooled = squares.sum() / (n - 1).sum()
    else:
        pooled = UNKNOWN_DISAGREEMENT**2 * np.mean(start**2)
    disagreement = (POOLED_RUNS * pooled + squares) / (POOLED_RUNS + n - 1)  # (2)
    within = np.nansum(spreads**2, axis=0) / n
    return start, np.maximum(MIN_SPREAD, np.sqrt(disagreement / n + within))  # (3)


def _describe_run_of(run: _FinishedRun, name_of: dict[str, str]) -> PriorRun:
    return PriorRun(
        trace=f"{run.path.absolute().parent.name}/{run.path.name}",
        sha256=run.sha256,
        seed=run.header.seed,
        evaluations=run.ended.evaluations,
        ended_by=run.ended.ended_by,
        objective=run.header.config.objective,
        winner=run.finalists.winner,
        loss=run.loss,
        adapters=tuple(name_of[sha256] for sha256 in run.hashes),
    )
