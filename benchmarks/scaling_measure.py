"""What one point costs: seconds, tokens/s, the ratio to the base's own forward passes, peak memory.

Knows scenes, evaluators and clocks; not which points there are, files or figures.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.bench_population_forward import ForwardScene
from benchmarks.bench_search_step import OBJECTIVE
from benchmarks.scaling_points import PROMPTS_PER_ADAPTER, Point
from benchmarks.speed_scene import Sizes, build_model, draw_prompts
from benchmarks.timing import peak_gib, time_interleaved
from search.compiled import pad_to, row_sizes
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import TokenBudget, expert_signals
from search.passes import Passes

Ways = dict[str, Callable[[], object]]
_EAGER, _COMPILED = "eager", "compiled"
_MOST_REPEATS = 3
"""Of a generation, which takes many passes already."""


class Models:
    """The model that was built last: points that differ in adapters or batches share it."""

    def __init__(self, device: torch.device) -> None:
        """Build nothing yet."""
        self._device = device
        self._sizes: Sizes | None = None
        self._model: Any = None

    def get(self, sizes: Sizes) -> Any:
        """Return a model of these sizes; another one that is held is let go of first."""
        own = replace(sizes, n_adapters=1, n_tokens=1, tokens_per_forward=1)  # what no weight depends on
        if self._sizes != own:
            self.drop()
            self._model, self._sizes = build_model(sizes, self._device), own
        return self._model

    def drop(self) -> None:
        """Let go of the model, and of what its passes left on the device."""
        self._sizes = self._model = None
        free(self._device)


def free(device: torch.device) -> None:
    """Give the device back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_point(
    point: Point, models: Models, device: torch.device, *, compiled: bool, repeats: int
) -> dict[str, Any]:
    """Return a point's measures, or what failed: running out of memory is an answer too.

    `compiled` in what is returned says whether compiling was asked for and worked; where it did not, the
    eager ways stand alone.
    """
    try:
        scene = ForwardScene(
            point.sizes, device, compiled=compiled, model=models.get(point.sizes), rank=point.rank
        )
        if point.n_candidates is None:
            return _measure_forward(scene, point, repeats)
        return _measure_generation(scene, point.n_candidates, min(repeats, _MOST_REPEATS))
    except torch.OutOfMemoryError:
        failure = "out of memory"
    except Exception as error:  # noqa: BLE001 (a device's and a compiler's errors share no class)
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    models.drop()  # outside the except block, where the failed point's tensors are free
    return {"failure": failure}


def _measure_forward(scene: ForwardScene, point: Point, repeats: int) -> dict[str, Any]:
    """Time full passes of the base and of a population, and the objective where it can change."""
    n_rows = scene.rows_of(point.sizes.tokens_per_forward)
    table = scene.coefficients(n_rows)
    ways: Ways = {
        f"base_{_EAGER}": lambda: scene.forward(n_rows, eager=True),
        f"population_{_EAGER}": lambda: scene.mixed(table, scene.stacked, scene.groups, eager=True),
    }
    if scene.compiled:
        ways[f"base_{_COMPILED}"] = lambda: scene.forward(n_rows)
        ways[f"population_{_COMPILED}"] = lambda: scene.mixed(table, scene.stacked, scene.groups)
    if point.has_objective:
        ways |= _objective_ways(scene, n_rows)
    return _timed(scene, ways, n_rows * point.sizes.n_tokens, repeats)


@torch.no_grad()
def _objective_ways(scene: ForwardScene, n_rows: int) -> Ways:
    """Return the objective on the scored positions of one full pass, whose logits are kept."""
    prompts = draw_prompts(scene.sizes, 2 * scene.sizes.n_adapters)
    case = scene.model, scene.stacked, scene.groups, prompts
    signals = expert_signals(*case, TokenBudget(prompts.n_tokens))
    rows = [row % prompts.n_prompts for row in range(n_rows)]
    plain = Passes(*case, signals)
    logits = plain.mixed(scene.coefficients(n_rows), rows)
    ways: Ways = {f"objective_{_EAGER}": lambda: plain.sums(OBJECTIVE, logits, rows)}
    if scene.compiled:
        fused = Passes(*case, signals, compiled=True)
        ways[f"objective_{_COMPILED}"] = lambda: fused.sums(OBJECTIVE, logits, rows)
    return ways


def _measure_generation(scene: ForwardScene, n_candidates: int, repeats: int) -> dict[str, Any]:
    """Time one generation from coefficients to its sums, beside the base's passes over as many rows."""
    sizes, prompts = scene.sizes, draw_prompts(scene.sizes, PROMPTS_PER_ADAPTER * scene.sizes.n_adapters)
    case = scene.model, scene.stacked, scene.groups, prompts
    batches = _batches(scene, n_candidates * prompts.n_prompts)
    for n_rows in {*batches}:  # what cannot be compiled shows here
        scene.mixed(scene.coefficients(n_rows), scene.stacked, scene.groups)
        scene.forward(n_rows)
    how, budget = _COMPILED if scene.compiled else _EAGER, TokenBudget(sizes.tokens_per_forward)
    scoring = Scoring(
        objective=OBJECTIVE, compiled=scene.compiled, tokens_per_forward=sizes.tokens_per_forward
    )
    evaluator = PopulationEvaluator(*case, expert_signals(*case, budget), scoring, budget)
    evaluator._folds = False  # what is measured here is the population, on a CPU too
    table, blocks = scene.coefficients(n_candidates).numpy(), range(evaluator.n_blocks)
    ways: Ways = {
        f"base_{how}": lambda: [scene.forward(n_rows) for n_rows in batches],
        f"population_{how}": lambda: evaluator.score_blocks(table, blocks),
    }
    found = _timed(scene, ways, n_candidates * prompts.n_tokens, repeats, warm_ups=1)
    return {
        **found,
        "candidates_per_s": _round(1000 * n_candidates / found["ms"][f"population_{how}"]),
        "tokens_a_candidate": prompts.n_tokens,
        "out_of_memory": evaluator.oom_events,
    }


def _batches(scene: ForwardScene, n_rows: int) -> list[int]:
    """Return the rows of each pass that a search makes of so many: full ones, and a padded last one."""
    per_pass = scene.rows_of(scene.sizes.tokens_per_forward)
    full, rest = divmod(n_rows, per_pass)
    sizes = row_sizes(scene.sizes.n_tokens, scene.sizes.tokens_per_forward) if scene.compiled else []
    return [per_pass] * full + ([pad_to(rest, sizes)] if rest else [])


def _timed(scene: ForwardScene, ways: Ways, n_tokens: int, repeats: int, warm_ups: int = 2) -> dict[str, Any]:
    """Time all ways in turn; return what they took, without those that were to be compiled and were not."""
    with torch.no_grad():
        seconds = time_interleaved(ways, scene.device, repeats=repeats, warm_ups=warm_ups)
        peaks = {name: peak_gib(scene.device, way) for name, way in ways.items()}
    dropped = () if scene.compiled else (_COMPILED,)
    names = [name for name in ways if not name.endswith(dropped)]
    return {
        "compiled": scene.compiled,
        "tokens": n_tokens,
        "ms": {name: _round(1000 * seconds[name]) for name in names},
        "tokens_per_s": {name: round(n_tokens / seconds[name]) for name in names},
        "of_base": _of_base(seconds, names),
        "peak_gib": {name: None if (peak := peaks[name]) is None else round(peak, 3) for name in names},
    }


def _of_base(seconds: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return each way's time in forward passes of the base, run in the same manner."""
    ratios = {}
    for name in names:
        what, _, how = name.rpartition("_")
        if what != "base":
            ratios[name] = round(seconds[name] / seconds[f"base_{how}"], 4)
    return ratios


def _round(value: float) -> float:
    """Keep five digits: no clock has more."""
    return float(f"{value:.5g}")
