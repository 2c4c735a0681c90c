"""End a method whose merge is a table of coefficients: write the exact adapter and the record, fold it in.

Knows files and the base class's attributes; not where the coefficients come from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from llm_merging.merging.Merges import Merges
from search.adapters import Adapter
from search.delivery import ADAPTER_FOLDER, deliver_adapter
from search.files import write_json
from search.groups import Groups
from search.merge import fold_adapters, merge_adapters
from search.provenance import checkout_commit, library_versions
from search.recorded import COEFFICIENTS_FILE, MergeRecord, coefficients_document


def deliver_coefficients(
    method: Merges,
    adapters: Sequence[Adapter],
    coefficients: ArrayLike,
    groups: Groups,
    *,
    objective: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write adapter/ and coefficients.json to the method's output, and fold the merge into its base.

    Args:
        coefficients: (n_groups, n_adapters).
        objective: name, combine, loss and per_expert of what the table was found by, if by anything.
        provenance: beside commit and versions.

    Raises:
        InputError: if they cannot be written.
    """
    merged = merge_adapters(
        adapters, coefficients, groups, base_name=method.config.base.name, dtype=method.base_model.dtype
    )
    record = MergeRecord(
        method=method.name,
        base=method._identify_base(),
        objective=dict(objective or {}),
        provenance={"commit": checkout_commit(), "versions": library_versions(), **(provenance or {})},
    )
    document = coefficients_document(adapters, coefficients, groups, record)
    deliver_adapter(merged, document, method.output / ADAPTER_FOLDER)
    write_json(method.output / COEFFICIENTS_FILE, document)
    fold_adapters(method.base_model, adapters, coefficients, groups)
    method.merged_model = merged.state_dict
