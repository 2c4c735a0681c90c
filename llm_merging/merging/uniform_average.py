"""The baseline: every adapter with the coefficient 1/n, summed exactly.

Knows nothing of search; same loading, folding and files as the method it is compared with.
"""

import numpy as np

from llm_merging.merging.Merges import Merges
from search.adapters import check_adapter
from search.files import write_json
from search.groups import group_modules
from search.merge import MergeRecord, coefficients_document, fold_adapters, merge_adapters, write_adapter


class UniformAverage(Merges):
    """base + sum_i (1/n) s_i B_i A_i."""

    def merge(self) -> None:
        """Average the adapters, write the average to `output` and fold it into the base."""
        self._load_base_model()
        self._load_tokenizer()
        adapters, base_name = self._load_adapters(), self.config.base.name
        for adapter in adapters:
            check_adapter(adapter, self.base_model, base_name)
        groups = group_modules({module for adapter in adapters for module in adapter.modules}, "model")
        coefficients = np.full((1, len(adapters)), 1 / len(adapters))
        merged = merge_adapters(
            adapters, coefficients, groups, base_name=base_name, dtype=self.base_model.dtype
        )
        write_adapter(merged, self.output / "adapter")
        record = MergeRecord(method=self.name, base=self._describe_base(), objective={}, provenance={})
        write_json(
            self.output / "coefficients.json", coefficients_document(adapters, coefficients, groups, record)
        )
        fold_adapters(self.base_model, adapters, coefficients, groups)
        self.merged_model = merged.state_dict

    def _describe_base(self) -> dict[str, str | None]:
        base = self.loaded_base
        return {"id": base.source, "revision": base.revision, "sha256": base.sha256} if base else {}
