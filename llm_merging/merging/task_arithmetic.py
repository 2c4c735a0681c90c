"""Task arithmetic: every adapter with one coefficient, summed exactly.

Knows nothing of search; same loading, folding and files as the method it is compared with.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llm_merging.merging.coefficients import deliver_coefficients
from llm_merging.merging.updates import UpdateMerge, dense_updates
from search.adapters import Adapter
from search.groups import group_modules
from search.merge import touched_modules


class TaskArithmetic(UpdateMerge):
    """base + scale * sum_i s_i B_i A_i.

    Ilharco et al. 2022 (arXiv:2212.04089), section 2: the sum of task vectors, times one scale. The paper
    picks the scale on held-out labels. Where there are none, 0.3 is what later comparisons take: AdaMerging
    (Yang et al. 2023, arXiv:2310.02575) as its baseline and start, FusionBench as its default; the code of
    TIES has 0.4. 1 is right for one adapter only, and 1/n is the uniform average.
    """

    scale = 0.3

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return the sum of the adapters' updates (d_out, d_in)."""
        return torch.stack(dense_updates(adapters, module, self.base_device)).sum(0)

    def merge(self) -> None:
        """Write the sum to `output` as an exact adapter with its coefficients, and fold it into the base."""
        adapters = self._load_everything()
        groups = group_modules(touched_modules(adapters), "model")
        deliver_coefficients(self, adapters, np.full((1, len(adapters)), self.scale), groups)
