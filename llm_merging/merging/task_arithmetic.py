"""Task arithmetic: every adapter with one coefficient, summed exactly.

Knows nothing of search; same loading, folding and files as the method it is compared with.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llm_merging.merging.updates import UpdateMerge, dense_updates
from search.adapters import Adapter
from search.delivery import ADAPTER_FOLDER, deliver_adapter
from search.files import write_json
from search.groups import group_modules
from search.merge import fold_adapters, merge_adapters, touched_modules
from search.provenance import checkout_commit, library_versions
from search.recorded import COEFFICIENTS_FILE, MergeRecord, coefficients_document


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
        adapters, base_name = self._load_everything(), self.config.base.name
        groups = group_modules(touched_modules(adapters), "model")
        coefficients = np.full((1, len(adapters)), self.scale)
        merged = merge_adapters(
            adapters, coefficients, groups, base_name=base_name, dtype=self.base_model.dtype
        )
        document = coefficients_document(adapters, coefficients, groups, self._record())
        deliver_adapter(merged, document, self.output / ADAPTER_FOLDER)
        write_json(self.output / COEFFICIENTS_FILE, document)
        fold_adapters(self.base_model, adapters, coefficients, groups)
        self.merged_model = merged.state_dict

    def _record(self) -> MergeRecord:
        return MergeRecord(
            method=self.name,
            base=self._identify_base(),
            objective={},
            provenance={"commit": checkout_commit(), "versions": library_versions()},
        )
