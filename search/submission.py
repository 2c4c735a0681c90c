"""A run inside the competition's kit: what a bundle has in place of files, resumption, cards and the hub.

Knows what the kit's base class has loaded and a bundle's literals; not the command line, nor who answers
queries. See search/kit_search.py.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.adapters import Adapter, _check_settings, _pair_factors, check_adapter
from search.balance import balanced_coefficients, find_misfits, relative_norms, update_products
from search.errors import InputError
from search.groups import Groups, group_modules
from search.kit_search import search_in_kit, seconds_of
from search.kit_signals import KitRun
from search.merge import _mix_module, _zero_module, fold_updates, touched_modules
from search.optimizer import find_library
from search.setup import SPREAD_AT_ZERO
from search.space import FloatArray, Layout, Space, make_space
from search.stack import StackedFactors, stack_adapters
from search.stand_ins import LenientTrace, read_settings
from search.timebox import LONGEST_START_S, PROCESS_END_S, SPARE_SHARE, TimeBox, seconds_of_process

GENERATION_SHARE = 0.45
"""Of queries, those that are answered in words; the competition's file has 350 of 807."""


def run_in_kit(
    config: Mapping[str, Any], skeletons: Mapping[str, Sequence[str]], kit: Any, about: Mapping[str, Any]
) -> tuple[FloatArray, dict[str, Tensor]]:
    """Search inside the kit's time box and fold the winner into the kit's base model.

    Args:
        config: the bundled one: `search`, `prompts`, `objective`, `queries_ahead`, `bundled_prior`.
        skeletons: by the adapters' names.
        kit: an object of its class Merges, which has loaded all models.
        about: version and commit, for the trace.

    Returns:
        Coefficients (n_groups, n_adapters), and the merge as PEFT's state dict.

    Raises:
        InputError: for adapters or a base that cannot be merged.
    """
    settings = read_settings(config)
    box, space = start_box(settings.search.time_box_s), settings.search.space
    model = kit.base_model = ready_base(kit.base_model, str(kit.device))
    adapters = [read_adapter(source, kit) for source, _ in kit.list_models]
    adapters, stacked, left_out = leave_out_misfits(adapters, model, settings.search.max_relative_norm)
    groups = group_modules(touched_modules(adapters), space.groups, space.layers_per_block)
    trace, library = LenientTrace(Path("output") / kit.name / "trace.jsonl"), find_library()
    logging.getLogger(__name__).info("the search is by %s", library)
    named = {"base": {"id": kit.base_model_name}, "adapters": [{"name": name} for name in stacked.names]}
    facts = {"optimizer_library": library, "seed": settings.search.seed, "left_out": left_out, **named}
    facts |= {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    trace.write("header", schema=1, **about, config=config, groups=groups.names, **facts)
    balanced = balanced_coefficients(update_products(stacked))
    start, spread = choose_start(settings.search, balanced, groups, stacked.names, config["bundled_prior"])
    texts = [skeletons.get(name, ()) for name in stacked.names]
    asked = [own[0] for own in texts if own]
    run = KitRun(
        model=model,
        tokenizer=ready_tokenizer(kit),
        stacked=stacked,
        groups=groups,
        skeletons=texts,
        settings=settings,
        box=box,
        trace=trace,
        start=start,
        spread=spread,
        balanced=balanced,
        has_prior=config["bundled_prior"] is not None,
        make_space=lambda low, high: make_kit_space(space, groups, low, high),
        measure_later=lambda: measure_answers(kit, asked, settings.queries_ahead),
        mix=lambda table: mix_modules(adapters, table, groups, torch.device("cpu")),
    )
    winner = search_in_kit(run)
    logging.getLogger(__name__).info("merge")
    merged = merge_into(model, adapters, winner.coefficients, groups)
    trace.event("merged", winner=winner.name, elapsed_s=box.elapsed_s())
    return winner.coefficients, merged


def start_box(limit_s: float) -> TimeBox:
    """Start the kit's time box when the process started."""
    age_s = seconds_of_process()
    box = TimeBox(limit_s, started_s=time.monotonic() - (age_s if age_s < LONGEST_START_S else 0.0))
    box.reserve("spare", SPARE_SHARE * box.limit_s + PROCESS_END_S)
    return box


def ready_base(model: Any, device: str) -> Any:
    """Put the kit's base model on its device, in the type that search and answers use, in eval mode."""
    place, dtype = torch.device(device), torch.float32
    if place.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(place) >= (8, 0) else torch.float16
    for parameter in model.parameters():  # buffers keep their type: bfloat16 would round positions
        parameter.data = parameter.data.to(dtype)
    return model.to(place).eval().requires_grad_(False)


def ready_tokenizer(kit: Any) -> Any:
    """Return the kit's tokenizer, with a padding token."""
    tokenizer = kit.input_tokenizer or kit.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_adapter(source: str, kit: Any) -> Adapter:
    """Check what the kit has loaded of an adapter, pair its matrices, and check that they fit the base."""
    name, config = source.rstrip("/").rsplit("/", 1)[-1], kit.loaded_configs[source]
    where, plain = f"adapter {name!r} ({source})", dict(getattr(config, "to_dict", lambda: config)())
    plain["peft_type"] = getattr(plain.get("peft_type"), "value", plain.get("peft_type"))
    _check_settings(plain, where)
    state = kit.loaded_models[source].items()
    tensors = {key.replace(".default.weight", ".weight"): tensor.cpu() for key, tensor in state}
    adapter = Adapter(name, _pair_factors(tensors, plain, where), source, None, "", "")
    check_adapter(adapter, kit.base_model, kit.base_model_name)
    return adapter


def leave_out_misfits(
    adapters: Sequence[Adapter], model: Any, limit: float | None
) -> tuple[list[Adapter], StackedFactors, Mapping[str, str]]:
    """Return the adapters that a merge can use, stacked too, and what is wrong with the others, by name.

    Raises:
        InputError: if none is left.
    """
    stacked = stack_adapters(adapters, device=model.device, dtype=model.dtype)
    misfits = find_misfits(stacked.names, relative_norms(model, stacked), limit)
    kept = [adapter for adapter in adapters if adapter.name not in misfits]
    if not kept:
        raise InputError(f"no adapter can be merged: {misfits}")
    if misfits:
        logging.getLogger(__name__).warning("left out of the merge: %s", misfits)
        stacked = stack_adapters(kept, device=model.device, dtype=model.dtype)
    return kept, stacked, misfits


def start_neutral(
    settings: Any, balanced: FloatArray, groups: Groups, names: Sequence[str], prior: Mapping[str, Any] | None
) -> tuple[FloatArray, FloatArray]:
    """Return first coefficients and their spread, both (n_groups, n_adapters), without a prior."""
    row = balanced if settings.start == "balanced" else np.full(len(balanced), settings.start)
    start: FloatArray = np.broadcast_to(row, (len(groups.names), len(names))).copy()
    half = np.where(start == 0, SPREAD_AT_ZERO, np.abs(start) / 2)
    return start, half if settings.sigma is None else np.full(start.shape, settings.sigma)


def choose_start(
    settings: Any, balanced: FloatArray, groups: Groups, names: Sequence[str], prior: Mapping[str, Any] | None
) -> tuple[FloatArray, FloatArray]:
    """Return first coefficients and their spread, both (n_groups, n_adapters): the prior's where it has any.

    Args:
        prior: `names` (k,), `groups` (n_groups,), `start` and `spread` (n_groups, k); of adapters that it
            does not know the start is neutral.

    Raises:
        InputError: for a prior of other groups.
    """
    start, spread = start_neutral(settings, balanced, groups, names, prior)
    if prior is None:
        return start, spread
    if list(prior["groups"]) != list(groups.names):
        raise InputError("the bundled prior has other groups of modules than these adapters; bundle another")
    for column, name in enumerate(names):
        if name in prior["names"]:
            known = prior["names"].index(name)
            start[:, column] = np.array(prior["start"])[:, known]
            spread[:, column] = np.array(prior["spread"])[:, known]
    return start, spread


def make_kit_space(settings: Any, groups: Groups, low: FloatArray, high: FloatArray) -> Space:
    """Return the space of the configuration's section, within bounds (n_adapters,)."""
    layout = Layout(
        genome=settings.genome,
        sign=settings.sign,
        scale=settings.scale,
        top_k=settings.top_k,
        n_knots=settings.n_knots,
        shared_profile=settings.shared_profile,
    )
    return make_space(groups, len(low), layout=layout, low=low, high=high)


def mix_modules(
    adapters: Sequence[Adapter], table: FloatArray, groups: Groups, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each module under coefficients (n_groups, n_adapters), in float32 at least."""
    factors = {}
    for name in touched_modules(adapters):
        if module := _mix_module(name, adapters, table[groups.group_of[name]], device):
            factors[name] = module.A, module.B
    return factors or _zero_module(adapters)


def merge_into(
    model: Any, adapters: Sequence[Adapter], table: FloatArray, groups: Groups
) -> dict[str, Tensor]:
    """Fold the merge under coefficients (n_groups, n_adapters) into the model; return it as PEFT does."""
    factors, merged = mix_modules(adapters, table, groups, model.device), {}
    fold_updates(model, ((name, B @ A) for name, (A, B) in factors.items()))
    for name, (A, B) in factors.items():
        merged[f"base_model.model.{name}.lora_A.weight"] = A.to("cpu", model.dtype).contiguous()
        merged[f"base_model.model.{name}.lora_B.weight"] = B.to("cpu", model.dtype).contiguous()
    return merged


def measure_answers(kit: Any, texts: Sequence[str], n_queries: int) -> float:
    """Measure the seconds of so many queries, one at a time as the kit asks them, on texts of our own."""
    if not n_queries:
        return 0.0
    own, model, tokenizer = [*texts[:2], "Q:"][:2], kit.base_model, kit.input_tokenizer or kit.tokenizer

    def write(text: str) -> None:
        kit.generate({"input": [text]})

    @torch.no_grad()
    def read(text: str) -> None:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        model(input_ids=ids).logits.sum().item()

    write(own[0])  # the first loads what later ones find there
    writing_s, reading_s = (min(seconds_of(partial(do, text)) for text in own) for do in (write, read))
    choices_s = 2 * reading_s  # the input, then its choices
    return n_queries * (GENERATION_SHARE * writing_s + (1 - GENERATION_SHARE) * choices_s)
