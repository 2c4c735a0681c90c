"""What the fidelity benchmark wants: which prompts, merges and searches on which variants, in which order.

Knows settings and jobs; not how a job is done or what becomes of its result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from benchmarks.drawn_merges import draw_merges
from benchmarks.fidelity_collect import BASE, PROMPT_SEED, Batch
from benchmarks.fidelity_rows import DEFAULT
from benchmarks.fidelity_scene import SOURCES, PromptJob, Scene
from benchmarks.long_search import (
    N_CANDIDATES,
    N_PROMPTS,
    SearchJob,
    SearchPlan,
    SpaceName,
    prompts_of_search,
)
from search.objective import OBJECTIVES
from search.space import FloatArray

VISITED = "visited"
"""Kind of the merges that searches come by."""
SPACES: tuple[SpaceName, ...] = ("model", "layer")
"""The default first."""
VISITED_SHARE = 0.3
"""Of all merges."""
VISITING_OBJECTIVES = (DEFAULT.name, "forward_kl", "entropy_gap")
"""Of the searches that are visited: what they are led by, or misled."""
LONGEST_VISITING = 480
"""Evaluations."""
VISITING_SHARE = 0.05
"""Of a long search's evaluations, where these are few."""
BATCH = 10
"""Merges measured at a time."""
TERM_WEIGHTS = {"retention": (0.1, 0.3, 1.0), "pull": (0.1, 0.3, 1.0), "smooth": (0.3, 3.0)}
"""Term -> weights that the default objective is searched with by layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The settings."""

    n_merges: int
    per_adapter: int
    """Prompts of each source that merges are ranked by."""
    evaluations: int
    """Of a long search."""
    seeds: tuple[int, ...]
    """Of long searches."""

    @property
    def search_prompts(self) -> int:
        """Prompts an adapter that a search goes by."""
        return min(self.per_adapter, N_PROMPTS)

    def ranking_prompts(self, scene: Scene) -> list[PromptJob]:
        """Return the prompts that merges are ranked by."""
        return [PromptJob(scene, source, self.per_adapter, PROMPT_SEED) for source in SOURCES]

    def searched_prompts(self, scene: Scene, seeds: Sequence[int]) -> list[PromptJob]:
        """Return the prompts that searches with these seeds go by."""
        wanted = prompts_of_search(self.search_prompts)
        return [PromptJob(scene, source, n, seed) for seed in seeds for source, n in wanted]

    def visiting(self, scene: Scene) -> list[SearchJob]:
        """Return the short searches whose candidates are merges to rank."""
        evaluations = int(np.clip(VISITING_SHARE * self.evaluations, N_CANDIDATES, LONGEST_VISITING))
        plans = [SearchPlan(o, space, 0, evaluations) for o, space in product(VISITING_OBJECTIVES, SPACES)]
        n_visited = round(VISITED_SHARE * self.n_merges)
        return [SearchJob(scene, plan, self.search_prompts) for plan in plans[:n_visited]]

    def batches(self, scene: Scene, visited: Sequence[FloatArray]) -> list[Batch]:
        """Return the merges to measure, the base first: visited ones, evenly over searches, and drawn ones.

        Args:
            scene: loaded here on the CPU.
            visited: candidates (n, n_groups, n_adapters) of each short search.
        """
        loaded, n_visited = replace(scene, device="cpu").load(), round(VISITED_SHARE * self.n_merges)
        shares = [n_visited // len(visited) + (k < n_visited % len(visited)) for k in range(len(visited))]
        seen = [spread_out(tables, n) for tables, n in zip(visited, shares, strict=True)]
        n_seen = sum(map(len, seen))
        rng, depths = np.random.default_rng(0), loaded.parts.groups.depths
        kinds, drawn = draw_merges(self.n_merges - n_seen, loaded.setup.balanced, depths, rng)
        tables = np.concatenate([np.zeros((1, *loaded.parts.shape)), *seen, drawn])
        kinds = [BASE, *[VISITED] * n_seen, *kinds]
        return [
            Batch(scene, self.per_adapter, tuple(kinds[start : start + BATCH]), tables[start : start + BATCH])
            for start in range(0, len(tables), BATCH)
        ]

    def searches(self) -> Iterator[SearchPlan]:
        """Yield the long searches, a seed at a time, first what the defaults are weighed against.

        The default objective in each space; the others as by default; added terms; the others by layer.
        """
        others = [name for name in OBJECTIVES if name != DEFAULT.name]
        for seed in self.seeds:
            for objective, space in [*product([DEFAULT.name], SPACES), *product(others, SPACES[:1])]:
                yield SearchPlan(objective, space, seed, self.evaluations)
            for term, weights in TERM_WEIGHTS.items():
                for weight in weights:
                    yield SearchPlan(DEFAULT.name, "layer", seed, self.evaluations, **{term: weight})
            for objective in others:
                yield SearchPlan(objective, "layer", seed, self.evaluations)


def spread_out(tables: FloatArray, n: int) -> FloatArray:
    """Return `n` of the tables, or all where there are fewer, evenly over their order."""
    spaced = np.linspace(0, len(tables) - 1, min(n, len(tables)))
    chosen: FloatArray = tables[spaced.round().astype(int)]
    return chosen
