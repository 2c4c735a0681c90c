"""KnOTS with TIES: updates in the output basis that all of them share, where signs are elected.

Knows one module's low-rank updates at a time; not the base, prompts or coefficients. Stoica et al. 2024,
Model merging with SVD to tie the Knots (arxiv.org/abs/2410.19735), section 4; TIES is PEFT's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.merge_utils import ties
from torch import Tensor

from llm_merging.merging.subspaces import LowRank, column_space, low_rank_updates
from llm_merging.merging.updates import UpdateMerge
from search.adapters import Adapter

DENSITY = 0.2
"""Share of entries that trimming keeps: the default of TIES. KnOTS picks its own on validation data."""


class KnotsTiesMerge(UpdateMerge):
    """base + U ties(U^T D_1, ..., U^T D_n), U the left singular vectors of [D_1, ..., D_n]."""

    scale = 1.0
    """The default of TIES. KnOTS picks its own on validation data."""

    def settings(self) -> dict[str, Any]:
        """Return the density."""
        return {"density": DENSITY}

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return the module's update (d_out, d_in)."""
        return merge_in_shared_basis(low_rank_updates(adapters, module, self.base_device), DENSITY).float()


def merge_in_shared_basis(updates: Sequence[LowRank], density: float) -> Tensor:
    """Return U ties(S V_1, ..., S V_n) (d_out, d_in), float64, of [D_1, ..., D_n] = U S [V_1, ..., V_n].

    TIES sees S V_i, as in the authors' code (`s_on_V`); it trims module by module, as PEFT's does and
    theirs does not (there one threshold holds for all modules), gives each update the weight 1, and averages
    the entries that agree with the elected sign. Checked in tests/test_aligned.py against a dense SVD.
    """
    U = shared_output_basis(updates)
    aligned = [(U.T @ update.B) @ update.A for update in updates]  # S V_i = U^T D_i
    return U @ ties(aligned, torch.ones(len(aligned), dtype=U.dtype, device=U.device), density)


def shared_output_basis(updates: Sequence[LowRank]) -> Tensor:
    """Return the left singular vectors (d_out, k) of all updates side by side, without forming these.

    With A_i^T = Q_i R_i, [B_1 A_1, ..., B_n A_n] is [B_1 R_1^T, ..., B_n R_n^T] times orthonormal rows.
    """
    triangles = [torch.linalg.qr(update.A.T).R for update in updates]
    sides = [update.B @ R.T for update, R in zip(updates, triangles, strict=True)]
    return column_space(torch.cat(sides, dim=1))
