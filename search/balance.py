"""How large the adapters' updates are, and the coefficients that give each the same weight.

Knows factors and weights; not prompts, losses or what is searched. Needs no data at all.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.space import FloatArray
from search.stack import StackedFactors, StackedModule


def update_products(stacked: StackedFactors) -> FloatArray:
    """Return (n_adapters, n_adapters): sum over modules of <Delta_i, Delta_j>, Frobenius.

    From Gram matrices of the factors, (total_rank, total_rank): no update is ever formed.
    """
    products = np.zeros((stacked.n_adapters, stacked.n_adapters))
    for module in stacked.modules.values():
        products += _module_products(module, stacked.n_adapters).numpy()
    return products


def relative_norms(model: Any, stacked: StackedFactors) -> FloatArray:
    """Return (n_adapters,): ||Delta_i|| / ||W|| (Frobenius), the median over the modules that i changes.

    0 for an adapter that changes none, whose update is zero in all of its modules.
    """
    shares: list[list[float]] = [[] for _ in stacked.names]
    for name, module in stacked.modules.items():
        weight_norm = float(model.get_submodule(name).weight.to(torch.float32).norm())
        norms = _module_products(module, stacked.n_adapters).diagonal().clamp_min(0).sqrt()
        for adapter in norms.nonzero().flatten().tolist():  # NaN is not zero
            shares[adapter].append(float(norms[adapter]) / max(weight_norm, torch.finfo(torch.float32).tiny))
    return np.array([np.median(own) if own else 0.0 for own in shares])


def balanced_coefficients(products: FloatArray) -> FloatArray:
    """Return coefficients (n_adapters,) under which every adapter's update has the same norm.

    c_i = r / (l ||Delta_i||), at most 1, with r the root mean square of the norms and l the norm of the sum
    of all Delta_i / ||Delta_i||, at least 1: so the merge's update is about as long as one expert's. Equal
    experts get 1 / n each, n orthogonal ones of equal norm 1 / sqrt(n). Coefficients inverse to the norm are
    from NAN (Si et al. 2025, arxiv.org/abs/2505.16148), which makes them add up to 1; the factor is ours. An
    adapter without an update gets 1 / n.

    Args:
        products: (n_adapters, n_adapters), from `update_products`.
    """
    norms = np.sqrt(products.diagonal().clip(min=0))
    present = norms > 0
    if not present.any():
        return np.full(len(norms), 1 / len(norms))
    lengths = norms[present]
    cosines = products[np.ix_(present, present)] / np.outer(lengths, lengths)
    length_of_sum = np.sqrt(max(1.0, float(cosines.sum())))
    coefficients = np.full(len(norms), 1 / len(norms))
    root_mean_square = np.sqrt(np.mean(lengths**2))
    coefficients[present] = np.minimum(1.0, root_mean_square / (length_of_sum * lengths))
    return coefficients


def find_misfits(names: tuple[str, ...], norms: FloatArray, limit: float | None) -> Mapping[str, str]:
    """Return what is wrong with adapters that no merge can use, by name.

    Args:
        norms: (n_adapters,), from `relative_norms`.
        limit: the largest one that an intact adapter may have; None where all may.
    """
    misfits = {}
    for name, norm in zip(names, norms.tolist(), strict=True):
        if norm == 0:
            misfits[name] = "its update is zero: it is the base itself"
        elif limit is not None and not norm <= limit:  # NaN too
            misfits[name] = (
                f"its update is {norm:.3g} times as large as the weights it changes (limit {limit:g})"
            )
    return misfits


def _module_products(module: StackedModule, n_adapters: int) -> Tensor:
    """<Delta_i, Delta_j> of one module, (n_adapters, n_adapters), float64 on the CPU."""
    A, B = module.A.cpu().double(), module.B.cpu().double()  # a broken adapter's would overflow float32
    gram = (B.T @ B) * (A @ A.T)  # (total_rank, total_rank); tr(A_i.T B_i.T B_j A_j) sums a block of it
    member = torch.nn.functional.one_hot(module.owner.cpu(), n_adapters).double()
    return member.T @ gram @ member
