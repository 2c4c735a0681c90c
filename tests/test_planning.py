"""Planning: which spaces, groups, optimiser and limits the settings stand for."""

import numpy as np
import pytest

from search.config import SearchConfig
from search.finalists import Bounds
from search.groups import group_modules
from search.loop import Limits
from search.planning import choose_optimizer, finest_grouping, list_spaces, plan_stages, set_limits
from search.settings import SearchSettings
from search.stages import OptimizerChoice

MODULES = [
    f"model.layers.{layer}.{part}" for layer in range(6) for part in ("self_attn.q_proj", "mlp.up_proj")
]
FREE = Bounds(np.full(3, -np.inf), np.full(3, np.inf))


def plan(bounds=FREE, **search):
    config = SearchConfig(base="o/b", adapters=[{"source": f"o/{name}"} for name in "xyz"], search=search)
    fine = group_modules(MODULES, finest_grouping(config.search), config.search.space.layers_per_block)
    return fine, plan_stages(config, fine, 3, bounds)


def test_without_stages_there_is_one_with_the_settings_space():
    settings = SearchSettings(space={"groups": "part", "genome": "profile"})
    assert list_spaces(settings) == [(settings.space, 1.0)]


def test_a_stage_replaces_what_it_names_and_keeps_the_rest():
    settings = SearchSettings(
        space={"groups": "part", "genome": "profile", "sign": "non_negative", "n_knots": 3},
        stages=[
            {"share": 1, "genome": "adapter"},
            {"share": 2, "groups": "layer"},
            {"share": 3},
        ],
    )
    (first, one), (second, two), (third, three) = list_spaces(settings)
    assert (one, two, three) == (1, 2, 3)
    assert (first.groups, first.genome) == ("part", "adapter")
    assert (second.groups, second.genome) == ("layer", "profile")
    assert third == settings.space
    assert {(space.sign, space.n_knots) for space in (first, second, third)} == {("non_negative", 3)}


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_stage_may_share_its_profile_or_not(is_shared):
    stages = [{"share": 1, "shared_profile": is_shared}]
    ((space, _),) = list_spaces(SearchSettings(space={"shared_profile": not is_shared}, stages=stages))
    assert space.shared_profile == is_shared


@pytest.mark.parametrize(
    ("space", "stages", "finest"),
    [
        ("model", [], "model"),
        ("layer", ["model", "block"], "block"),  # the space itself is no stage
        ("layer", ["part", "block"], "part"),
        ("layer", ["model", None], "layer"),
        ("block", ["layer", "module", "part"], "module"),
    ],
)
def test_coefficients_are_by_the_finest_grouping_of_any_stage(space, stages, finest):
    stages = [{"share": 1, "groups": groups} for groups in stages]
    assert finest_grouping(SearchSettings(space=space, stages=stages)) == finest


def test_every_stage_decodes_to_the_finest_groups():
    genomes = ({"genome": "adapter"}, {"genome": "profile"}, {"groups": "block"}, {"groups": "part"})
    stages = [{"share": number + 1, **genome} for number, genome in enumerate(genomes)]
    fine, planned = plan(space={"groups": "layer", "layers_per_block": 2, "n_knots": 3}, stages=stages)
    assert len(fine.names) == 12
    assert [stage.space.shape for stage in planned] == [(12, 3)] * 4
    assert [stage.space.n_params for stage in planned] == [3, 3 + 3 * 3, 3 * 3, 12 * 3]
    assert [stage.share for stage in planned] == [1, 2, 3, 4]
    assert [stage.settings["groups"] for stage in planned] == ["layer", "layer", "block", "part"]
    tables = planned[2].space.to_coefficients(np.arange(9.0)[None])[0]
    np.testing.assert_array_equal(tables, np.arange(9.0).reshape(3, 3).repeat(4, 0))


def test_the_layout_is_the_settings():
    space = {
        "groups": "layer",
        "genome": "profile",
        "sign": "non_negative",
        "scale": "log",
        "top_k": 2,
        "n_knots": 5,
        "shared_profile": True,
    }
    _, (stage,) = plan(space=space)
    layout = stage.space.layout
    assert {name: getattr(layout, name) for name in space if name != "groups"} == {
        name: value for name, value in space.items() if name != "groups"
    }
    assert stage.settings == {**space, "layers_per_block": 4}


def test_bounds_hold_in_every_stage():
    bounds = Bounds(np.array([0.2, -np.inf, 0.1]), np.array([0.5, np.inf, 0.4]))
    _, planned = plan(
        bounds, stages=[{"share": 1, "genome": kind} for kind in ("adapter", "profile", "full")]
    )
    for stage in planned:
        tables = stage.space.to_coefficients(np.random.default_rng(0).normal(size=(50, stage.space.n_params)))
        assert all(bounds.hold(table) for table in tables)
        assert tables[..., 1].min() < -1 < 1 < tables[..., 1].max()


def test_optimizer_and_limits_are_the_settings():
    settings = SearchSettings(
        optimizer="DE", n_candidates=12, seed=5, max_evaluations=99, n_finalists=3, race_keep=0.25
    )
    assert choose_optimizer(settings) == OptimizerChoice(name="DE", n_candidates=12, seed=5)
    assert set_limits(settings) == Limits(max_evaluations=99, n_finalists=3, race_keep=0.25, seed=5)
    assert set_limits(SearchSettings()).race_keep is None
