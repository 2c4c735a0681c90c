"""Which modules share a coefficient: the whole model, a layer, or finer.

Knows module names; not coefficients, adapters or models.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Groups:
    """Which row of the coefficients each module obeys."""

    names: tuple[str, ...]
    """(n_groups,) e.g. ("model",), or ("layer.0", "layer.1", "other")."""
    group_of: dict[str, int]
    """Module name -> index into `names`."""


def group_modules(module_names: Iterable[str], kind: Literal["model", "layer"]) -> Groups:
    """Group modules as one ("model") or by decoder layer ("layer"), ordered by depth.

    The layer is the first integer in a module's path: "model.layers.3.mlp.up_proj" and
    "transformer.h.3.attn.c_attn" are both "layer.3". Modules without one form a last group, "other".
    Only groups that hold modules exist.
    """
    modules = sorted(set(module_names))
    if not modules:
        raise ValueError("no modules to group: the adapters touch nothing")
    if kind == "model":
        return Groups(("model",), dict.fromkeys(modules, 0))
    if kind != "layer":
        raise ValueError(f"unknown kind of grouping {kind!r}; known: 'model', 'layer'")
    layer_of = {module: _layer_index(module) for module in modules}
    depths = sorted(set(layer_of.values()), key=lambda layer: (layer is None, layer or 0))
    names = tuple("other" if layer is None else f"layer.{layer}" for layer in depths)
    return Groups(names, {module: depths.index(layer) for module, layer in layer_of.items()})


def _layer_index(module_name: str) -> int | None:
    """First path component that is an integer, or None."""
    return next((int(part) for part in module_name.split(".") if part.isdecimal()), None)
