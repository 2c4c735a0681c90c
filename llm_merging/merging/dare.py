"""DARE: drop entries of each update at random and rescale the rest, then sum, or merge as TIES does.

Knows PEFT's DARE, what it is applied to and its seed; not loading, folding or records.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, dare_ties
from torch import Tensor

from llm_merging.merging.updates import UpdateMerge, dense_updates
from search.adapters import Adapter


class Dare(UpdateMerge):
    """base + scale * sum_i drop(s_i B_i A_i) / (1 - drop_rate), each adapter at the weight 1.

    Yu et al. 2023 (arXiv:2311.03099), section 3, on top of task arithmetic; the paper drops 90 % or more. The
    scale is task arithmetic's, which this is in expectation: the paper tunes it on labels, and the default of
    its code, 1, is for two or three models. PEFT's code (`peft.utils.merge_utils.dare_linear`) on the updates
    themselves. mergekit differs: it rescales what is left to the L1 norm that the update had.
    """

    scale = 0.3
    drop_rate = 0.9
    """Probability that an entry is dropped; in (0, 1)."""

    def settings(self) -> dict[str, Any]:
        """Return what is recorded beside the scale."""
        return {"drop_rate": self.drop_rate, "seed": self.config.search.seed}

    def merged_updates(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """Return each touched module's update; the same seed, modules and device give the same draws."""
        device = self.base_device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.search.seed)
            return super().merged_updates(adapters)

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return the merged update (d_out, d_in), from torch's global generator."""
        updates = dense_updates(adapters, module, self.base_device)
        return self._combine(updates, torch.ones(len(updates), device=self.base_device), 1 - self.drop_rate)

    _combine = staticmethod(dare_linear)


class DareTies(Dare):
    """DARE in the place of TIES' trimming: drop and rescale, elect signs, average what agrees.

    Yu et al. 2023 (arXiv:2311.03099), section 3, on top of TIES; weights of 1 and PEFT's code
    (`peft.utils.merge_utils.dare_ties`), which elects signs and averages as `Ties` does. The scale stays
    DARE's: at this drop rate most entries have one survivor or none, so that the average is nearly the sum,
    and TIES' scale of 1 is far too much. mergekit's default sums what agrees instead of averaging it.
    """

    _combine = staticmethod(dare_ties)
