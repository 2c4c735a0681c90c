"""What a bundle has in place of what it leaves out: files, long refusals, and spaces that nobody asked for.

Knows what it stands in for; not the kit, nor when which part is bundled.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from search.adapters import _BASE_EDITING_INITS, Adapter, Factors, _setting, linear_widths
from search.errors import InputError
from search.groups import GroupKind, Groups
from search.memory import MOST_TOKENS, RESERVED_SHARE
from search.objective import OBJECTIVES
from search.sampling import MAX_CACHED_TOKENS
from search.skeleton import Skeleton
from search.space import SMALLEST_SPREAD, FloatArray
from search.trace import _to_json


def read_settings(value: Any) -> Any:
    """Return a literal's items as attributes, section in section."""
    if isinstance(value, Mapping):
        return SimpleNamespace(**{key: read_settings(item) for key, item in value.items()})
    return value


class LenientTrace:
    """A trace that is given up, with a warning, where it cannot be written: the run goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            self._give_up(error)

    def event(self, name: str, /, **content: Any) -> None:
        """Write that something happened."""
        self.write("event", event=name, **content)

    def write(self, kind: str, /, **content: Any) -> None:
        """Write a line: a header, a generation or an event."""
        if self._file is not None:
            try:
                self._file.write(json.dumps(_to_json({"kind": kind, **content}), allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        logging.getLogger(__name__).warning("no trace in %s: %s; going on", self._path, error.strerror)


def group_as_one(module_names: Iterable[str], kind: GroupKind, layers_per_block: int = 4) -> Groups:
    """Return what `group_modules` returns for the kind "model": one group."""
    return Groups(("model",), dict.fromkeys(sorted(set(module_names)), 0))


@dataclass(frozen=True, slots=True, eq=False)
class PlainSpace:
    """A `Space` whose genomes are coefficients (n_groups, n_adapters) as they are, laid end to end."""

    shape: tuple[int, int]
    low: FloatArray
    """(n_adapters,) lower bound of each adapter's coefficients, -inf where free."""
    high: FloatArray
    """(n_adapters,) upper bound."""

    @property
    def n_params(self) -> int:
        """Length of a genome."""
        return self.shape[0] * self.shape[1]

    def to_coefficients(self, genomes: FloatArray) -> FloatArray:
        """Decode (n_candidates, n_params) into (n_candidates, n_groups, n_adapters), clipped to the box."""
        return np.clip(genomes.reshape(-1, *self.shape), self.low, self.high)

    def encode(self, coefficients: ArrayLike, spread: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return the genome (n_params,) of coefficients, and its standard deviations."""
        return np.reshape(coefficients, -1), np.maximum(spread, SMALLEST_SPREAD).reshape(-1)


def make_plain_space(settings: Any, groups: Groups, low: FloatArray, high: FloatArray) -> PlainSpace:
    """Return a plain space within bounds (n_adapters,)."""
    return PlainSpace((len(groups.names), len(low)), low, high)


def split_skeleton(text: str) -> Skeleton:
    """Return what `parse_skeleton` returns for a skeleton that was checked when it was bundled."""
    *pairs, last = re.split(r"\{([A-Za-z_]\w*)\}", text)
    return Skeleton(literals=(*pairs[::2], last), slots=tuple(pairs[1::2]))


UNMERGEABLE = (
    *("use_dora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
"""Settings of PEFT that make an adapter more than plain LoRA."""


def check_plain_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuse (InputError) what is not plain LoRA."""
    odd = [setting for setting in UNMERGEABLE if config.get(setting)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    start = str(config.get("init_lora_weights", True)).lower()
    odd += [start] if start.startswith(_BASE_EDITING_INITS) else []
    if config.get("peft_type") != "LORA" or odd:
        found = ", ".join([str(config.get("peft_type")), *odd])
        raise InputError(f"{where}: found {found}, but only plain LoRA can be merged. Drop it.")


def pair_plain_factors(
    tensors: Mapping[str, Tensor], config: dict[str, Any], where: str
) -> dict[str, Factors]:
    """Return the factors of each module; refuse (InputError) what is no pair of the configured rank."""
    factors, end = {}, ".lora_A.weight"
    for key in [key for key in tensors if key.endswith(end)]:
        module = key.removeprefix("base_model.model.").removesuffix(end)
        A, B = tensors[key], tensors.get(key.replace("lora_A", "lora_B"))
        rank = _setting(config, "rank_pattern", module, config.get("r", 8))
        if B is None or not A.shape[0] == B.shape[1] == rank:
            raise InputError(f"{where}: {module} is no pair of matrices of rank {rank}. Re-download it.")
        alpha = _setting(config, "alpha_pattern", module, config.get("lora_alpha", 8))
        factors[module] = Factors(A, B, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not factors or len(tensors) != 2 * len(factors):
        odd = [key for key in tensors if not key.endswith((end, ".lora_B.weight"))]
        raise InputError(f"{where}: expected pairs of lora_A and lora_B alone, found {odd[:1]}. Drop it.")
    return dict(sorted(factors.items()))


def check_fit(adapter: Adapter, model: Any, base_name: str) -> None:
    """Refuse (InputError) an adapter with a module that the base lacks or has in another width."""
    layers = dict(model.named_modules())
    for module, factors in adapter.modules.items():
        widths = factors.B.shape[0], factors.A.shape[1]
        if module not in layers or linear_widths(layers[module]) != widths:
            found = f"adapter {adapter.name!r}: {module} is (d_out, d_in) = {widths}"
            raise InputError(f"{found}, unlike in {base_name}: made for another base. Drop it.")


def most_cached_tokens(model: Any) -> int:
    """Return how many rows x tokens are decoded together at first; fewer once memory runs out."""
    return MAX_CACHED_TOKENS


def tokens_free(device: torch.device, bytes_per_token: float, kept_bytes: int) -> int:
    """Return how many tokens go into one forward on a CUDA device, beside what is there and is to be kept."""
    used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    limit, tokens = (torch.cuda.mem_get_info(device.index)[0] + held) * (1 - RESERVED_SHARE), MOST_TOKENS
    while tokens > 1 and tokens * bytes_per_token > limit - used - kept_bytes:
        tokens //= 2
    return tokens


def forget_peak(device: torch.device) -> None:
    """Count a CUDA device's peak anew from here on."""
    torch.cuda.reset_peak_memory_stats(device)


def disagree(objective: str, merged_logp: Tensor, expert_logp: Tensor, next_tokens: Tensor) -> Tensor:
    """Return what an objective measures at each position (..., n_positions); smaller is better."""
    return OBJECTIVES[objective](merged_logp, expert_logp, next_tokens)


def as_it_is(value: Any) -> Any:
    """Return a value in place of what would be made of it, which is as good."""
    return value
