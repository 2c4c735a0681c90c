"""What a run is made of: one base, the adapters that fit it, stacked and grouped.

Knows weights and where they are from; not prompts, losses or the search.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from search.adapters import Adapter, check_adapter, fetch_adapter, load_adapter
from search.base import LoadedBase
from search.config import AdapterConfig, SearchConfig
from search.dummy import is_dummy
from search.errors import InputError
from search.groups import GroupKind, Groups, group_modules
from search.hub import Fetched, MissingOnHubError, fetch_together, note_unpinned, one_bar
from search.provenance import cpu_model
from search.stack import StackedFactors, stack_adapters


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Base and adapters, ready to be mixed."""

    base: LoadedBase
    adapters: tuple[Adapter, ...]
    stacked: StackedFactors
    """On the base's device, in its type."""
    groups: Groups

    @property
    def model(self) -> Any:
        """The base model; Any, since transformers' attributes are not nn.Module's."""
        return self.base.model

    @property
    def names(self) -> tuple[str, ...]:
        """(n_adapters,) the adapters' names."""
        return self.stacked.names

    @property
    def shape(self) -> tuple[int, int]:
        """(n_groups, n_adapters), the shape of one merge's coefficients."""
        return len(self.groups.names), len(self.adapters)


def load_adapters(config: SearchConfig) -> tuple[list[Adapter], dict[str, str]]:
    """Load the configured adapters.

    Returns:
        The adapters, and the name of each that the hub does not have with the reason, where the config skips
        such adapters.

    Raises:
        InputError: for one that is not there or damaged, or where none is left.
    """
    remote = [a for a in config.adapters if not is_dummy(a.source) and not Path(a.source).is_dir()]
    adapters: list[Adapter] = []
    missing: dict[str, str] = {}
    with one_bar(len(remote), "adapters") as advance:
        fetched = _fetch_all(remote, config.adapters_missing == "skip", advance)
        for a in config.adapters:
            found = fetched.get(a.name)
            if isinstance(found, MissingOnHubError):
                missing[a.name] = str(found)
                logging.getLogger(__name__).warning("left out of the merge: %s", found)
                continue
            revision = found.commit if found else a.revision
            adapters.append(
                load_adapter(a.source, revision=revision, name=a.name, allow_pickle=a.allow_pickle)
            )
    if not adapters:
        raise InputError(f"no adapter is left; the first: {next(iter(missing.values()))}")
    return adapters, missing


def _fetch_all(
    remote: Sequence[AdapterConfig], may_miss: bool, advance: Callable[[], object]
) -> dict[str, Fetched | MissingOnHubError]:
    """Have the files of all these adapters at hand, by name; tell which commits to pin."""

    def fetch(a: AdapterConfig) -> Fetched | MissingOnHubError:
        try:
            return fetch_adapter(a.source, revision=a.revision, name=a.name, allow_pickle=a.allow_pickle)
        except MissingOnHubError as error:
            if not may_miss:
                raise InputError(f"{error} Or set `adapters_missing: skip` to merge without it.") from error
            return error
        finally:
            advance()

    found = fetch_together([partial(fetch, a) for a in remote])
    note_unpinned(
        (f"adapter {a.name!r}", a.revision, one.commit)
        for a, one in zip(remote, found, strict=True)
        if isinstance(one, Fetched)
    )
    return {a.name: one for a, one in zip(remote, found, strict=True)}


def assemble_parts(
    base: LoadedBase,
    adapters: Sequence[Adapter],
    *,
    base_name: str,
    kind: GroupKind,
    layers_per_block: int = 4,
) -> Parts:
    """Check that the adapters fit the base, group their modules and stack them.

    Args:
        base_name: what the adapters may call the base.
        kind: of grouping, as `group_modules` has it; `layers_per_block` where it is "block".

    Raises:
        InputError: for an adapter of another base.
    """
    model: Any = base.model
    for adapter in adapters:
        check_adapter(adapter, model, base_name)
    groups = group_modules(
        {module for adapter in adapters for module in adapter.modules}, kind, layers_per_block
    )
    stacked = stack_adapters(adapters, device=model.device, dtype=model.dtype)
    return Parts(base, tuple(adapters), stacked, groups)


def find_twins(adapters: Sequence[Adapter]) -> list[str]:
    """Say of which adapters the weights are the same, to the last bit, under several names."""
    named: dict[tuple[str, str], list[str]] = {}
    for adapter in adapters:
        named.setdefault((adapter.sha256, _hash_scalings(adapter)), []).append(adapter.name)
    return [" and ".join(names) for names in named.values() if len(names) > 1]


def identify_base(base: LoadedBase) -> dict[str, str | None]:
    """Say which base weights these are, as trace and coefficients.json record it."""
    return {
        "id": base.source,
        "revision": base.revision,
        "sha256": base.sha256,
        "text_sha256": base.text_sha256,
    }


def identify_cpu() -> dict[str, str | int]:
    """Say what the last bits of sums on a CPU depend on, beside versions."""
    return {
        "name": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _hash_scalings(adapter: Adapter) -> str:
    """Hash what the weights' own hash does not tell: which module has which scaling."""
    scalings = sorted((module, factors.scaling) for module, factors in adapter.modules.items())
    return sha256(json.dumps(scalings).encode()).hexdigest()


def identify_parts(parts: Parts) -> dict[str, Any]:
    """Say which weights these are, how coefficients are laid out, and what computes with them."""
    device = parts.model.device
    return {
        "base": identify_base(parts.base),
        "adapters": [
            {
                "name": a.name,
                "id": a.source,
                "revision": a.revision,
                "sha256": a.sha256,
                "scalings_sha256": _hash_scalings(a),
            }
            for a in parts.adapters
        ],
        "groups": parts.groups.names,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "dtype": str(parts.model.dtype).removeprefix("torch."),
        "cpu": identify_cpu(),
    }
