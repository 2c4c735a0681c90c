"""Space: genomes and coefficients translate both ways, whatever the layout, and spread as asked."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.groups import group_modules
from search.space import Layout, keep_largest, make_space

MODULES = [f"model.layers.{i}.{name}" for i in range(6) for name in ("self_attn.q_proj", "mlp.up_proj")]
MODULES.append("lm_head")
LLAMA = [f"model.layers.{i}.self_attn.{p}_proj" for i in (10, 0, 2) for p in "qv"]
N_ADAPTERS = 3
KINDS = ("model", "block", "layer", "part", "module")
TRANSFORMS = [
    {"sign": sign, "scale": scale} for sign in ("signed", "non_negative") for scale in ("plain", "log")
]
GENOMES = [{"genome": "full"}, {"genome": "adapter"}, {"genome": "profile"}]
GENOMES.append({"genome": "profile", "shared_profile": True, "n_knots": 3})
LAYOUTS = [Layout(**genome, **transform) for genome, transform in itertools.product(GENOMES, TRANSFORMS)]
FULL = Layout()

layouts = st.sampled_from(LAYOUTS)
kinds = st.sampled_from(KINDS)


def space_of(fine="module", coarse="block", layout=FULL, **box):
    groups = group_modules(MODULES, fine, 2)
    return make_space(groups, N_ADAPTERS, coarse=group_modules(MODULES, coarse, 2), layout=layout, **box)


def coarser(kind):
    return st.sampled_from(KINDS[: KINDS.index(kind) + 1])


@st.composite
def pairs_of_kinds(draw):
    fine = draw(kinds)
    return fine, draw(coarser(fine))


@st.composite
def genomes_of(draw, space):
    """Numbers whose coefficients are of the size that merges have, and knots on both sides of 0."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    genome = rng.uniform(-0.3, 0.5, space.n_params)
    if space.layout.genome == "profile":
        genome[space.n_adapters :] = rng.uniform(-1, 3, space.n_params - space.n_adapters)
    return genome


def decode(space, genome):
    return space.to_coefficients(genome[None])[0]


def encode(space, table, spread=0.1):
    return space.encode(table, np.full(space.shape, spread))


@given(st.integers(1, 5), st.integers(0, 4))
def test_a_default_genome_survives_the_way_to_coefficients_and_back_to_the_last_bit(n_adapters, n_candidates):
    space = make_space(group_modules(LLAMA, "layer"), n_adapters)
    genomes = np.random.default_rng(0).normal(size=(n_candidates, space.n_params))
    coefficients = space.to_coefficients(genomes)
    assert coefficients.shape == (n_candidates, *space.shape)
    assert space.n_params == 3 * n_adapters
    np.testing.assert_array_equal(coefficients, genomes.reshape(n_candidates, 3, n_adapters))
    spread = np.random.default_rng(1).uniform(0.01, 1, space.shape)
    for genome, table in zip(genomes, coefficients, strict=True):
        found, found_spread = space.encode(table, spread)
        np.testing.assert_array_equal(found, genome)
        np.testing.assert_array_equal(found_spread, spread.reshape(-1))


def test_a_genome_is_laid_out_group_by_group():
    space = make_space(group_modules(LLAMA, "layer"), 2)
    np.testing.assert_array_equal(space.to_coefficients([[0, 1, 2, 3, 4, 5]])[0], [[0, 1], [2, 3], [4, 5]])


def test_the_box_of_each_adapter_clips_when_decoding():
    space = make_space(group_modules(LLAMA, "layer"), 2, low=[-0.5, -np.inf], high=[1.0, np.inf])
    decoded = space.to_coefficients([[-3, -3, 3, 3, 0.2, 0.2]])[0]
    np.testing.assert_array_equal(decoded, [[-0.5, -3], [1.0, 3], [0.2, 0.2]])


def test_the_groups_of_a_row_share_its_coefficients():
    space = make_space(
        group_modules([*LLAMA, "lm_head"], "layer"), 2, coarse=group_modules([*LLAMA, "lm_head"], "block")
    )
    assert (space.n_rows, space.n_params, space.shape) == (3, 6, (4, 2))
    np.testing.assert_array_equal(space.rows, [0, 0, 1, 2])
    np.testing.assert_array_equal(decode(space, np.arange(6)), [[0, 1], [0, 1], [2, 3], [4, 5]])


def test_a_genome_of_adapters_holds_for_all_groups():
    space = space_of(layout=Layout(genome="adapter"))
    assert space.n_params == N_ADAPTERS
    assert (decode(space, np.array([1.0, -2.0, 3.0])) == [1, -2, 3]).all()


def test_a_profile_multiplies_the_weight_by_a_factor_of_depth():
    groups = group_modules([f"h.{i}.attn" for i in range(3)], "layer")
    space = make_space(groups, 2, layout=Layout(genome="profile", n_knots=2))
    assert space.n_params == 2 + 2 * 2
    found = decode(space, np.array([2.0, -1.0, 1.0, 3.0, 2.0, 5.0]))  # knots: (1, 2), then (3, 5) by adapter
    np.testing.assert_allclose(found, [[2, -3], [3, -4], [4, -5]])
    shared = make_space(groups, 2, layout=Layout(genome="profile", n_knots=2, shared_profile=True))
    assert shared.n_params == 2 + 2
    np.testing.assert_allclose(decode(shared, np.array([2.0, -1.0, 1.0, 2.0])), [[2, -1], [3, -1.5], [4, -2]])


def test_a_row_has_the_mean_depth_of_its_groups():
    groups = group_modules([f"h.{i}.attn" for i in range(5)], "layer")
    coarse = group_modules([f"h.{i}.attn" for i in range(5)], "block", 3)
    space = make_space(groups, 1, coarse=coarse, layout=Layout(genome="profile", n_knots=5))
    np.testing.assert_allclose(
        decode(space, np.array([1.0, 0, 1, 2, 3, 4])).T, [[1, 1, 1, 3.5, 3.5]]
    )  # depths 1/4 and 7/8, where two knots count half each


def test_sign_and_scale_transform_the_numbers_but_not_the_knots():
    raw, groups = np.array([-0.2, 0.3]), group_modules(LLAMA, "model")
    formulas = (raw, 0.1 * np.sinh(raw / 0.1), 0.1 * np.log1p(np.exp(raw / 0.1)), np.exp(raw))
    for transform, expected in zip(TRANSFORMS, formulas, strict=True):
        found = decode(make_space(groups, 2, layout=Layout(**transform)), raw)
        np.testing.assert_allclose(found, [expected])
        profile = Layout(genome="profile", n_knots=2, shared_profile=True, **transform)
        found = decode(make_space(groups, 2, layout=profile), np.array([*raw, -2, -2]))
        np.testing.assert_allclose(found, [-2 * expected])


def test_only_the_largest_magnitudes_of_a_group_stay_and_of_equals_the_first():
    space = make_space(group_modules(LLAMA, "layer"), 3, layout=Layout(top_k=2))
    found = decode(space, np.array([1.0, -3.0, 2.0, 1.0, -1.0, 1.0, 0.0, 0.0, 5.0]))
    np.testing.assert_array_equal(found, [[0, -3, 2], [1, -1, 0], [0, 0, 5]])


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_keeping_the_largest_agrees_with_sorting_each_row(top_k, seed):
    table = np.random.default_rng(seed).integers(-3, 4, size=(2, 4, 5)).astype(float)
    for row, found in zip(table.reshape(-1, 5), keep_largest(table, top_k).reshape(-1, 5), strict=True):
        kept = sorted(range(5), key=lambda i: (-abs(row[i]), i))[:top_k]
        np.testing.assert_array_equal(found, [row[i] if i in kept else 0 for i in range(5)])


def test_the_box_has_the_last_word():
    space = make_space(group_modules(LLAMA, "model"), 3, layout=Layout(top_k=1), low=0.25, high=2)
    np.testing.assert_array_equal(decode(space, np.array([1.0, -5.0, 3.0])), [[0.25, 0.25, 0.25]])


@given(st.data(), pairs_of_kinds(), layouts)
def test_what_a_space_decodes_it_encodes(data, pair, layout):
    space = space_of(*pair, layout)
    table = decode(space, data.draw(genomes_of(space)))
    genome, spread = encode(space, table)
    assert genome.shape == spread.shape == (space.n_params,)
    assert np.isfinite(genome).all()
    assert np.isfinite(spread).all()
    assert (spread > 0).all()
    np.testing.assert_allclose(decode(space, genome), table, rtol=1e-7, atol=1e-9)


@given(st.data(), pairs_of_kinds(), st.sampled_from(["full", "adapter"]), st.sampled_from(TRANSFORMS))
def test_what_a_coarse_space_decodes_a_finer_one_encodes(data, pair, genome_kind, transform):
    fine, coarse = pair
    middle = data.draw(st.sampled_from(KINDS[KINDS.index(coarse) : KINDS.index(fine) + 1]))
    first = space_of(fine, coarse, Layout(genome=genome_kind, **transform), low=-0.4, high=0.6)
    table = decode(first, data.draw(genomes_of(first)))
    second = space_of(fine, middle, Layout(**transform), low=-0.4, high=0.6)
    np.testing.assert_allclose(decode(second, encode(second, table)[0]), table, rtol=1e-7, atol=1e-9)


@given(st.data(), pairs_of_kinds(), st.integers(1, N_ADAPTERS))
def test_a_table_of_few_adapters_a_group_stays_as_it_is_in_finer_groups(data, pair, top_k):
    fine, coarse = pair
    first = space_of(fine, coarse, Layout(top_k=top_k))
    table = decode(first, data.draw(genomes_of(first)))
    second = space_of(fine, fine, Layout(top_k=top_k))
    np.testing.assert_allclose(decode(second, encode(second, table)[0]), table, rtol=1e-9)


@given(st.data(), st.sampled_from(TRANSFORMS), st.booleans())
def test_a_profile_starts_from_one_weight_an_adapter(data, transform, shared_profile):
    first = space_of("part", "model", Layout(genome="adapter", **transform))
    table = decode(first, data.draw(genomes_of(first)))
    layout = Layout(genome="profile", shared_profile=shared_profile, **transform)
    second = space_of("part", "layer", layout)
    genome = encode(second, table)[0]
    np.testing.assert_allclose(decode(second, genome), table, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(genome[N_ADAPTERS:], 1, rtol=1e-7)


@given(st.data(), st.sampled_from(TRANSFORMS), st.booleans())
def test_a_full_space_starts_from_any_profile(data, transform, shared_profile):
    first = space_of("part", "layer", Layout(genome="profile", shared_profile=shared_profile, **transform))
    table = np.abs(decode(first, data.draw(genomes_of(first))))
    second = space_of("part", "part", Layout(**transform))
    np.testing.assert_allclose(decode(second, encode(second, table)[0]), table, rtol=1e-7, atol=1e-9)


@given(layouts, st.integers(0, 2**32 - 1))
def test_any_table_encodes_to_finite_numbers_and_positive_spreads(layout, seed):
    space, rng = space_of(layout=layout), np.random.default_rng(seed)
    table = rng.normal(size=space.shape) * rng.choice([0, 1e-12, 1e-3, 1, 1e6], size=space.shape)
    genome, spread = space.encode(table, rng.choice([0, 1e-9, 0.1, 10], size=space.shape))
    assert np.isfinite(genome).all()
    assert np.isfinite(spread).all()
    assert (spread > 0).all()
    assert np.isfinite(decode(space, genome)).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_a_coarser_space_takes_the_mean(seed):
    table = np.random.default_rng(seed).normal(size=(13, N_ADAPTERS))
    space = space_of("module", "model")
    assert np.allclose(decode(space, encode(space, table)[0]), table.mean(axis=0))
    space = space_of("module", "block", Layout(genome="adapter"))
    assert np.allclose(decode(space, encode(space, table)[0]), table.mean(axis=0))
    space = space_of("module", "layer")
    np.testing.assert_allclose(decode(space, encode(space, table)[0])[0], table[:2].mean(axis=0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nothing_becomes_a_small_positive_number_where_coefficients_cannot_be_0(layout):
    space = space_of(layout=layout)
    found = decode(space, encode(space, np.zeros(space.shape))[0])
    np.testing.assert_allclose(found, 0 if layout.sign == "signed" else 1e-3, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("value", [0.05, 0.4])
def test_coefficients_spread_by_about_what_was_asked(layout, value):
    space = space_of(layout=layout)
    genome, genome_spread = encode(space, np.full(space.shape, value), 0.05)
    found = space.spread_of(genome, genome_spread, np.random.default_rng(0), n_samples=4000)
    assert found.shape == space.shape
    if layout.genome == "profile":  # weights and knots both spread, and knots between rows average out
        assert (found > 0.03).all()
        assert (found < 0.12).all()
    else:
        np.testing.assert_allclose(found, 0.05, rtol=0.2)


@pytest.mark.parametrize("shared_profile", [True, False])
def test_knots_spread_as_coefficients_over_the_size_of_their_weights_and_at_most_by_1(shared_profile):
    space = space_of(layout=Layout(genome="profile", shared_profile=shared_profile))
    table = np.tile([0.5, -0.5, 0.5], (13, 1))
    np.testing.assert_allclose(encode(space, table, 0.1)[1], [0.1] * 3 + [0.2] * (space.n_params - 3))
    np.testing.assert_allclose(encode(space, table, 0.8)[1], [0.8] * 3 + [1.0] * (space.n_params - 3))


def test_a_spread_is_measured_after_box_and_transform():
    space = make_space(group_modules(LLAMA, "layer"), 2, low=[0, -np.inf], high=[0, np.inf])
    found = space.spread_of(np.zeros(6), np.full(6, 0.2), np.random.default_rng(0), n_samples=4000)
    np.testing.assert_array_equal(found[:, 0], 0)
    np.testing.assert_allclose(found[:, 1], 0.2, rtol=0.05)


def test_a_spread_depends_on_the_generator_alone():
    space = space_of(layout=Layout(genome="profile"))
    genome, width = encode(space, np.ones(space.shape))
    first, again = (space.spread_of(genome, width, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("n_adapters", [32, 224])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_generation_decodes_in_no_time(layout, n_adapters):
    space = make_space(group_modules([f"h.{i}.mlp" for i in range(27)], "layer"), n_adapters, layout=layout)
    genomes = np.random.default_rng(0).normal(size=(16, space.n_params))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        space.to_coefficients(genomes)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


def test_wrong_shapes_and_values_are_named():
    space = make_space(group_modules(LLAMA, "layer"), 2)
    with pytest.raises(
        ValueError, match=r"shape \(6,\), expected \(n_candidates, 6\): 'full' for 3 rows x 2"
    ):
        space.to_coefficients(np.zeros(6))
    with pytest.raises(ValueError, match="1 of 6 genome values are not finite"):
        space.to_coefficients([[0, 0, np.nan, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"coefficients have .*\(2, 3\), expected .* = \(3, 2\)"):
        space.encode(np.zeros((2, 3)), np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"spread have shape \(2,\)"):
        space.encode(np.zeros((3, 2)), np.ones(2))
    with pytest.raises(ValueError, match="1 of 6 coefficients values are not finite"):
        space.encode([[np.inf, 0], [0, 0], [0, 0]], np.ones((3, 2)))
    with pytest.raises(ValueError, match="spread has 2 negative values"):
        space.encode(np.zeros((3, 2)), [[1, -1], [1, -1], [1, 1]])
    with pytest.raises(ValueError, match=r"genome \(6,\) and its spread \(5,\), expected \(6,\) both"):
        space.spread_of(np.zeros(6), np.zeros(5), np.random.default_rng(0))


def test_a_space_that_cannot_be_is_refused():
    groups = group_modules(LLAMA, "layer")
    with pytest.raises(ValueError, match="at least 1"):
        make_space(groups, 0)
    with pytest.raises(ValueError, match="exceed upper bounds"):
        make_space(groups, 2, low=1, high=[0, 2])
    with pytest.raises(ValueError, match="lies in 3 coarse groups"):
        make_space(group_modules(LLAMA, "model"), 2, coarse=groups)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"genome": "layer"}, "genome is 'layer', expected one of 'adapter', 'profile', 'full'"),
        ({"sign": "positive"}, "sign is 'positive', expected one of 'signed', 'non_negative'"),
        ({"scale": "linear"}, "scale is 'linear', expected one of 'plain', 'log'"),
        ({"top_k": 0}, "top_k is 0, expected at least 1, or None"),
        ({"n_knots": 1}, "n_knots is 1, expected at least 2"),
    ],
)
def test_a_layout_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Layout(**settings)


def test_the_arrays_of_a_space_are_its_own():
    coefficients, spread = np.ones((3, 2)), np.ones((3, 2))
    genome, genome_spread = make_space(group_modules(LLAMA, "layer"), 2).encode(coefficients, spread)
    genome[:] = genome_spread[:] = 7
    assert (coefficients == 1).all()
    assert (spread == 1).all()
