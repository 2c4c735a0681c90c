"""A run inside the competition's kit: what a bundle has in place of files, resumption, cards and the hub.

Knows what the kit's base class has loaded, a bundle's literals and `Phases`; not the command line, nor who
answers queries. See search/stand_ins.py.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from search.adapters import Adapter, _check_settings, _pair_factors
from search.base import LoadedBase
from search.groups import Groups
from search.optimizer import find_library
from search.phases import Later, Phases, Shared
from search.setup import Setup, make_setup
from search.space import FloatArray
from search.stand_ins import LenientTrace, NothingRecorded, PrintedProgress, Settings, Uninterrupted
from search.timebox import LONGEST_START_S, PROCESS_END_S, SPARE_SHARE, TimeBox, seconds_of_process

GENERATION_SHARE = 0.45
"""Of queries, those that are answered in words; the competition's file has 350 of 807."""


@dataclass(frozen=True, slots=True, eq=False)
class KitModels:
    """What the kit's base class has loaded."""

    model: nn.Module
    tokenizer: Any
    base_name: str
    revision: str | None
    adapters: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
    """Hub id or folder -> its PEFT state dict and its PEFT configuration, in the kit's order."""


@dataclass(frozen=True, slots=True, eq=False)
class Submitted:
    """What a run in the kit found."""

    merged: dict[str, Any]
    """The merge as PEFT's state dict."""
    coefficients: FloatArray
    """(n_groups, n_adapters)."""
    groups: Groups
    names: tuple[str, ...]
    winner: str
    report: str


def run_in_kit(
    literal: Mapping[str, Any],
    kit: KitModels,
    output: Path,
    answer: Callable[[str], object],
    about: Mapping[str, Any],
) -> Submitted:
    """Search inside the kit's time box and fold the winner into the kit's base model.

    Args:
        literal: the bundled configuration: `search`, `prompts`, `objective`, `skeletons` by adapter name,
            `queries_ahead`, `bundled_prior`.
        output: folder for the trace.
        answer: has the kit write an answer to a text.
        about: version and commit, for the trace.

    Raises:
        InputError: for adapters or a base that cannot be merged.
    """
    age_s = seconds_of_process()
    began_s = time.monotonic() - (age_s if age_s < LONGEST_START_S else 0.0)
    config = _configure(literal, kit)
    box = TimeBox(config.search.time_box_s, started_s=began_s)
    box.reserve("spare", SPARE_SHARE * box.limit_s + PROCESS_END_S)
    skeletons = [text for adapter in config.adapters for text in adapter.skeletons[:1]]
    measure_s = _make_measure(kit, answer, skeletons, config.queries_ahead)
    asked_s = box.elapsed_s()
    box.reserve("later", measure_s())
    later = Later(measure_s, box.elapsed_s() - asked_s)
    adapters = [
        _read_adapter(adapter.name, adapter.source, *kit.adapters[adapter.source])
        for adapter in config.adapters
    ]
    base = LoadedBase(kit.model, kit.tokenizer, kit.base_name, kit.revision, None)
    setup = make_setup(config, base, adapters, config.objective.name)
    trace = _begin_trace(setup, output / "trace.jsonl", about)
    line, record, interruption = (
        PrintedProgress(config.search.max_evaluations),
        NothingRecorded(),
        Uninterrupted(),
    )
    shared: Any = Shared(trace, box, line, interruption, record, later)  # type: ignore[arg-type]
    result: Any = Phases(setup, shared).finish(output)
    logging.getLogger(__name__).info("%s", result.report)
    parts = setup.parts
    return Submitted(
        result.merged, result.coefficients, parts.groups, parts.names, result.winner, result.report
    )


def _begin_trace(setup: Setup, path: Path, about: Mapping[str, Any]) -> Any:
    """Record what the run depends on, and say which optimiser searches."""
    trace, config = LenientTrace(path), setup.config
    library = find_library()
    logging.getLogger(__name__).info("the search is by %s", library)
    trace.header(
        {
            **about,
            "optimizer_library": library,
            "config": config.model_dump(),
            "seed": config.search.seed,
            "groups": setup.parts.groups.names,
            "adapters": setup.parts.names,
            "left_out": dict(setup.left_out),
            "device": setup.parts.model.device.type,
        }
    )
    return trace


def _configure(literal: Mapping[str, Any], kit: KitModels) -> Any:
    """Give the kit's adapters, in its order, the skeletons that are bundled under their names."""
    skeletons = literal["skeletons"]
    adapters = []
    for source in kit.adapters:
        name = source.rstrip("/").rsplit("/", 1)[-1]
        adapters.append({"name": name, "source": source, "skeletons": skeletons.get(name, [])})
    return Settings({**literal, "adapters": adapters, "base": {"name": kit.base_name}})


def _read_adapter(name: str, source: str, state: Mapping[str, Any], config: Mapping[str, Any]) -> Adapter:
    """Check what the kit has loaded of an adapter, and pair its matrices."""
    where, plain = f"adapter {name!r} ({source})", dict(config)
    plain["peft_type"] = getattr(plain.get("peft_type"), "value", plain.get("peft_type"))
    _check_settings(plain, where)
    tensors = {key.replace(".default.weight", ".weight"): tensor.cpu() for key, tensor in state.items()}
    return Adapter(name, _pair_factors(tensors, plain, where), source, None, "", "")


def _make_measure(
    kit: KitModels, answer: Callable[[str], object], texts: Sequence[str], n_queries: int
) -> Callable[[], float]:
    """Return what measures the seconds of so many queries, one at a time, on texts of our own."""
    own = [*texts[:2], "Q:"][:2]

    @torch.no_grad()
    def measure_s() -> float:
        if not n_queries:
            return 0.0
        answer(own[0])  # the first loads what later ones find there
        writing_s, reading_s = math.inf, math.inf
        for text in own:
            started_s = time.monotonic()
            answer(text)
            writing_s = min(writing_s, time.monotonic() - started_s)
            started_s = time.monotonic()
            ids = kit.tokenizer(text, return_tensors="pt")["input_ids"].to(kit.model.device)
            kit.model(input_ids=ids).logits.sum().item()
            reading_s = min(reading_s, time.monotonic() - started_s)
        choices_s = 2 * reading_s  # the input, then its choices
        return n_queries * (GENERATION_SHARE * writing_s + (1 - GENERATION_SHARE) * choices_s)

    return measure_s


def ready_base(model: nn.Module, device: str) -> nn.Module:
    """Put the kit's base model on its device, in the type that search and answers use, in eval mode."""
    place, dtype = torch.device(device), torch.float32
    if place.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(place) >= (8, 0) else torch.float16
    return model.to(place, dtype).eval().requires_grad_(False)
