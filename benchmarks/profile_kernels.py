"""What a profiler sees a device do, in a handful of groups by the kernels' names.

Knows torch.profiler and names; not what is run.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

GROUPS = {
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk|mkldnn|aten::(add)?b?mm",
    "softmax and logarithms": r"softmax|log_kernel|_log_|exp_kernel|aten::(log|exp)",
    "compiled elementwise": r"triton",
    "copies": r"memcpy|memset|copy|aten::fill|aten::zero",
    "elementwise and reductions": r"elementwise|vectorized|reduce|norm|index|gather|scatter|aten::"
    r"(cat|mul|add|sub|div|pow|mean|rsqrt|silu|neg|sum|cos|sin|clamp|where|cumsum|arange)",
}
"""Name -> what its kernels' names hold, the first that fits; a CPU has no kernels, but operations."""
OTHER = "other"
_RANGES = ("##", "Torch-Compiled", "ProfilerStep", "CompiledFxGraph")
"""What spans of kernels, which would count twice, begin with."""
_MOST_NAMES = 5


def group_of(name: str) -> str:
    """Return the group that a kernel belongs to, by its name alone."""
    return next((group for group, has in GROUPS.items() if re.search(has, name, re.IGNORECASE)), OTHER)


def group_kernels(kernels: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Sum (name, ms) by group: `ms`, the whole `busy_ms`, and the names that most of `other` is."""
    ms: dict[str, float] = defaultdict(float)
    unknown: dict[str, float] = defaultdict(float)
    for name, own in kernels:
        group = group_of(name)
        ms[group] += own
        if group == OTHER:
            unknown[name[:80]] += own
    top = sorted(unknown.items(), key=lambda item: -item[1])[:_MOST_NAMES]
    ordered = {group: round(ms[group], 4) for group in [*GROUPS, OTHER] if group in ms}
    names = {name: round(own, 4) for name, own in top}
    return {"ms": ordered, "busy_ms": round(sum(ms.values()), 4), "other": names}


def profile_kernels(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return what `run` keeps the device busy with, grouped; `failure` where there is no profiler."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    try:
        with profile(activities=[activity]) as profiler:
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
        averages = profiler.key_averages()
    except RuntimeError as error:
        return {"failure": " ".join(str(error).split())[:200]}
    kernels = []
    for event in averages:
        is_range = event.key.startswith(_RANGES) or getattr(event, "is_user_annotation", False)
        if (event.device_type.name == "CUDA") == on_gpu and not is_range:
            own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels.append((event.key, own_us / 1000))
    return group_kernels(kernels) if kernels else {"failure": "the profiler saw nothing"}
