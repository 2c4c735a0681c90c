"""TSV-M: the singular vectors of all adapters side by side, made orthogonal to each other.

Knows one module's low-rank updates at a time; not the base, prompts or coefficients. Gargiulo et al. 2024,
Task Singular Vectors (arxiv.org/abs/2412.00081), algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_merging.merging.subspaces import (
    LowRank,
    add_updates,
    closest_isometry,
    low_rank_updates,
    thin_svd,
)
from llm_merging.merging.updates import UpdateMerge
from search.adapters import Adapter


class TsvMerge(UpdateMerge):
    """base + sum of the adapters' singular components, after the singular vectors were decorrelated."""

    scale = 1.0
    """The paper's alpha, which it does not tune."""

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return the module's update (d_out, d_in)."""
        updates = low_rank_updates(adapters, module, self.base_device)
        return add_updates(decorrelate(updates, min(updates[0].shape))).dense().float()


def decorrelate(updates: Sequence[LowRank], width: int) -> list[LowRank]:
    """Return n updates whose singular vectors are orthogonal between them; TSV-M is their sum.

    Of each update the width // n largest singular components are kept; width is min(d_out, d_in) in TSV-M,
    and n here counts the adapters that touch the module. With U and V these, side by side, U_o and V_o are
    the orthonormal matrices closest to them (the paper's whitening, as it solves it: orthogonal Procrustes).
    Update i becomes the part U_o,i diag(s_i) V_o,i of U_o diag(s) V_o: it has its own singular values.

    LoRA updates often have fewer components than are kept. A dense SVD then fills up with arbitrary vectors
    of singular value zero, which shift U_o and V_o; here they do not exist. Checked in tests/test_aligned.py
    against a dense SVD, and against FusionBench 0.2.33 where no component is missing.
    """
    n_kept = max(1, width // len(updates))
    parts = [thin_svd(update) for update in updates]
    ranks = [len(part.s[:n_kept]) for part in parts]
    U = closest_isometry(torch.cat([part.U[:, :n_kept] for part in parts], dim=1))
    V = closest_isometry(torch.cat([part.V[:n_kept] for part in parts]).T).T
    pieces = zip(parts, torch.split(U, ranks, dim=1), torch.split(V, ranks), strict=True)
    return [LowRank(U_i * part.s[:n_kept], V_i) for part, U_i, V_i in pieces]
