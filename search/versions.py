"""What versions of the libraries call the same thing: the range that pyproject.toml states runs on one code.

Knows names that changed; not what they are used for.
"""

from typing import Any, Literal

import torch
import transformers


def dtype_option(dtype: torch.dtype | Literal["auto"]) -> dict[str, Any]:
    """Return the option of transformers' `from_pretrained` and `from_config`: torch_dtype before 4.56."""
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if release >= (4, 56) else "torch_dtype": dtype}


def recorded_dtype(config: Any) -> dict[str, Any]:
    """Return the option for the type that a model's config.json names; transformers 4 would take float32."""
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(dtype, str):  # a key that transformers 4 does not know is left as it was written
        dtype = getattr(torch, dtype, None)
    return dtype_option(dtype) if dtype else {}


def recompile_option(limit: int) -> dict[str, Any]:
    """Return torch.compile's limit on shapes as it is configured: cache_size_limit before torch 2.6."""
    is_new = hasattr(torch._dynamo.config, "recompile_limit")
    return {"recompile_limit" if is_new else "cache_size_limit": limit}
