"""Compile a model's decoder layers, and the few shapes of a batch that this takes.

Knows models, lengths and the compiler; not adapters, prompts or losses. Off unless asked for: a shape costs
seconds to compile, which pays from about 50 forward passes on, and on a CPU hardly ever.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search.versions import recompile_option

FEWEST_FORWARDS, FEWEST_PARAMETERS = 50, 500_000_000
"""With fewer forward passes, or for a smaller model, compiling costs more than it saves."""
MOST_WIDTHS = 3
"""A batch has one of so many widths, and one of two numbers of rows for each."""
_ALIGNED = 8  # tokens; widths are multiples of it
_RECOMPILE_LIMIT = 128  # the default, 8, counts shapes, with and without gradients, of all models together


def compiling_pays(model: Any, n_forwards: float) -> bool:
    """Say whether so many forward passes are worth compiling for: on a GPU, and for a model of some size."""
    if model.device.type != "cuda" or n_forwards < FEWEST_FORWARDS:
        return False
    if not hasattr(torch.library, "custom_op"):  # torch before 2.4 compiles no in-place operator of ours
        return False
    n_parameters: int = sum(parameter.numel() for parameter in model.parameters())
    return n_parameters >= FEWEST_PARAMETERS


class Compiler:
    """Compiles functions at their first call; once that fails, all go on as they are, with one notice."""

    def __init__(self) -> None:
        """Trust that compiling works."""
        self.works = True
        """False once it failed."""

    def __call__(self, function: Callable[..., Any], *, dynamic: bool = False) -> Callable[..., Any]:
        """Return the function compiled, once for each shape, or once for any number of rows if `dynamic`.

        Its errors are the function's own.
        """
        compiled = torch.compile(function, dynamic=dynamic)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.works:
                if dynamic:
                    _fix_widths(args)
                try:
                    with torch._dynamo.config.patch(**recompile_option(_RECOMPILE_LIMIT)):
                        return compiled(*args, **kwargs)
                except torch.cuda.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # all that torch raises when it cannot compile is one
                    result = function(*args, **kwargs)  # raises what is not the compiler's fault
                    self.works = False
                    _notice(" ".join(str(error).split())[:200])
                    return result
            return function(*args, **kwargs)

        return run


def _fix_widths(tensors: Iterable[Tensor]) -> None:
    """Have matrices compiled for their width, whatever their number of rows.

    Kernels are kept on disk: one that was tuned for a small vocabulary would be taken for a large one, which
    was seen to take ten times as long.
    """
    for tensor in tensors:
        if tensor.ndim > 1:
            torch._dynamo.mark_static(tensor, tensor.ndim - 1)


@cache
def _notice(reason: str) -> None:
    logging.getLogger(__name__).warning("not compiled, which is slower: %s", reason)


class CompiledLayers:
    """The decoder layers of a model, compiled for static shapes, one graph for all layers of a kind."""

    def __init__(self, model: nn.Module, compiler: Compiler) -> None:
        """Find the layers; nothing is compiled before a forward pass within `active`."""
        self._layers = decoder_layers(model)
        self._compiled = [compiler(layer.forward) for layer in self._layers]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context the model's forward passes run compiled layers; modules keep their names."""
        with ExitStack() as undo:
            for layer, compiled in zip(self._layers, self._compiled, strict=True):
                undo.callback(vars(layer).pop, "forward")
                layer.forward = compiled
            yield


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the layers that a model repeats: its longest list of modules.

    Raises:
        ValueError: if it has no list of modules.
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers to compile")
    return max(lists, key=len)


def choose_widths(lengths: Sequence[int], most: int = MOST_WIDTHS) -> list[int]:
    """Return the widths, ascending, that pad rows of these lengths least: at most so many, multiples of 8.

    Exact: the best split of the sorted lengths into runs, each padded to its longest.
    """
    sizes, counts = np.unique(-(-np.asarray(lengths) // _ALIGNED) * _ALIGNED, return_counts=True)
    n_rows = np.concatenate([[0], np.cumsum(counts)])
    best: list[tuple[float, list[int]]] = [(0, []), *[(np.inf, [])] * len(sizes)]
    for _ in range(min(most, len(sizes))):  # best[end]: tokens and widths for the first `end` sizes
        best = [best[0]] + [
            min(
                (
                    best[start][0] + sizes[end] * (n_rows[end + 1] - n_rows[start]),
                    [*best[start][1], int(sizes[end])],
                )
                for start in range(end + 1)
            )
            for end in range(len(sizes))
        ]
    return best[-1][1]


def pad_to(size: int, sizes: Sequence[int]) -> int:
    """Return the least of the sizes, ascending, that holds this one; itself if none does."""
    return next((larger for larger in sizes if larger >= size), size)


def row_sizes(width: int, tokens_per_forward: int) -> list[int]:
    """Return the numbers of rows, ascending, that batches of a width are padded to: half or all that fit."""
    most = max(1, tokens_per_forward // width)
    return sorted({-(-most // 2), most})
