"""What a bundle has in place of what it leaves out: files, compiling, and spaces that nobody asked for.

Knows what it stands in for; not the kit, nor when which part is bundled. A class here that derives from
another gives that one its methods in a bundle: nowhere else is one made.
"""

import json
import logging
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import ArrayLike
from torch import Tensor

from search.experts import AT_ONCE, ExpertSignals, TokenBudget, scored_logits
from search.groups import GroupKind, Groups
from search.objective import Objective
from search.passes import Passes, position_values
from search.population import MixedLinear, Mixtures
from search.prompts import PromptSet
from search.skeleton import Skeleton
from search.space import SMALLEST_SPREAD, FloatArray
from search.stack import StackedFactors, mix_hidden
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

    def header(self, content: Mapping[str, Any]) -> None:
        """Write what the run depends on."""
        self._write({"kind": "header", "schema": 1, **content})

    def generation(self, **content: Any) -> None:
        """Write one generation."""
        self._write({"kind": "generation", **content})

    def event(self, name: str, /, **content: Any) -> None:
        """Write that something happened."""
        self._write({"kind": "event", "event": name, **content})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(_to_json(line), allow_nan=False) + "\n")
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


class PlainLinear(MixedLinear):
    """A mixed layer that is never compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n_rows, n_tokens, d_in) to (n_rows, n_tokens, d_out)."""
        if self.idle:
            return self.layer(x)  # type: ignore[no-any-return]
        hidden = mix_hidden(x, self.module, self.coefficients[:, self.module.owner])
        output: Tensor
        weight: Tensor
        if self.is_plain:
            output, factor, weight = F.linear(hidden, self.module.B), x, self.layer.get_parameter("weight")
        else:
            output, factor, weight = self.layer(x), hidden, self.module.B
        output.view(-1, output.shape[-1]).addmm_(factor.reshape(-1, factor.shape[-1]), weight.T)
        return output


class PlainPasses(Passes):
    """Passes that are never compiled."""

    def __init__(
        self,
        model: Any,
        stacked: StackedFactors,
        groups: Groups,
        prompts: PromptSet,
        signals: ExpertSignals,
        *,
        compiled: bool = False,
    ) -> None:
        """Note where each prompt's positions are among the signals'."""
        self._model, self._prompts, self._signals = model, prompts, signals
        self._mixtures = Mixtures(model, stacked, groups)
        self._under_way: deque[torch.cuda.Event] = deque()
        self.lengths = [len(ids) for ids in prompts.ids]
        self._n_scored = torch.tensor([len(scored) for scored in prompts.scored])
        self._first = self._n_scored.cumsum(0) - self._n_scored

    def mixed(self, table: Tensor, rows: Sequence[int], tokens_per_forward: int | None = None) -> Tensor:
        """Return logits (n_scored, n_vocab) of prompts `rows`, each under its own mixture of `table`."""
        self._keep_pace()
        with self._mixtures.active(table):
            return scored_logits(self._model, self._prompts, rows)

    def warm_up(self, budget: TokenBudget) -> None:
        """Nothing is compiled."""

    def _values(self, objective: Objective, logits: Tensor, at: Tensor) -> Tensor:
        """Return what an objective says at each scored position: (n_scored,); some at a time."""
        n_positions = max(1, AT_ONCE[logits.device.type] // logits.shape[-1])
        pieces = zip(torch.split(logits, n_positions), torch.split(at, n_positions), strict=True)
        signals = self._signals
        parts = [
            position_values(objective, own, signals.logits, signals.next_tokens, to) for own, to in pieces
        ]
        return torch.cat(parts)
