"""Whether the weights that a run names are the ones it ran on, and the merge what they give.

Knows folders, the hub, hashes and how a setup is made; not prompts, losses or the search.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from search.adapters import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, load_adapter
from search.base import hash_texts, hash_weights
from search.checks import Check, compare, compare_all, show, tell_differences
from search.config import SearchConfig, rebuild_config
from search.delivery import ADAPTER_FOLDER
from search.dummy import is_dummy
from search.errors import InputError
from search.files import sha256_file
from search.hub import TEXT_FILES, WEIGHT_FILES, fetch, hash_file
from search.merge import merge_adapters
from search.parts import identify_parts
from search.recorded import describe_adapter
from search.resume import flatten
from search.setup import Setup
from search.verify_record import RunRecord

KIT_FILE = "safetensor.pt"


def restore_config(record: RunRecord) -> SearchConfig:
    """Rebuild the configuration, weights from the hub at the commits that were loaded.

    Relative paths begin where the run's did; where that folder is gone, in the working directory.

    Raises:
        InputError: for a configuration that is none, or a folder that is gone.
    """
    header = record.header
    folder = str(header.get("folder") or "")
    at = folder if Path(folder).is_dir() else None
    config = rebuild_config(header["config"], str(record.folder), at)
    revision_of = {adapter["name"]: adapter["revision"] for adapter in header["adapters"]}
    adapters = tuple(
        adapter.model_copy(update={"revision": revision_of.get(adapter.name, adapter.revision)})
        for adapter in config.adapters
    )
    base = config.base.model_copy(update={"revision": header["base"]["revision"]})
    return config.model_copy(update={"base": base, "adapters": adapters})


def check_inputs(config: SearchConfig, header: Mapping[str, Any]) -> list[Check]:
    """Hold hashes of base, adapters and prior against the recorded ones; no weight is loaded."""
    recorded = header["base"]
    base = {key: recorded[key] for key in ("sha256", "text_sha256") if key in recorded}
    checks = [_check_hashes(f"base {config.base.source}", base, lambda: _hash_base(config))]
    sources = {adapter.name: adapter for adapter in config.adapters}
    for adapter in header["adapters"]:
        configured = sources.get(adapter["name"])

        def found(configured: Any = configured) -> dict[str, str | None]:
            if configured is None:
                raise InputError("no such adapter in the configuration")
            return {"sha256": _hash_adapter(configured)}

        checks.append(_check_hashes(f"adapter {show(adapter['name'])}", {"sha256": adapter["sha256"]}, found))
    if header.get("prior"):
        prior = {"sha256": header["prior"]["sha256"]}
        checks.append(
            _check_hashes("prior", prior, lambda: {"sha256": sha256_file(config.search.prior_path)})
        )
    return checks


def _check_hashes(
    name: str, recorded: Mapping[str, Any], find: Callable[[], Mapping[str, str | None]]
) -> Check:
    try:
        return tell_differences(name, compare_all(recorded, find()), f"sha256 {show(recorded['sha256'])}")
    except InputError as error:
        return Check(name, "differs", f"recorded {show(recorded['sha256'])}, found {error}")


def _hash_base(config: SearchConfig) -> dict[str, str | None]:
    source = config.base.source
    if is_dummy(source):
        return {"sha256": None, "text_sha256": None}
    patterns = TEXT_FILES + WEIGHT_FILES
    folder = fetch(source, config.base.revision, patterns, f"base {source!r}").folder
    return {"sha256": hash_weights(folder), "text_sha256": hash_texts(folder)}


def _hash_adapter(adapter: Any) -> str:
    if is_dummy(adapter.source):
        return load_adapter(adapter.source, name=adapter.name).sha256
    files = [CONFIG_FILE, WEIGHTS_FILE, *([PICKLE_FILE] if adapter.allow_pickle else [])]
    folder = fetch(adapter.source, adapter.revision, files, f"adapter {adapter.name!r}").folder
    for file in (folder / name for name in files[1:]):
        if file.is_file():
            return hash_file(file)
    raise InputError(f"no {WEIGHTS_FILE} in {folder}")


def check_setup(setup: Setup, record: RunRecord) -> list[Check]:
    """Hold what follows from the weights against what was recorded: scalings, groups, who is left out."""
    header, parts = record.header, setup.parts
    now = identify_parts(parts)
    keys = "name", "sha256", "scalings_sha256"
    recorded, found = (
        flatten([{key: adapter[key] for key in keys} for adapter in document["adapters"]])
        for document in (header, now)
    )
    differences = compare_all(recorded, found)
    for adapter in map(describe_adapter, parts.adapters):
        written: dict[str, Any] = next(
            (a for a in record.document["adapters"] if a["name"] == adapter["name"]), {}
        )
        own = [f"{adapter['name']} {key}" for key in ("rank", "scaling")]
        for what, key in zip(own, ("rank", "scaling"), strict=True):
            differences += compare(what, written.get(key), adapter[key])
    members: dict[str, list[str]] = {name: [] for name in parts.groups.names}
    for module, index in parts.groups.group_of.items():
        members[parts.groups.names[index]].append(module)
    grouping = compare_all(record.merge.groups, members)
    left_out = compare("left out", sorted(header.get("left_out", {})), sorted(setup.left_out))
    return [
        tell_differences("scalings", differences),
        tell_differences("groups", grouping, f"{len(members)} of {len(parts.groups.group_of)} modules"),
        tell_differences("left out", left_out, ", ".join(sorted(setup.left_out)) or "no adapter"),
    ]


def check_merge(setup: Setup, record: RunRecord) -> list[Check]:
    """Merge again by the recorded coefficients, and hold the run's files against that, to the last bit."""
    merged = merge_adapters(
        setup.parts.adapters,
        record.winner,
        setup.parts.groups,
        base_name=setup.config.base.name,
        dtype=getattr(torch, record.header["dtype"]),
    )
    checks = []
    for path in (f"{ADAPTER_FOLDER}/{WEIGHTS_FILE}", KIT_FILE):
        if (file := record.folder / path).is_file():
            try:
                tensors = load_file(file)
            except SafetensorError as error:
                checks.append(Check(path, "differs", f"cannot be read: {error}"))
                continue
            names = merged.state_dict.keys() | tensors.keys()
            other = [name for name in sorted(names) if not _is_same(merged.state_dict, tensors, name)]
            text = f"{len(other)} of {len(names)} matrices, {other[0]} for one" if other else ""
            checks.append(tell_differences(path, [text] if text else [], f"{len(names)} matrices again"))
    return checks


def _is_same(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], name: str) -> bool:
    one, other = some.get(name), others.get(name)
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)
