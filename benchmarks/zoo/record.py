"""The build record: how long each stage took, on which machine, with which versions.

Knows clocks and machines, not what a stage does.
"""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from search.files import write_json

NOTHING_DONE_S = 1.0


def machine(device: str) -> str:
    """Name the device that a build runs on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def read_record(path: Path) -> dict[str, Any]:
    """Return {"versions": {machine: {package: version}}, "stages": {stage: {machine: seconds}}}."""
    return json.loads(path.read_text()) if path.exists() else {"versions": {}, "stages": {}}


@contextmanager
def recorded(path: Path, stage: str, device: str) -> Iterator[None]:
    """Add the wall-clock seconds of the context to the record, those of an interrupted attempt too.

    A stage that found everything done (under a second) leaves an existing entry as it is.
    """
    started = time.monotonic()
    try:
        yield
    finally:
        elapsed_s = time.monotonic() - started
        record = read_record(path)
        seconds = record["stages"].setdefault(stage, {})
        if elapsed_s >= NOTHING_DONE_S or not seconds:
            name = machine(device)
            seconds[name] = round(seconds.get(name, 0.0) + elapsed_s, 1)
            record["versions"][name] = {
                "python": platform.python_version(),
                **{module.__name__: module.__version__ for module in (torch, transformers, peft)},
            }
            write_json(path, record)
