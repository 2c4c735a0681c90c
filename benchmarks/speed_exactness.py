"""How exact a population is: its rounding against the base's own, and float32 against a dense merge.

Knows models and stacks; not time.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed_rivals import DenseMerge
from benchmarks.speed_scene import Sizes, draw_coefficients, in_float32
from search.groups import Groups
from search.population import Mixtures, population
from search.stack import StackedFactors

_N_ROWS, _N_DRAWS = 4, 5


@torch.no_grad()
def measure_exactness(
    model: Any,
    stacked: StackedFactors,
    groups: Groups,
    sizes: Sizes,
    mixtures: Mixtures | None = None,
    active: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Return root mean square errors of the logits, relative to those of float32; medians of five draws.

    A draw is of tokens and of a mixture. The reference has the same weights and factors, widened: `error`
    over `base_error` says what the mixture adds to the rounding that the model's type costs anyway, both by
    `mixtures` and within `active`, as a search runs them, and without (`_eager`). `floor` is what would be
    left without them if the touched layers were computed in float32 and rounded once: what the mixed function
    makes of the other layers' rounding. `float32_error` is how far float32 is from a merge whose weights were
    added up densely, `float32_floor` how far the float32 base is from itself with one row at a time, by the
    order of its sums alone. Needs memory for a float32 copy of the model.
    """
    judge = _Judge(model, stacked, groups, sizes)
    run = mixtures or Mixtures(model, stacked, groups), active
    draws = [judge.draw(seed, *run) for seed in range(_N_DRAWS)]
    ratios = [draw["error_over_base"] for draw in draws]
    return {
        "dtype": str(sizes.dtype).removeprefix("torch."),
        **{name: median(draw[name] for draw in draws) for name in draws[0]},
        "error_over_base_spread": [min(ratios), max(ratios)],
    }


class _Judge:
    """A model and adapters beside the same in float32."""

    def __init__(self, model: Any, stacked: StackedFactors, groups: Groups, sizes: Sizes) -> None:
        self._model, self._stacked, self._groups, self._sizes = model, stacked, groups, sizes
        self._wide_model, self._wide = copy.deepcopy(model).float(), in_float32(stacked)
        self._dense = DenseMerge(self._wide_model, self._wide, groups)

    def draw(
        self, seed: int, mixtures: Mixtures, active: Callable[[], AbstractContextManager[None]]
    ) -> dict[str, float]:
        """Return the errors for some tokens and one mixture."""
        model, wide_model, sizes = self._model, self._wide_model, self._sizes
        gen = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, sizes.n_vocab, (_N_ROWS, sizes.n_tokens), generator=gen).to(model.device)
        table = draw_coefficients(sizes, 1, len(self._groups.names), seed).expand(_N_ROWS, -1, -1)

        def logits(of: Any, mixed: StackedFactors | None = None, ids: Tensor = ids) -> Tensor:
            with population(of, mixed, table, self._groups) if mixed else nullcontext():
                found: Tensor = of(ids, use_cache=False).logits.float()
            return found

        def run(*, mixed: bool) -> Tensor:
            with mixtures.active(table) if mixed else nullcontext(), active():
                return logits(model)

        exact, exact_base = logits(wide_model, self._wide), logits(wide_model)
        with self._dense.merged(table[0].to(model.device)):
            merged = logits(wide_model)
            with _rounded_once(model, wide_model, self._stacked.modules):
                floor = _relative(logits(model), exact)
        alone = torch.cat([logits(wide_model, ids=row[None]) for row in ids])
        error, base_error = _relative(run(mixed=True), exact), _relative(run(mixed=False), exact_base)
        eager = _relative(logits(model, self._stacked), exact)
        base_eager = _relative(logits(model), exact_base)
        return {
            "error": error,
            "base_error": base_error,
            "error_over_base": _over(error, base_error),
            "error_over_base_eager": _over(eager, base_eager),
            "floor_over_base": _over(floor, base_eager),
            "float32_error": _relative(exact, merged),
            "float32_floor": _relative(alone, exact_base),
        }


@contextmanager
def _rounded_once(model: Any, wide_model: Any, names: Iterable[str]) -> Iterator[None]:
    """Within the context the model's named layers put out what the wide model's do, rounded to its type."""

    def hook_of(wide_layer: Any) -> Any:
        return lambda _, inputs, output: wide_layer(inputs[0].float()).to(output.dtype)

    hooks = [
        model.get_submodule(name).register_forward_hook(hook_of(wide_model.get_submodule(name)))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _over(error: float, base_error: float) -> float:
    return error / base_error if base_error else 1.0


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
