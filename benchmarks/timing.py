"""Time functions against each other: interleaved, synchronised, medians.

Knows clocks and devices; not what is timed.
"""

import random
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, warm_ups: int = 2
) -> dict[str, float]:
    """Call all functions in turn, again and again; return each one's median seconds.

    Interleaved, so that a device that grows warm or busy slows all alike, and in a new order each time: a
    device is faster after what left it cool. The clock starts and stops with nothing left to do there.
    """
    for function in functions.values():
        for _ in range(warm_ups):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    orders = random.Random(0)
    for _ in range(repeats):
        for name, function in orders.sample(list(functions.items()), len(functions)):
            _synchronise(device)
            started_s = time.perf_counter()
            function()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - started_s)
    return {name: median(of_name) for name, of_name in seconds.items()}


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """Return the FLOP/s of a product of two random (size, size) matrices: what the device does at best."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = time_interleaved({"product": lambda: a @ b}, device, repeats=repeats, warm_ups=5)
    return 2 * size**3 / seconds["product"]


def peak_gib(device: torch.device, function: Callable[[], object]) -> float | None:
    """Return the most memory allocated while a function runs, in GiB; None where nothing counts it."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) / 2**30


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
