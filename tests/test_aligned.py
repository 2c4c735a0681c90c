"""TSV-M, Iso-C, KnOTS and Core Space: dense float64 oracles, FusionBench where there is one, properties."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_merging.merging import METHODS
from llm_merging.merging.core_space import merge_in_core_space
from llm_merging.merging.knots import merge_in_shared_basis
from llm_merging.merging.subspaces import LowRank, add_updates, flatten_spectrum, low_rank_updates, thin_svd
from llm_merging.merging.tsv import decorrelate
from search.adapters import Factors
from search.base import load_base
from search.config import load_config
from tests.test_merges import save_toy_zoo

D_OUT, D_IN = 24, 32
same = partial(torch.testing.assert_close, rtol=0, atol=1e-9)


def draw(*ranks, d_out=D_OUT, d_in=D_IN, seed=0):
    """Random updates of these ranks, the singular values far apart."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    return [LowRank(normal(d_out, rank) * torch.arange(1, rank + 1), normal(rank, d_in)) for rank in ranks]


def tsv(updates):
    return add_updates(decorrelate(updates, min(updates[0].shape))).dense()


def whiten(columns):
    """U (U^T U)^(-1/2), the paper's first formula; needs independent columns."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    return columns @ vectors @ torch.diag(values**-0.5) @ vectors.T


def dense_tsv(deltas, n_kept):
    U, s, V = [], [], []
    for delta in deltas:
        u, values, v = torch.linalg.svd(delta, full_matrices=False)
        k = min(n_kept, int(torch.linalg.matrix_rank(delta)))
        U.append(u[:, :k])
        s.append(values[:k])
        V.append(v[:k])
    return whiten(torch.cat(U, 1)) @ torch.diag(torch.cat(s)) @ whiten(torch.cat(V).T).T


def dense_iso(delta):
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    r = int(torch.linalg.matrix_rank(delta))
    return s[:r].mean() * u[:, :r] @ v[:r]


def dense_ties(tensors, density):
    """TIES by its three steps, entry by entry: trim, elect the sign of the sum, mean of those that agree."""
    trimmed = []
    for tensor in tensors:
        n_kept = int(density * tensor.numel())
        least = tensor.abs().flatten().sort(descending=True).values[n_kept - 1]
        trimmed.append(tensor * (tensor.abs() >= least))
    stack = torch.stack(trimmed)
    agrees = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)


RANKS = {"equal": (4, 4, 4), "mixed": (2, 8, 5), "cut to 24 // 3": (11, 3, 12), "one": (5,)}


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_tsv_is_the_papers_on_dense_updates(ranks):
    updates = draw(*ranks)
    same(tsv(updates), dense_tsv([u.dense() for u in updates], D_OUT // len(ranks)))


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_iso_is_the_papers_on_the_dense_sum(ranks):
    updates = draw(*ranks)
    same(flatten_spectrum(add_updates(updates)).dense(), dense_iso(sum(u.dense() for u in updates)))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_knots_is_the_papers_on_dense_updates(ranks, density):
    updates = draw(*ranks)
    U, s, V = torch.linalg.svd(torch.cat([u.dense() for u in updates], 1), full_matrices=False)
    k = int((s > 1e-9).sum())
    aligned = torch.split(torch.diag(s[:k]) @ V[:k], D_IN, dim=1)
    same(merge_in_shared_basis(updates, density), U[:, :k] @ dense_ties(aligned, density))


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_core_space_is_the_papers_on_dense_core_matrices(ranks):
    updates = draw(*ranks)
    U_B = torch.linalg.svd(torch.cat([u.B for u in updates], 1), full_matrices=False).U
    V_A = torch.linalg.svd(torch.cat([u.A for u in updates]), full_matrices=False).Vh
    cores = [U_B.T @ u.dense() @ V_A.T for u in updates]
    for u, core in zip(updates, cores, strict=True):
        same(U_B @ core @ V_A, u.dense())  # nothing is lost
    merged = dense_iso(dense_tsv(cores, min(cores[0].shape) // len(updates)))
    same(merge_in_core_space(updates).dense(), U_B @ merged @ V_A)


@pytest.mark.slow
def test_fusion_bench_makes_the_same_of_full_rank_updates():
    tsvm = pytest.importorskip("fusion_bench.method.task_singular_vector.utils.TSVM_utils")
    iso = pytest.importorskip("fusion_bench.method.isotropic_merging.iso_utils")
    knots = pytest.importorskip("fusion_bench.method.knots.knots_utils")
    updates = draw(24, 24, 24)
    vectors = [{"w": u.dense()} for u in updates]
    same(tsv(updates), tsvm.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")["w"])
    same(flatten_spectrum(add_updates(updates)).dense(), iso.iso_c(vectors, accelerator="cpu")["w"])
    updates = draw(4, 6, 3)
    U, s, Vs = knots.subspace_alignment([u.dense() for u in updates])
    merged = U @ dense_ties([torch.diag(s) @ V for V in Vs], 0.2)
    same(merge_in_shared_basis(updates, 0.2), merged)


MERGES = {
    "tsv_m": tsv,
    "iso_c": lambda updates: flatten_spectrum(add_updates(updates)).dense(),
    "knots_ties": partial(merge_in_shared_basis, density=0.2),
    "core_space": lambda updates: merge_in_core_space(updates).dense(),
}
every_merge = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)


def in_own_spaces(n, rank=3):
    """Updates that share neither inputs nor outputs."""
    width = rank + 1
    updates = []
    for i, update in enumerate(draw(*[rank] * n, d_out=width, d_in=width)):
        B, A = torch.zeros(n * width, rank).double(), torch.zeros(rank, n * width).double()
        B[i * width : (i + 1) * width], A[:, i * width : (i + 1) * width] = update
        updates.append(LowRank(B, A))
    return updates


def test_tsv_leaves_experts_of_disjoint_spaces_as_they_are():
    updates = in_own_spaces(4)
    for before, after in zip(updates, decorrelate(updates, 16), strict=True):
        same(after.dense(), before.dense())
    x = torch.eye(16, dtype=torch.float64)[:, 4:8]  # what the second expert alone reads
    same(tsv(updates) @ x, updates[1].dense() @ x)


def test_tsv_keeps_singular_values_and_makes_vectors_orthogonal():
    updates = draw(4, 3, 5)
    parts = decorrelate(updates, D_OUT)
    for before, after in zip(updates, parts, strict=True):
        same(thin_svd(after).s, thin_svd(before).s)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        same(parts[i].B.T @ parts[j].B, torch.zeros(parts[i].B.shape[1], parts[j].B.shape[1]).double())
        same(parts[i].A @ parts[j].A.T, torch.zeros(len(parts[i].A), len(parts[j].A)).double())


def test_iso_makes_every_direction_equally_strong():
    updates = draw(4, 6)
    before, after = thin_svd(add_updates(updates)), thin_svd(flatten_spectrum(add_updates(updates)))
    same(after.s, before.s.mean().expand(10))


@pytest.mark.parametrize("n", [2, 3])
def test_equal_experts_merge_to_that_expert(n):
    (update,) = draw(4)
    same(tsv([update] * n), update.dense())
    same(merge_in_shared_basis([update] * n, density=1.0), update.dense())
    same(merge_in_core_space([update] * n).dense(), dense_iso(update.dense()))


def test_one_expert_is_itself():
    (update,) = draw(5)
    same(tsv([update]), update.dense())
    same(merge_in_shared_basis([update], density=1.0), update.dense())


@every_merge
@settings(max_examples=25)
@given(seed=st.integers(0, 99), ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_order_and_factors_do_not_matter(merge, seed, ranks, data):
    updates = draw(*ranks, seed=seed)
    turned = [LowRank(u.B * 4, u.A / 4) for u in data.draw(st.permutations(updates))]
    torch.testing.assert_close(merge(turned), merge(updates), rtol=1e-6, atol=1e-6)


@every_merge
def test_zero_updates_change_nothing_and_alone_give_zero(merge):
    zero = LowRank(torch.zeros(D_OUT, 2).double(), torch.ones(2, D_IN).double())
    same(merge([zero, zero]), torch.zeros(D_OUT, D_IN).double())
    assert torch.isfinite(merge([*draw(3), zero])).all()


def test_ranks_larger_than_a_width_are_fine():
    updates = draw(9, 12, d_out=6, d_in=8)
    for merge in MERGES.values():
        assert merge(updates).shape == (6, 8)


def as_adapter(**modules):
    return SimpleNamespace(modules=modules)


@pytest.mark.parametrize("name", MERGES)
def test_the_method_scales_and_takes_those_that_touch_the_module(name):
    updates = draw(2, 3)
    first = as_adapter(m=Factors(updates[0].A.bfloat16(), updates[0].B.bfloat16(), 0.5))
    second = as_adapter(m=Factors(updates[1].A.float(), updates[1].B.float(), 2.0), other=None)
    method = METHODS[name].__new__(METHODS[name])
    method.base_model = None
    merged = method.merge_module([first, second, as_adapter()], "m")
    assert merged.dtype == torch.float32
    present = low_rank_updates([first, second], "m")
    same(present[0].dense(), 0.5 * updates[0].B.bfloat16().double() @ updates[0].A.bfloat16().double())
    same(merged.double(), MERGES[name](present).float().double())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("name", MERGES)
def test_a_whole_merge_adds_the_update_to_the_base(name, zoo, tmp_path):
    method = METHODS[name](name, load_config(zoo, ["device=cpu"]))
    method.output = tmp_path
    method.merge()
    before = dict(load_base(str(zoo.parent / "base"), device="cpu").model.named_parameters())
    adapters = method._load_adapters()
    for weight, folded in method.merged_model.items():
        update = MERGES[name](low_rank_updates(adapters, weight.removesuffix(".weight")))
        torch.testing.assert_close(folded.double(), before[weight].double() + update, rtol=0, atol=1e-5)
    assert method.merged_model.keys() == {f"{m}.weight" for a in adapters for m in a.modules}
    assert json.loads((tmp_path / "merge.json").read_text())["scale"] == 1.0
