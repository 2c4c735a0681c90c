"""Which modules share a coefficient: the whole model, a layer, or coarser and finer than a layer.

Knows module names; not coefficients, adapters or models.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

GroupKind = Literal["model", "block", "layer", "part", "module"]
"""From coarse to fine; each kind nests in those before it."""
PART_WORDS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "ffn", "feed_forward", "feedforward", "fc", "moe"),
}
"""A layer's part -> what the name of its submodule may contain. The first that fits counts."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Which row of the coefficients each module obeys."""

    names: tuple[str, ...]
    """(n_groups,) e.g. ("model",), or ("layer.0", "layer.1", "other")."""
    group_of: dict[str, int]
    """Module name -> index into `names`."""

    @property
    def depths(self) -> NDArray[np.float64]:
        """(n_groups,) in [0, 1]: mean layer index of a group's modules over the largest layer index.

        A group without a layer is at 1, behind them all; where there is one layer only, it is at 0.
        """
        layers: list[list[int]] = [[] for _ in self.names]
        for module, group in self.group_of.items():
            if (layer := _layer_index(module)) is not None:
                layers[group].append(layer)
        present = {layer for of_group in layers for layer in of_group}
        deepest = max(present) if len(present) > 1 else np.inf
        return np.array([np.mean(of_group) / deepest if of_group else 1.0 for of_group in layers])


def group_modules(module_names: Iterable[str], kind: GroupKind, layers_per_block: int = 4) -> Groups:
    """Group modules, ordered by depth and then by name.

    "model" is one group. "layer" is a decoder layer: the first integer in a module's path, so that
    "model.layers.3.mlp.up_proj" and "transformer.h.3.attn.c_attn" are both in "layer.3". "block" is
    `layers_per_block` layers in a row, "layers.0-3". "part" is a layer's attention or MLP,
    "layer.3.attention" and "layer.3.mlp", or what is neither, "layer.3.other". "module" is each module by
    itself, under its own name. Modules outside any layer form a last group, "other" (as "module", they come
    last). Only groups that hold modules exist.

    Raises:
        ValueError: when there is nothing to group, or on an unknown kind or a block of no layers.
    """
    modules = set(module_names)
    if not modules:
        raise ValueError("no modules to group: the adapters touch nothing")
    if kind not in get_args(GroupKind):
        raise ValueError(f"unknown kind of grouping {kind!r}; known: {str(get_args(GroupKind))[1:-1]}")
    if layers_per_block < 1:
        raise ValueError(f"layers_per_block is {layers_per_block}, expected at least 1")
    layer_of = {module: _layer_index(module) for module in modules}
    last_layer = max((layer for layer in layer_of.values() if layer is not None), default=0)

    name_of = {module: _name_group(module, kind, layers_per_block, last_layer) for module in modules}
    by_depth = sorted(modules, key=lambda m: (layer_of[m] is None, layer_of[m] or 0, name_of[m]))
    place_of = {name: place for place, name in enumerate(dict.fromkeys(name_of[m] for m in by_depth))}
    return Groups(tuple(place_of), {module: place_of[name_of[module]] for module in sorted(modules)})


def nest_groups(fine: Groups, coarse: Groups) -> NDArray[np.int64]:
    """Return (n_fine,): the coarse group that holds each fine group.

    Raises:
        ValueError: when they hold different modules, a fine group spans several coarse ones, or a group of
            either is empty.
    """
    if odd := fine.group_of.keys() ^ coarse.group_of.keys():
        raise ValueError(f"groups of different modules: only one of them holds {min(odd)!r}")
    holders: list[set[int]] = [set() for _ in fine.names]
    for module, group in fine.group_of.items():
        holders[group].add(coarse.group_of[module])
    for name, holding in zip(fine.names, holders, strict=True):
        if len(holding) != 1:
            found = [coarse.names[group] for group in sorted(holding)]
            raise ValueError(f"group {name!r} lies in {len(holding)} coarse groups {found}, expected one")
    rows = np.array([holding.pop() for holding in holders], dtype=np.int64)
    if empty := set(range(len(coarse.names))) - set(rows.tolist()):
        raise ValueError(f"coarse group {coarse.names[min(empty)]!r} holds no module")
    return rows


def _name_group(module: str, kind: GroupKind, layers_per_block: int, last_layer: int) -> str:
    """Name the group of one kind that holds a module, in a model whose layers end at `last_layer`."""
    layer = _layer_index(module)
    match kind:
        case "model":
            return "model"
        case "module":
            return module
        case _ if layer is None:
            return "other"
        case "block":
            first = layer - layer % layers_per_block
            return f"layers.{first}-{min(first + layers_per_block - 1, last_layer)}"
        case "layer":
            return f"layer.{layer}"
        case "part":
            return f"layer.{layer}.{_layer_part(module)}"


def _layer_index(module_name: str) -> int | None:
    """First path component that is an integer, or None."""
    return next((int(part) for part in module_name.split(".") if part.isdecimal()), None)


def _layer_part(module_name: str) -> str:
    """Name the part of its layer that a module is in, by the path component after the layer's number."""
    components = module_name.lower().split(".")
    number = next(place for place, component in enumerate(components) if component.isdecimal())
    inside = "".join(components[number + 1 : number + 2])
    return next((part for part, words in PART_WORDS.items() if any(w in inside for w in words)), "other")
