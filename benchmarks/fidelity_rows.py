"""Make the lines of the fidelity benchmark of measured merges: one for each source and thing told of it.

Knows measured merges and statistics; not models, files of lines or how lines are shown.
"""

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fidelity_collect import NAMES, PROMPT_SEED, Collected
from benchmarks.fidelity_scene import TASKS, Scene
from benchmarks.fidelity_statistics import COMBINES, WHERE, Judge, check_bound, draw_subsets, spearman
from benchmarks.long_search import penalties
from benchmarks.zoo.queries import SHIPPED_HELD_OUT
from search.settings import ObjectiveSettings, PromptSettings
from search.space import FloatArray

DEFAULT = ObjectiveSettings()
SOURCE = "skeleton"
"""What the search has."""
ANSWERED = ("skeleton", "task")
"""Sources whose prompts have an answer apart."""
WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of terms added to the loss."""
COLUMNS = (
    "objective",
    "combine",
    "positions",
    *(f"{name}{end}" for name in WHERE for end in ("", "_low", "_high")),
)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StatisticsJob:
    """What is to be told of one source of prompts."""

    scene: Scene
    per_adapter: int
    source: str
    paths: tuple[Path, ...]
    """Of the measured merges."""


def make_rows(job: StatisticsJob) -> list[Row]:
    """Return the lines of one source; for the search's own, those that are about merges too."""
    ranked = Ranked(job)
    rows = [ranked.ranking(), ranked.prompts_needed()]
    if job.source == SOURCE:
        rows += [ranked.terms(), ranked.bound(), ranked.points()]
    return [{"source": job.source, "n_merges": len(ranked.kinds), **row} for row in rows]


class Ranked:
    """One source of one variant, with the truth about its merges."""

    def __init__(self, job: StatisticsJob) -> None:
        """Read what was measured."""
        loaded = job.scene.load()
        self._source, self._collected, self._n_examples = (
            job.source,
            Collected(job.paths),
            job.scene.n_examples,
        )
        self._prompts = loaded.prompts(job.source, job.per_adapter, PROMPT_SEED)
        self._names = loaded.parts.names
        self._own = np.array([loaded.own[task] for task in self._names])
        accuracies = self._collected.of_merges("accuracies").astype(np.float64)
        self._tasks = accuracies[:, [TASKS.index(task) for task in self._names]]  # (n_merges, n_experts)
        held_out = accuracies[:, [TASKS.index(task) for task in SHIPPED_HELD_OUT]].mean(axis=1)
        self._judge = Judge((self._tasks / self._own).mean(axis=1), held_out)
        self._positions = ("answer", "all") if job.source in ANSWERED else ("all",)
        self.kinds = self._collected.of_merges("kinds")
        """(n_merges,)"""

    def ranking(self) -> Row:
        """How every objective and combination ranks merges; on other positions with the default one alone.

        By distribution, too, with the default combination on the default positions.
        """
        entries, by_kind = [], {}
        for positions, objective in product(self._positions, NAMES):
            distances = self._distances(objective, positions)
            for combine in COMBINES if positions == self._positions[0] else [DEFAULT.combine]:
                losses = COMBINES[combine](distances)
                ranks = self._judge.judge(losses).values()
                numbers = [value for rank in ranks for value in (rank.rho, rank.low, rank.high)]
                entries.append([objective, combine, positions, *map(rounded, numbers)])
                if combine == DEFAULT.combine and positions == self._positions[0]:
                    by_kind[objective] = self._by_kind(losses)
        return {"part": "ranking", "columns": COLUMNS, "entries": entries, "by_kind": by_kind}

    def prompts_needed(self) -> Row:
        """How the default objective ranks merges on n prompts an adapter, mean over random subsets."""
        rng, most = np.random.default_rng(0), self._most_prompts
        lengths, curve = np.array([len(ids) for ids in self._prompts.ids]), []
        for n in sorted({*(2**k for k in range(most.bit_length())), most}):
            subsets = draw_subsets(self._prompts.expert, n, rng)
            losses = [self._default(chosen) for chosen in subsets]
            point = {"prompts": n, "tokens": int(np.mean([lengths[chosen].sum() for chosen in subsets]))}
            for where in WHERE:
                point[where] = rounded(float(np.mean([self._judge.correlate(where, own) for own in losses])))
            curve.append(point)
        return {"part": "prompts_needed", "curve": {name: [p[name] for p in curve] for name in curve[0]}}

    def terms(self) -> Row:
        """How the default loss with a term added ranks merges, by the term's weight."""
        pull, smooth = penalties(self._collected.of_merges("tables"))
        retention = self._collected.of_merges("retention").astype(np.float64)
        losses, curves = self._default(), {}
        for term, values in {"retention": retention, "pull": pull, "smooth": smooth}.items():
            mixed = [losses + weight * values for weight in WEIGHTS]
            curves[term] = {w: [rounded(self._judge.correlate(w, own)) for own in mixed] for w in WHERE}
        return {"part": "terms", "weights": WEIGHTS, "curves": curves}

    def bound(self) -> Row:
        """How the label-free bound fares, on as many prompts as a run has unseen ones, and on all."""
        misses = self._collected.per_prompt(self._source, "top1_disagreement", self._positions[0])
        most, checks = self._most_prompts, []
        for n in sorted({min(most, PromptSettings().unseen_per_adapter), most}):
            own = [np.flatnonzero(self._prompts.expert == e)[:n] for e in range(len(self._names))]
            agreement = np.stack([(misses[:, rows] == 0).mean(axis=1) for rows in own], axis=1)
            found = asdict(check_bound(self._own - self._tasks, self._n_examples, agreement, n))
            merge, expert = found.pop("worst_pair")
            worst = {"worst_kind": str(self.kinds[merge]), "worst_expert": self._names[expert]}
            checks.append(
                {
                    "prompts": n,
                    **{k: v if isinstance(v, int) else rounded(v) for k, v in found.items()},
                    **worst,
                }
            )
        return {"part": "bound", "checks": checks}

    def points(self) -> Row:
        """Every merge's default loss and true accuracies, by distribution."""
        columns = {"loss": self._default(), "held_in": self._judge.held_in, "held_out": self._judge.held_out}
        points = {
            kind: {
                name: [rounded(value) for value in values[self.kinds == kind]]
                for name, values in columns.items()
            }
            for kind in dict.fromkeys(self.kinds.tolist())
        }
        return {"part": "points", "points": points}

    @property
    def _most_prompts(self) -> int:
        """Prompts that every adapter has."""
        return int(np.bincount(self._prompts.expert).min())

    def _distances(
        self, objective: str, positions: str, chosen: NDArray[np.intp] | None = None
    ) -> FloatArray:
        return self._collected.per_expert(self._source, objective, positions, self._prompts, chosen)

    def _default(self, chosen: NDArray[np.intp] | None = None) -> FloatArray:
        """Losses (n_merges,) as the default objective has them, on chosen prompts."""
        return COMBINES[DEFAULT.combine](self._distances(DEFAULT.name, self._positions[0], chosen))

    def _by_kind(self, losses: FloatArray) -> dict[str, list[float | None]]:
        """Rank correlations with held-in N and held-out accuracy within each distribution."""
        judge, found = self._judge, {}
        for kind in dict.fromkeys(self.kinds.tolist()):
            own = self.kinds == kind
            found[kind] = [rounded(spearman(losses[own], a[own])) for a in (judge.held_in, judge.held_out)]
        return found


def rounded(value: float) -> float | None:
    """Return a number short enough for a line, None for NaN, which JSON has not."""
    return None if np.isnan(value) else round(float(value), 3)
