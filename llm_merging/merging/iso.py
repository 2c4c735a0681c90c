"""Iso-C: the sum of all updates, every direction of it made equally strong.

Knows one module's low-rank updates at a time; not the base, prompts or coefficients. Marczak et al. 2025,
No Task Left Behind (arxiv.org/abs/2502.04959), section 4.1.
"""

from collections.abc import Sequence

from torch import Tensor

from llm_merging.merging.subspaces import add_updates, flatten_spectrum, low_rank_updates
from llm_merging.merging.updates import UpdateMerge
from search.adapters import Adapter


class IsoMerge(UpdateMerge):
    """base + U mean(s) V, where U diag(s) V is the SVD of the adapters' sum.

    The mean is over the singular values that are not zero. Where the sum has full rank that is the paper's;
    where it has not, a dense SVD would add the mean along arbitrary vectors that no adapter touches. Checked
    in tests/test_aligned.py against a dense SVD, and against FusionBench 0.2.33 on sums of full rank.
    """

    scale = 1.0
    """The paper picks its alpha on validation data; without data, 1, the default of FusionBench 0.2.33."""

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return the module's update (d_out, d_in)."""
        total = add_updates(low_rank_updates(adapters, module, self.base_device))
        return flatten_spectrum(total).dense().float()
