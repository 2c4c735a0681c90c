"""PEFT's two ways of adding adapters: "linear", which has cross terms, and "cat", which has none.

Knows how PEFT weights A and B; not loading, folding or records.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from llm_merging.merging.uniform_average import UniformAverage
from llm_merging.merging.updates import UpdateMerge
from search.adapters import Adapter
from search.stack import at_least_float32


class Linear(UpdateMerge):
    """base + scale * (sum_i sqrt(w s_i) B_i)(sum_i sqrt(w s_i) A_i), w = 1/n.

    PEFT's add_weighted_adapter(combination_type="linear"): the diagonal is the uniform average, and beside it
    are the cross terms B_i A_j of every two adapters, which nobody trained. PEFT refuses unequal ranks; here
    the smaller ones are padded with zeros, which is PEFT's result where ranks are equal. Which rows then meet
    in the cross terms is as arbitrary as it is between equal ranks.
    """

    def merge_module(self, adapters: Sequence[Adapter], module: str) -> Tensor:
        """Return the merged update (d_out, d_in)."""
        pairs = []
        for adapter in adapters:
            if f := adapter.modules.get(module):
                part = f.scaling / len(adapters)  # PEFT: the sign goes with A alone
                A, B = (t.to(self.base_device, at_least_float32(t.dtype)) for t in (f.A, f.B))
                root = math.sqrt(abs(part))
                pairs.append((math.copysign(root, part) * A, root * B))
        return multiply_sums(pairs)


class Cat(UniformAverage):
    """base + sum_i (1/n) s_i B_i A_i, with all ranks side by side.

    PEFT's add_weighted_adapter(combination_type="cat"). The sum is exact, so at equal weights this is the
    uniform average under the name that PEFT's users know.
    """


def multiply_sums(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return (sum_i B_i)(sum_i A_i), (d_out, d_in), cross terms and all.

    Args:
        pairs: A (rank, d_in) and B (d_out, rank), weights multiplied in; smaller ranks are padded with zeros.
    """
    rank = max(A.shape[0] for A, _ in pairs)
    first_A, first_B = pairs[0]
    sum_A, sum_B = first_A.new_zeros(rank, first_A.shape[1]), first_B.new_zeros(first_B.shape[0], rank)
    for A, B in pairs:
        sum_A[: A.shape[0]] += A
        sum_B[:, : B.shape[1]] += B
    return sum_B @ sum_A
