"""Merge methods that make one update of all adapters' own, module by module: base + scale * update.

Knows dense updates, folding and the record; not what a method makes of the updates.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from llm_merging.merging.Merges import Merges
from search.adapters import Adapter
from search.files import write_json
from search.merge import fold_updates, touched_modules
from search.provenance import checkout_commit, library_versions
from search.recorded import describe_adapter

MERGE_FILE = "merge.json"
MERGE_SCHEMA = 1


class UpdateMerge(Merges):
    """base + scale * update. A subclass gives the update, of a module by itself or of all at once."""

    scale: float = 1.0
    """What the method's authors take where nothing is tuned; an instance may have its own."""

    def settings(self) -> dict[str, Any]:
        """Return what else shaped the update, for the record; JSON values."""
        return {}

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return one module's update (d_out, d_in), float32 at least, before `scale`."""
        raise NotImplementedError

    def merged_updates(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """Return each touched module's update (d_out, d_in), float32 at least, before `scale`.

        One module's dense updates are in memory at a time, beside the results.
        """
        return {module: self.merge_module(adapters, module) for module in touched_modules(adapters)}

    def merge(self) -> None:
        """Fold scale * update into the base, and write what was merged to merge.json.

        `merged_model` then holds the folded weights, "<module>.weight" as the base has them.
        """
        adapters = self._load_everything()
        with torch.no_grad():
            updates = self.merged_updates(adapters)
            fold_updates(self.base_model, ((name, self.scale * updates[name]) for name in updates))
        write_json(self.output / MERGE_FILE, self._document(adapters))
        folded = dict(self.base_model.named_modules())
        self.merged_model = {f"{module}.weight": folded[module].weight for module in updates}

    @property
    def base_device(self) -> torch.device:
        """Where the base is, and updates are computed; the CPU before it is loaded."""
        return torch.device("cpu") if self.base_model is None else self.base_model.device

    def _document(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        return {
            "schema": MERGE_SCHEMA,
            "method": self.name,
            "scale": self.scale,
            "settings": self.settings(),
            "base": self._identify_base(),
            "adapters": [describe_adapter(adapter) for adapter in adapters],
            "provenance": {
                "commit": checkout_commit(),
                "versions": library_versions(),
                "device": str(self.base_device),
            },
        }


def dense_updates(
    adapters: Sequence[Adapter], module: str, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Return scaling * B @ A of each adapter (d_out, d_in), zeros for those that lack the module.

    All are of one type, the widest of the factors' types and float32.

    Raises:
        ValueError: no adapter has the module.
    """
    factors = [adapter.modules.get(module) for adapter in adapters]
    present = [f for f in factors if f is not None]
    if not present:
        raise ValueError(f"no adapter has {module!r}")
    dtype = reduce(torch.promote_types, (t.dtype for f in present for t in (f.A, f.B)), torch.float32)
    shape = present[0].B.shape[0], present[0].A.shape[1]
    return [
        torch.zeros(shape, dtype=dtype, device=device)
        if f is None
        else f.scaling * (f.B.to(device, dtype) @ f.A.to(device, dtype))
        for f in factors
    ]
