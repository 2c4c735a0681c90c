"""Space: genomes and coefficients translate both ways, and modules fall into the right groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.groups import group_modules
from search.space import make_space

LLAMA = [f"model.layers.{i}.self_attn.{p}_proj" for i in (10, 0, 2) for p in "qv"]


def test_one_group_for_the_whole_model():
    groups = group_modules(LLAMA, "model")
    assert groups.names == ("model",)
    assert groups.group_of == dict.fromkeys(LLAMA, 0)


def test_layers_are_ordered_by_depth_and_only_those_with_modules_exist():
    groups = group_modules(LLAMA, "layer")
    assert groups.names == ("layer.0", "layer.2", "layer.10")
    assert groups.group_of["model.layers.10.self_attn.q_proj"] == 2


def test_modules_without_a_layer_form_a_last_group():
    groups = group_modules(["lm_head", "transformer.h.1.attn.c_attn", "transformer.h.0.mlp.0.proj"], "layer")
    assert groups.names == ("layer.0", "layer.1", "other")
    assert groups.group_of == {
        "lm_head": 2,
        "transformer.h.1.attn.c_attn": 1,
        "transformer.h.0.mlp.0.proj": 0,
    }


@given(st.permutations(LLAMA))
def test_groups_do_not_depend_on_the_order_of_modules(modules):
    assert group_modules(modules, "layer") == group_modules(LLAMA, "layer")


def test_grouping_nothing_or_by_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no modules"):
        group_modules([], "layer")
    with pytest.raises(ValueError, match="'model', 'layer'"):
        group_modules(LLAMA, "head")


@given(st.integers(1, 5), st.integers(0, 4))
def test_a_genome_survives_the_way_to_coefficients_and_back(n_adapters, n_candidates):
    space = make_space(group_modules(LLAMA, "layer"), n_adapters)
    genomes = np.random.default_rng(0).normal(size=(n_candidates, space.n_params))
    coefficients = space.to_coefficients(genomes)
    assert coefficients.shape == (n_candidates, *space.shape)
    assert space.n_params == 3 * n_adapters
    for genome, table in zip(genomes, coefficients, strict=True):
        np.testing.assert_array_equal(space.to_genome(table), genome)


def test_a_genome_is_laid_out_group_by_group():
    space = make_space(group_modules(LLAMA, "layer"), 2)
    np.testing.assert_array_equal(space.to_coefficients([[0, 1, 2, 3, 4, 5]])[0], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(space.to_coefficients(space.constant(0.3)[None])[0], np.full((3, 2), 0.3))


def test_the_box_of_each_adapter_clips_when_decoding():
    space = make_space(group_modules(LLAMA, "layer"), 2, low=[-0.5, -np.inf], high=[1.0, np.inf])
    decoded = space.to_coefficients([[-3, -3, 3, 3, 0.2, 0.2]])[0]
    np.testing.assert_array_equal(decoded, [[-0.5, -3], [1.0, 3], [0.2, 0.2]])


def test_wrong_shapes_and_values_are_named():
    space = make_space(group_modules(LLAMA, "layer"), 2)
    with pytest.raises(ValueError, match=r"shape \(6,\), expected \(n_candidates, 6\)"):
        space.to_coefficients(np.zeros(6))
    with pytest.raises(ValueError, match="1 of 6 genome values are not finite"):
        space.to_coefficients([[0, 0, np.nan, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"expected \(n_groups, n_adapters\) = \(3, 2\)"):
        space.to_genome(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="at least 1"):
        make_space(space.groups, 0)
    with pytest.raises(ValueError, match="exceed upper bounds"):
        make_space(space.groups, 2, low=1, high=[0, 2])


def test_the_arrays_of_a_space_are_its_own():
    coefficients = np.ones((3, 2))
    genome = make_space(group_modules(LLAMA, "layer"), 2).to_genome(coefficients)
    genome[:] = 7
    assert (coefficients == 1).all()
