"""From settings to what a search needs: its groups of modules, its stages, its optimiser.

Knows settings and spaces; not models, prompts or the trace.
"""

from collections.abc import Iterable

from search.config import SearchConfig
from search.finalists import Bounds
from search.groups import GroupKind, Groups, group_modules
from search.loop import Limits
from search.settings import SearchSettings, SpaceSettings
from search.space import Layout, make_space
from search.stages import OptimizerChoice, Stage

_FINE_TO_COARSE: tuple[GroupKind, ...] = ("module", "part", "layer", "block", "model")


def list_spaces(settings: SearchSettings) -> list[tuple[SpaceSettings, float]]:
    """Return the space of each stage, coarse to fine, and its share; one stage where none is asked for."""
    if not settings.stages:
        return [(settings.space, 1.0)]
    spaces = []
    for stage in settings.stages:
        replaced = stage.model_dump(exclude={"share"}, exclude_none=True)
        spaces.append((settings.space.model_copy(update=replaced), stage.share))
    return spaces


def finest_grouping(settings: SearchSettings) -> GroupKind:
    """Return the finest grouping of any stage: what the run's coefficients are by."""
    return min((space.groups for space, _ in list_spaces(settings)), key=_FINE_TO_COARSE.index)


def plan_stages(config: SearchConfig, groups: Groups, n_adapters: int, bounds: Bounds) -> list[Stage]:
    """Return the stages to search `groups`, the finest, by."""
    modules = list(groups.group_of)
    return [
        _plan_stage(space, share, modules, groups, n_adapters, bounds)
        for space, share in list_spaces(config.search)
    ]


def _plan_stage(
    space: SpaceSettings,
    share: float,
    modules: Iterable[str],
    groups: Groups,
    n_adapters: int,
    bounds: Bounds,
) -> Stage:
    layout = Layout(
        genome=space.genome,
        sign=space.sign,
        scale=space.scale,
        top_k=space.top_k,
        n_knots=space.n_knots,
        shared_profile=space.shared_profile,
    )
    coarse = group_modules(modules, space.groups, space.layers_per_block)
    made = make_space(groups, n_adapters, coarse=coarse, layout=layout, low=bounds.low, high=bounds.high)
    return Stage(space=made, share=share, settings=space.model_dump(mode="json"))


def choose_optimizer(settings: SearchSettings) -> OptimizerChoice:
    """Return which optimiser is to search."""
    return OptimizerChoice(name=settings.optimizer, n_candidates=settings.n_candidates, seed=settings.seed)


def set_limits(settings: SearchSettings) -> Limits:
    """Return where the search ends, and how a generation is raced."""
    return Limits(
        max_evaluations=settings.max_evaluations,
        n_finalists=settings.n_finalists,
        race_keep=settings.race_keep,
        seed=settings.seed,
    )
