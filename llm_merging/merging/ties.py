"""TIES: trim each update, elect a sign for each entry, average the entries that agree with it.

Knows PEFT's TIES and what it is applied to; not loading, folding or records.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.merge_utils import ties
from torch import Tensor

from llm_merging.merging.updates import UpdateMerge, dense_updates
from search.adapters import Adapter


class Ties(UpdateMerge):
    """base + scale * TIES(s_1 B_1 A_1, ..., s_n B_n A_n), module by module, each adapter at the weight 1.

    Yadav et al. 2023 (arXiv:2306.01708), section 3: density 0.2 and scale 1 are what the authors take where
    nothing is tuned. Whose TIES: PEFT's (`peft.utils.merge_utils.ties`), on the updates themselves and not on
    A and B apart as PEFT's own combination_type="ties" has it. It keeps the largest floor(density * size)
    entries of each module's update (the authors: of the whole task vector; mergekit: of each module too),
    takes the sign of the sum of what was kept, + where that is 0, and averages the kept entries of that sign
    over their number. The authors' code does the same but for the trimming. mergekit takes the sign of the
    weighted sum and divides by the sum of weights, which is the same at the weight 1. FusionBench's default
    sums the entries instead of averaging them.
    """

    density = 0.2
    """Share of each adapter's entries, in each module, that is kept; in (0, 1)."""

    def settings(self) -> dict[str, Any]:
        """Return what is recorded beside the scale."""
        return {"density": self.density}

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return the merged update (d_out, d_in); several stacks of all adapters' updates are in memory."""
        updates = dense_updates(adapters, module, self.base_device)
        return ties(updates, torch.ones(len(updates), device=self.base_device), self.density)
