"""Groups: modules of every kind of decoder fall into the right rows, ordered by depth, and kinds nest."""

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.groups import GroupKind, Groups, group_modules, nest_groups

LLAMA = [f"model.layers.{i}.self_attn.{p}_proj" for i in (10, 0, 2) for p in "qv"]
KINDS = get_args(GroupKind)
PARTS = {
    "model.layers.1.self_attn.q_proj": "attention",  # llama, mistral, qwen2, gemma2
    "model.layers.1.mlp.down_proj": "mlp",
    "model.layers.1.post_feedforward_layernorm": "mlp",
    "model.layers.1.input_layernorm": "other",
    "transformer.h.1.attn.c_attn": "attention",  # gpt2
    "transformer.h.1.mlp.c_fc": "mlp",
    "gpt_neox.layers.1.attention.query_key_value": "attention",
    "gpt_neox.layers.1.mlp.dense_4h_to_h": "mlp",
    "transformer.h.1.self_attention.dense": "attention",  # falcon, bloom
    "model.decoder.layers.1.fc1": "mlp",  # opt
    "transformer.blocks.1.ffn.up_proj": "mlp",  # mpt
    "model.layers.1.block_sparse_moe.experts.3.w1": "mlp",  # mixtral
    "backbone.layers.1.mixer.in_proj": "other",  # mamba
    "blocks.1": "other",
}

names = st.one_of(
    st.sampled_from(["lm_head", "model.embed_tokens"]),
    st.builds(
        "model.layers.{}.{}".format,
        st.integers(0, 13),
        st.sampled_from(["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.experts.2.w1", "norm"]),
    ),
)


def test_one_group_for_the_whole_model():
    groups = group_modules(LLAMA, "model")
    assert groups.names == ("model",)
    assert groups.group_of == dict.fromkeys(LLAMA, 0)


def test_layers_are_ordered_by_depth_and_only_those_with_modules_exist():
    groups = group_modules(LLAMA, "layer")
    assert groups.names == ("layer.0", "layer.2", "layer.10")
    assert groups.group_of["model.layers.10.self_attn.q_proj"] == 2


def test_modules_without_a_layer_form_a_last_group():
    modules = ["lm_head", "transformer.h.1.attn.c_attn", "transformer.h.0.mlp.0.proj"]
    groups = group_modules(modules, "layer")
    assert groups.names == ("layer.0", "layer.1", "other")
    assert groups.group_of == {
        "lm_head": 2,
        "transformer.h.1.attn.c_attn": 1,
        "transformer.h.0.mlp.0.proj": 0,
    }
    assert group_modules(modules, "block", 1).names == ("layers.0-0", "layers.1-1", "other")
    assert group_modules(modules, "part").names == ("layer.0.mlp", "layer.1.attention", "other")


def test_a_block_is_so_many_layers_in_a_row_and_the_last_may_be_shorter():
    modules = [f"model.layers.{i}.mlp.up_proj" for i in range(10)]
    groups = group_modules(modules, "block")
    assert groups.names == ("layers.0-3", "layers.4-7", "layers.8-9")
    assert [groups.group_of[module] for module in modules] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert group_modules(modules, "block", 6).names == ("layers.0-5", "layers.6-9")


def test_blocks_go_by_the_layers_number_where_layers_are_left_out():
    assert group_modules(LLAMA, "block").names == ("layers.0-3", "layers.8-10")


@pytest.mark.parametrize(("module", "part"), PARTS.items())
def test_the_parts_of_a_layer_are_told_by_the_name_after_its_number(module, part):
    assert group_modules([module], "part").names == (f"layer.1.{part}",)


def test_attention_comes_before_mlp_in_every_layer():
    modules = [f"h.{i}.{name}" for i in (10, 2) for name in ("norm", "mlp.c_fc", "attn.c_attn", "mlp.c_proj")]
    parts = ("attention", "mlp", "other")
    assert group_modules(modules, "part").names == tuple(
        f"layer.{i}.{part}" for i in (2, 10) for part in parts
    )


def test_modules_by_themselves_are_ordered_by_depth_then_name():
    modules = ["lm_head", "h.10.attn.c_attn", "h.2.mlp.c_fc", "h.2.attn.c_attn", "embed"]
    groups = group_modules(modules, "module")
    assert groups.names == ("h.2.attn.c_attn", "h.2.mlp.c_fc", "h.10.attn.c_attn", "embed", "lm_head")
    assert all(groups.names[place] == module for module, place in groups.group_of.items())


@pytest.mark.parametrize("kind", KINDS)
@given(st.permutations(LLAMA))
def test_groups_do_not_depend_on_the_order_of_modules(kind, modules):
    assert group_modules(modules, kind) == group_modules(LLAMA, kind)


def test_grouping_nothing_or_by_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no modules"):
        group_modules([], "layer")
    with pytest.raises(ValueError, match=r"'head'; known: 'model', 'block', 'layer', 'part', 'module'$"):
        group_modules(LLAMA, "head")
    with pytest.raises(ValueError, match="layers_per_block is 0, expected at least 1"):
        group_modules(LLAMA, "block", 0)


def test_depths_are_layers_over_the_last_layer():
    groups = group_modules([*LLAMA, "lm_head"], "layer")
    np.testing.assert_array_equal(groups.depths, [0, 0.2, 1, 1])
    np.testing.assert_allclose(group_modules(LLAMA, "block").depths, [0.1, 1])
    np.testing.assert_allclose(group_modules([*LLAMA, "lm_head"], "model").depths, [0.4])


def test_depth_is_0_where_there_is_one_layer_and_1_without_any():
    np.testing.assert_array_equal(group_modules(["h.5.attn", "h.5.mlp", "head"], "part").depths, [0, 0, 1])
    np.testing.assert_array_equal(Groups(("a", "empty"), {"x": 0}).depths, [1, 1])


@given(st.lists(names, min_size=1, max_size=25), st.integers(1, 5))
def test_every_kind_nests_in_every_coarser_one_and_depths_stay_within_0_and_1(modules, layers_per_block):
    by_kind = [group_modules(modules, kind, layers_per_block) for kind in KINDS]
    for coarse, fine in itertools.combinations_with_replacement(by_kind, 2):
        rows = nest_groups(fine, coarse)
        assert rows.shape == (len(fine.names),)
        for module, group in fine.group_of.items():
            assert rows[group] == coarse.group_of[module]
        assert (np.diff(coarse.depths[rows]) >= 0).all()
    for groups in by_kind:
        assert set(groups.group_of) == set(modules)
        assert set(groups.group_of.values()) == set(range(len(groups.names)))
        assert (groups.depths >= 0).all()
        assert (groups.depths <= 1).all()
        has_layer = [name for name in groups.names if name not in ("other", "lm_head", "model.embed_tokens")]
        assert (np.diff(groups.depths[: len(has_layer)]) >= 0).all()


def test_groups_that_do_not_nest_are_named():
    layers, blocks = group_modules(LLAMA, "layer"), group_modules(LLAMA, "block")
    with pytest.raises(ValueError, match=r"'layers.0-3' lies in 2 coarse groups \['layer.0', 'layer.2'\]"):
        nest_groups(blocks, layers)
    with pytest.raises(ValueError, match="only one of them holds 'lm_head'"):
        nest_groups(group_modules([*LLAMA, "lm_head"], "layer"), blocks)
    with pytest.raises(ValueError, match="only one of them holds 'lm_head'"):
        nest_groups(layers, group_modules([*LLAMA, "lm_head"], "block"))
    with pytest.raises(ValueError, match=r"'b' lies in 0 coarse groups \[\], expected one"):
        nest_groups(Groups(("a", "b"), {"x": 0}), Groups(("m",), {"x": 0}))
    with pytest.raises(ValueError, match="coarse group 'n' holds no module"):
        nest_groups(Groups(("a",), {"x": 0}), Groups(("m", "n"), {"x": 0}))
