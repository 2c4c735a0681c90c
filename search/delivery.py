"""What a run leaves in its folder beside the trace: the merged adapter and the coefficients.

Knows parts, coefficients and file names; not how the coefficients were found.
"""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.card import VLLM_DEFAULT_RANK, VLLM_RANKS, vllm_rank, write_card
from search.files import write_json
from search.merge import MergedAdapter, Papers, merge_adapters, write_adapter
from search.parts import Parts, identify_base
from search.recorded import COEFFICIENTS_FILE, MergeRecord, coefficients_document
from search.space import FloatArray

METHOD = "concord"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True, slots=True)
class Cut:
    """What cutting an adapter to a smaller rank cost, as relative errors of its update."""

    relative_error: float
    """Of all modules together."""
    worst: tuple[str, float]
    """The module that it cost most, and its error."""


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
    """Merge, and write the adapter with its card, and coefficients.json.

    Raises:
        InputError: if they cannot be written.
    """
    merged = merge_parts(parts, coefficients, base_name)
    base = {**identify_base(parts.base), "name": base_name}
    record = MergeRecord(method=METHOD, base=base, objective=objective, provenance=provenance)
    document = coefficients_document(parts.adapters, coefficients, parts.groups, record)
    deliver_adapter(merged, document, output / ADAPTER_FOLDER)
    write_json(output / COEFFICIENTS_FILE, document)
    return merged


def deliver_adapter(
    merged: MergedAdapter, document: dict[str, Any], folder: Path, cut: Cut | None = None
) -> None:
    """Write an adapter with its card and coefficients, and say what vLLM needs to take it.

    Args:
        document: the content of coefficients.json.
        cut: what a smaller rank cost, where there was one.

    Raises:
        InputError: if it cannot be written.
    """
    rank, base_name = merged.config["r"], merged.config["base_model_name_or_path"]
    error, worst = (cut.relative_error, cut.worst) if cut else (None, None)
    card = write_card(document, base_name=base_name, rank=rank, relative_error=error, worst=worst)
    write_adapter(merged, folder, Papers(card, document))
    allowed = vllm_rank(rank)
    logger = logging.getLogger(__name__)
    if allowed is None:
        largest = VLLM_RANKS[-1]
        command = f"python -m search merge {folder / COEFFICIENTS_FILE} -o DIR --rank {largest}"
        told = folder, rank, largest, command
        logger.warning("%s: rank %d is more than vLLM takes (%d). For vLLM: %s", *told)
    elif allowed > VLLM_DEFAULT_RANK:
        logger.info("%s: rank %d; serve it with vllm serve ... --max-lora-rank %d", folder, rank, allowed)
