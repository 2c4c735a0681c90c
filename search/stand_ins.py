"""What a bundle has in place of what it leaves out: files, compiling, and spaces that nobody asked for.

Knows what it stands in for; not the kit, nor when which part is bundled. A class here that derives from
another gives that one its methods in a bundle: nowhere else is one made.
"""

import json
import logging
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import ArrayLike
from torch import Tensor

from search.adapters import _BASE_EDITING_INITS, Adapter, Factors, _setting, linear_widths
from search.errors import InputError
from search.evaluate import PopulationEvaluator, Scoring, _assign_blocks
from search.experts import AT_ONCE, ExpertSignals, TokenBudget, default_token_budget, scored_logits
from search.groups import GroupKind, Groups
from search.memory import MEASURED_TOKENS, RESERVED_SHARE, densest_rows, measure_peak, pick_tokens
from search.objective import OBJECTIVES, Objective, sum_by_index
from search.passes import Passes, position_values
from search.population import MixedLinear, Mixtures
from search.prompts import PromptSet, _Desk
from search.racing import BlockScores
from search.sampling import MAX_CACHED_TOKENS
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


class PlainBudget(TokenBudget):
    """A budget that follows from what a CUDA device has free, without a word on how it is shared."""

    def plan(
        self,
        device: torch.device,
        lengths: Sequence[int],
        n_scored: Sequence[int],
        step: Callable[[list[int]], None],
        kept_bytes: int = 0,
    ) -> None:
        """Choose by the free memory of a CUDA device and what one small step takes of it, once."""
        if not self.by_memory or self.bytes_per_token is not None or device.type != "cuda":
            return
        rows = densest_rows(lengths, n_scored, MEASURED_TOKENS)
        try:
            peak_bytes = measure_peak(device, lambda: step(rows))
        except torch.cuda.OutOfMemoryError:  # some rows did not fit: one is tried when its turn comes
            self.tokens_per_forward, self.by_memory = 1, False
            return
        self.bytes_per_token = peak_bytes / sum(lengths[row] for row in rows)
        used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        limit = (torch.cuda.mem_get_info(device)[0] + held) * (1 - RESERVED_SHARE)
        self.tokens_per_forward = pick_tokens(limit - used - kept_bytes, self.bytes_per_token)


class TerseDesk(_Desk):
    """A desk that says a shortage in fewer words."""

    def check_enough(self) -> None:
        """Log a shortage; refuse to go on with nothing to search on, or nothing unseen."""
        found = f"adapter {self.name!r}: {len(self.kept)} usable prompts, expected {self.n_wanted}"
        if len(self.kept) < min(2, self.n_wanted):
            raise InputError(f"{found} ({dict(self.problems)}). Give it other skeletons, or leave it out.")
        if len(self.kept) < self.n_wanted:
            logging.getLogger(__name__).warning("%s; going on", found)


def most_cached_tokens(model: Any) -> int:
    """Return how many rows x tokens are decoded together at first; fewer once memory runs out."""
    return MAX_CACHED_TOKENS


def known_disagreement(
    objective: str, merged_logp: Tensor, expert_logp: Tensor, next_tokens: Tensor
) -> Tensor:
    """Return what an objective measures at each position (..., n_positions); smaller is better."""
    return OBJECTIVES[objective](merged_logp, expert_logp, next_tokens)


def as_it_is(value: Any) -> Any:
    """Return a value in place of what would be made of it, which is as good."""
    return value


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


class PlainEvaluator(PopulationEvaluator):
    """An evaluator that never compiles, and does not say how much memory was in use."""

    def __init__(  # noqa: PLR0913 (as the class that it stands in for)
        self,
        model: Any,
        stacked: StackedFactors,
        groups: Groups,
        prompts: PromptSet,
        signals: ExpertSignals,
        scoring: Scoring,
        budget: TokenBudget | None = None,
    ) -> None:
        """Score the base, at one candidate's cost."""
        self._model, self._stacked, self._groups = model, stacked, groups
        self._prompts, self._signals, self._scoring = prompts, signals, scoring
        self._budget = budget or TokenBudget(default_token_budget(model.device))
        self.graph_budget = replace(self._budget, bytes_per_token=None)
        """Of tokens with a graph, chosen at the first gradient."""
        n_scored = torch.tensor([len(scored) for scored in prompts.scored])
        self._n_scored, self._expert = n_scored.double(), torch.from_numpy(prompts.expert)
        self._block_of, self.n_blocks = _assign_blocks(prompts)
        self._counts = sum_by_index(self._n_scored, self._expert, prompts.n_experts)
        self._folds = model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64)
        self._passes = Passes(model, stacked, groups, prompts, signals)
        self.checkpoint: Callable[[], None] = lambda: None
        """Called before each forward pass and each folding; may raise to abandon the work."""
        self._base_means: dict[Objective, Tensor] = {}
        self.base_per_expert = self._base_mean(scoring.objective).numpy()

    def score_blocks(self, coefficients: FloatArray, blocks: ArrayLike) -> BlockScores:
        """Score coefficients (n_candidates, n_groups, n_adapters) on some blocks, whose sums add up."""
        prompts = np.flatnonzero(np.isin(self._block_of, blocks))
        sums = self._prompt_sums(self._scoring.objective, coefficients, prompts.tolist())
        n_scored, expert = self._n_scored[prompts], self._expert[prompts]
        return BlockScores(
            sums=sum_by_index(sums, expert, self._prompts.n_experts).numpy(),
            counts=sum_by_index(n_scored, expert, self._prompts.n_experts).numpy(),
            prompts=prompts,
            prompt_means=(sums / n_scored).numpy(),
            n_tokens=len(coefficients) * sum(len(self._prompts.ids[prompt]) for prompt in prompts),
            peak_bytes=None,
        )

    @torch.enable_grad()
    def _sums_with_graph(self, objective: Objective, mixture: Tensor, prompts: list[int]) -> Tensor:
        """Sum the objective over each expert's positions in some prompts, (n_experts,), differentiably."""
        self.checkpoint()
        logits = self._passes.mixed(mixture.expand(len(prompts), -1, -1), prompts)
        sums = self._passes.sums(objective, logits, prompts)
        return sum_by_index(sums, self._expert[prompts], self._prompts.n_experts)
