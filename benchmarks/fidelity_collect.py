"""Measure merges: true accuracy, and what every objective says prompt by prompt, from every source.

Some merges at a time, kept in a file as soon as they are measured. Knows merges, prompts and arrays; not what
is concluded from them.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.environment import code_hash
from benchmarks.fidelity_scene import SOURCES, TASKS, LoadedScene, Scene, score_everywhere
from benchmarks.yardstick import Means
from search.files import atomic_write
from search.objective import OBJECTIVES, normalise
from search.prompts import PromptSet
from search.space import FloatArray

PROMPT_SEED = 1_000
"""Of the prompts that merges are ranked by: other ones than a search sees."""
POSITIONS = ("answer", "all")
NAMES = tuple(OBJECTIVES)
FLOOR_NATS = 0.02
"""As search.evaluate has it."""
BASE = "base"
"""Kind of the merge that is the base, to normalise by."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some merges to measure."""

    scene: Scene
    per_adapter: int
    """Prompts of each source."""
    kinds: tuple[str, ...]
    """(n,) the distribution that each merge is from."""
    tables: FloatArray
    """(n, n_groups, n_adapters)."""

    @property
    def path(self) -> Path:
        """Where its arrays are: another file for other merges, prompts, examples, code or device."""
        scene = self.scene
        digest = sha256(f"{self.kinds} {scene.n_examples} {scene.device} {code_hash()}".encode())
        digest.update(np.ascontiguousarray(self.tables).tobytes())
        for source in SOURCES:
            digest.update(scene.prompt_path(source, self.per_adapter, PROMPT_SEED).read_bytes())
        return scene.folder / f"merges-{scene.experts}-{digest.hexdigest()[:16]}.npz"


class Rulers:
    """The prompts of all sources, laid out to measure merges by."""

    def __init__(self, loaded: LoadedScene, per_adapter: int) -> None:
        """Take every expert's signals."""
        prompts = {source: loaded.prompts(source, per_adapter, PROMPT_SEED) for source in SOURCES}
        device = loaded.parts.model.device
        self._loaded = loaded
        self._yardsticks = {s: loaded.yardstick(score_everywhere(own)) for s, own in prompts.items()}
        self._means = {
            source: [Means(labels, own.n_prompts, device) for labels in _label_positions(own)]
            for source, own in prompts.items()
        }
        self._retention = loaded.yardstick(score_everywhere(prompts["generic"]), of_base=True)

    def measure(self, table: FloatArray) -> dict[str, NDArray[np.float32]]:
        """Return a merge's accuracies, its divergence from the base, and values by source."""
        loaded = self._loaded
        weights = loaded.weights(table)
        accuracies = loaded.accuracies(weights)
        found = {
            "accuracies": np.array([accuracies[task] for task in TASKS], dtype=np.float32),
            "retention": _to_numpy(self._retention.measure(weights, ["forward_kl"]).mean()),
        }
        for source, yardstick in self._yardsticks.items():
            values = yardstick.measure(weights, NAMES)  # (n_objectives, n_scored)
            means = torch.stack([mean(values) for mean in self._means[source]], dim=1)
            found[source] = _to_numpy(means)  # (n_objectives, 2, n_prompts)
        return found


def _label_positions(prompts: PromptSet) -> tuple[list[int], list[int]]:
    """Return each position's prompt, in prompts that are scored everywhere: the answer's alone, and all."""
    places = [(prompt, t) for prompt, ids in enumerate(prompts.ids) for t in range(len(ids) - 1)]
    first = [scored[0] for scored in prompts.scored]
    answer = [prompt if t >= first[prompt] else -1 for prompt, t in places]
    return answer, [prompt for prompt, _ in places]


def _to_numpy(values: Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()


@cache
def _load_rulers(scene: Scene, per_adapter: int) -> Rulers:
    return Rulers(scene.load(), per_adapter)


def measure_batch(batch: Batch) -> Path:
    """Measure what is not measured yet; return the file of arrays."""
    path = batch.path
    if not path.exists():
        rulers = _load_rulers(batch.scene, batch.per_adapter)
        found = [rulers.measure(table) for table in batch.tables]
        arrays = {name: np.stack([own[name] for own in found]) for name in found[0]}
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, kinds=np.array(batch.kinds), tables=batch.tables, **arrays)
    return path


@dataclass(frozen=True, eq=False)
class Collected:
    """All merges of a variant that were measured, read from their files."""

    paths: tuple[Path, ...]

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        parts = [np.load(path) for path in self.paths]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}

    @cached_property
    def _is_merge(self) -> NDArray[np.bool_]:
        return np.asarray(self._arrays["kinds"] != BASE)

    def of_merges(self, name: str) -> NDArray[Any]:
        """Return the array (n_merges, ...) of a name, without the base."""
        return self._arrays[name][self._is_merge]

    def per_prompt(self, source: str, objective: str, positions: str) -> NDArray[np.float32]:
        """Return the mean of an objective on each prompt of a source, (n_merges, n_prompts)."""
        return self._values(source, objective, positions)[self._is_merge]

    def per_expert(
        self,
        source: str,
        objective: str,
        positions: str,
        prompts: PromptSet,
        chosen: NDArray[np.intp] | None = None,
    ) -> FloatArray:
        """Return how far merges are from each expert, (n_merges, n_experts), the base's distance being 1.

        Args:
            source: of prompts; `objective` and `positions` likewise by name.
            prompts: of the source.
            chosen: prompts to go by; all when None.
        """
        rows = np.arange(prompts.n_prompts) if chosen is None else chosen
        values = self._values(source, objective, positions)[:, rows].astype(np.float64)
        n_scored = count_positions(prompts, positions)[rows]
        member = np.eye(prompts.n_experts)[prompts.expert[rows]] * n_scored[:, None]
        means = torch.tensor(values @ (member / member.sum(axis=0)))
        merges, base = means[self._is_merge], means[~self._is_merge][0]
        return normalise(merges, base, FLOOR_NATS).numpy()

    def _values(self, source: str, objective: str, positions: str) -> NDArray[np.float32]:
        return self._arrays[source][:, NAMES.index(objective), POSITIONS.index(positions)]


def count_positions(prompts: PromptSet, positions: str) -> NDArray[np.int64]:
    """Return how many positions of each prompt (n_prompts,) count."""
    rows = prompts.scored if positions == "answer" else [ids[1:] for ids in prompts.ids]
    return np.array([len(row) for row in rows])
