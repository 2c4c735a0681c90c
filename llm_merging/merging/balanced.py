"""The balanced merge: every adapter's update at the same norm, summed exactly.

Knows nothing of search, and leaves no adapter out; same loading, folding and files as the search, which
starts here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_merging.merging.coefficients import deliver_coefficients
from llm_merging.merging.updates import UpdateMerge
from search.adapters import Adapter
from search.balance import balanced_coefficients, update_products
from search.groups import group_modules
from search.merge import touched_modules
from search.space import FloatArray
from search.stack import StackedFactors, delta_weight, stack_adapters


class Balanced(UpdateMerge):
    """base + sum_i c_i s_i B_i A_i, with c_i in inverse proportion to the norm of adapter i's update.

    After NAN (Si et al. 2025, arXiv:2505.16148), which takes the inverse of a model's parameter norm as its
    coefficient and has them add up to 1. What differs: the norm is the Frobenius norm of an adapter's update
    over all its modules, s_i B_i A_i, and a common factor (search/balance.py) makes the sum about as long as
    one expert's update, be the updates equal (then 1/n each) or orthogonal (1/sqrt(n)); none is above 1.
    """

    def merged_updates(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """Return each touched module's weighed sum (d_out, d_in)."""
        stacked = stack_adapters(adapters, device=self.base_device, dtype=torch.float32)
        row = torch.tensor(_weigh(stacked), dtype=torch.float32, device=self.base_device)
        return {name: delta_weight(stacked.modules[name], row) for name in touched_modules(adapters)}

    def merge(self) -> None:
        """Write the sum to `output` as an exact adapter with its coefficients, and fold it into the base."""
        adapters = self._load_everything()
        groups = group_modules(touched_modules(adapters), "model")
        row = _weigh(stack_adapters(adapters, device="cpu", dtype=torch.float32))
        deliver_coefficients(self, adapters, row[None], groups)


def _weigh(stacked: StackedFactors) -> FloatArray:
    """Return the coefficients (n_adapters,)."""
    return balanced_coefficients(update_products(stacked))
