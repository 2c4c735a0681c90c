"""Core Space: TSV-M and an isotropic spectrum in the small space that all factors span.

Knows one module's low-rank updates at a time; not the base, prompts or coefficients. Panariello et al. 2025,
Accurate and Efficient Low-Rank Model Merging in Core Space (arxiv.org/abs/2509.17786), sections 3 and 4.
"""

from collections.abc import Sequence

from torch import Tensor

from llm_merging.merging.subspaces import LowRank, add_updates, flatten_spectrum, low_rank_updates
from llm_merging.merging.tsv import decorrelate
from llm_merging.merging.updates import UpdateMerge
from search.adapters import Adapter


class CoreSpaceMerge(UpdateMerge):
    """base + U_B iso(tsv(M_1, ..., M_n)) V_A, with core matrices M_i = U_B^T D_i V_A^T.

    What is merged in the core space is the user's choice; this is the combination that the authors' code
    gives as its example. (A sum there is the sum here, and nothing is gained.)
    """

    scale = 1.0
    """The paper picks it on validation data; without data, 1."""

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return the module's update (d_out, d_in)."""
        updates = low_rank_updates(adapters, module, self.base_device)
        return merge_in_core_space(updates).dense().float()


def merge_in_core_space(updates: Sequence[LowRank]) -> LowRank:
    """Return the merge of n updates.

    U_B and V_A are orthonormal bases of all B side by side and all A on top of each other, each as wide as
    the ranks together, R, or as the layer. Both steps commute with orthonormal bases, so they are taken on
    the updates themselves; what the core space changes is that TSV-M keeps R // n components of each, the
    mean rank. Checked in tests/test_aligned.py against dense core matrices.
    """
    width = min(*updates[0].shape, sum(len(update.A) for update in updates))
    return flatten_spectrum(add_updates(decorrelate(updates, width)))
