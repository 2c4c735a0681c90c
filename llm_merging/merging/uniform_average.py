"""The baseline: every adapter with the coefficient 1/n, summed exactly.

Knows nothing of search; same loading, folding and files as the method it is compared with.
"""

from typing import Any

import numpy as np

from llm_merging.merging.Merges import Merges
from search.adapters import check_adapter
from search.delivery import ADAPTER_FOLDER, deliver_adapter
from search.files import write_json
from search.groups import group_modules
from search.merge import fold_adapters, merge_adapters
from search.parts import identify_base
from search.provenance import checkout_commit, library_versions
from search.recorded import COEFFICIENTS_FILE, MergeRecord, coefficients_document


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
        document = coefficients_document(adapters, coefficients, groups, self._record())
        deliver_adapter(merged, document, self.output / ADAPTER_FOLDER)
        write_json(self.output / COEFFICIENTS_FILE, document)
        fold_adapters(self.base_model, adapters, coefficients, groups)
        self.merged_model = merged.state_dict

    def _record(self) -> MergeRecord:
        base: dict[str, Any] = identify_base(self.loaded_base) if self.loaded_base else {}
        return MergeRecord(
            method=self.name,
            base={**base, "name": self.config.base.name},
            objective={},
            provenance={"commit": checkout_commit(), "versions": library_versions()},
        )
