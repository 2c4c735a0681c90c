"""Fold a merge into the base's weights for a while, and give the base back bit for bit.

Knows models and coefficients; not files, nor who asks the merged model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import ArrayLike

from search.adapters import Adapter
from search.groups import Groups
from search.merge import fold_adapters, touched_modules


@contextmanager
def folded(
    model: Any, adapters: Sequence[Adapter], coefficients: ArrayLike, groups: Groups
) -> Iterator[None]:
    """Fold the merge in, in place, and on leaving, also after an error, restore the weights exactly.

    The device holds no second copy: the touched weights wait in host memory (1.3 GB for q and v of a 7B model
    in bfloat16, 14 GB for all seven linear modules), since what rounding took cannot be subtracted again.
    Read again from their files they would need no memory, but files move, and some models were never one.

    Args:
        coefficients: (n_groups, n_adapters).
    """
    layers = dict(model.named_modules())
    own = {name: layers[name].weight for name in touched_modules(adapters)}
    kept = {name: weight.detach().to("cpu", copy=True) for name, weight in own.items()}
    is_tied = model.config.tie_word_embeddings
    try:
        fold_adapters(model, adapters, coefficients, groups)
        yield
    finally:
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(kept[name])
                layers[name].weight = weight  # a tied one was replaced
        model.config.tie_word_embeddings = is_tied
