"""What a run leaves in its folder beside the trace: the merged adapter and the coefficients.

Knows parts, coefficients and file names; not how the coefficients were found.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from search.files import write_json
from search.merge import MergedAdapter, MergeRecord, coefficients_document, merge_adapters, write_adapter
from search.parts import Parts, identify_base
from search.space import FloatArray

METHOD = "concord"
ADAPTER_FOLDER, COEFFICIENTS_FILE, TRACE_FILE = "adapter", "coefficients.json", "trace.jsonl"


def merge_parts(parts: Parts, coefficients: FloatArray, base_name: str) -> MergedAdapter:
    """Merge the adapters under coefficients (n_groups, n_adapters), in the model's type."""
    return merge_adapters(
        parts.adapters, coefficients, parts.groups, base_name=base_name, dtype=parts.model.dtype
    )


def rehearse_merge(parts: Parts, coefficients: FloatArray, base_name: str, output: Path) -> float:
    """Merge, write and throw away: the seconds that it takes. A disk that is too full shows now.

    Raises:
        InputError: if it cannot be written.
    """
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=output, prefix=".rehearsal-", suffix=".partial") as folder:
        write_adapter(merge_parts(parts, coefficients, base_name), Path(folder) / ADAPTER_FOLDER)
    return time.monotonic() - started_s


def deliver_merge(
    parts: Parts,
    coefficients: FloatArray,
    base_name: str,
    output: Path,
    *,
    objective: dict[str, Any],
    provenance: dict[str, Any],
) -> MergedAdapter:
    """Merge, and write the adapter and coefficients.json.

    Raises:
        InputError: if they cannot be written.
    """
    merged = merge_parts(parts, coefficients, base_name)
    write_adapter(merged, output / ADAPTER_FOLDER)
    record = MergeRecord(
        method=METHOD, base=identify_base(parts.base), objective=objective, provenance=provenance
    )
    document = coefficients_document(parts.adapters, coefficients, parts.groups, record)
    write_json(output / COEFFICIENTS_FILE, document)
    return merged
