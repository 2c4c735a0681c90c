"""RegMean: for each module the update that answers every expert's inputs as that expert does, in closed form.

Knows prompts, what layers read on them and one linear solve a module; no search, and no data but what the
models write. Jin et al. 2023, Dataless Knowledge Fusion (arxiv.org/abs/2212.09849), section 3.

With D_i an expert's update (zero where it lacks the module) and G_i = X_i^T X_i the Gram matrix of the
module's inputs X_i, the update D = (sum_i D_i G_i) (sum_i G_i)^-1 has the least sum of |X_i (D - D_i)^T|^2
over the experts: the paper's closed form, from which the base cancels out. As D_i = B_i A_i, it is the sum of
B_i A_i G_i (sum_j G_j)^-1: the RegMean of LoRA experts is a sum of as many updates of the same ranks.

As in the paper, X_i is what the module reads at all positions under expert i's own weights, and off-diagonal
entries of G_i are multiplied by 0.9. Ours are: prompts that the models write instead of training data; G_i of
mean diagonal 1, so that neither long prompts nor large activations give an expert more say; and the base as
one more expert, of update 0 and Gram matrix ANCHOR * I, so that directions that no input has stay the base's.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_merging.merging.subspaces import LowRank, add_updates, low_rank_updates
from llm_merging.merging.updates import UpdateMerge
from search.adapters import Adapter
from search.errors import InputError
from search.experts import TokenBudget, default_token_budget
from search.parts import Parts
from search.population import population
from search.recorded import TRACE_FILE
from search.resume import Record
from search.setup import Setup, load_setup
from search.stack import at_least_float32
from search.steering import WrittenPrompts
from search.trace import TraceWriter

OFF_DIAGONAL = 0.9
"""The paper's alpha."""
ANCHOR = 0.01
"""Weight of the base, where an expert has 1."""

Rows = Sequence[tuple[int, ...]]
"""Token ids of prompts, of unequal lengths."""


@dataclass(frozen=True, slots=True, eq=False)
class InputGrams:
    """X^T X of what modules read."""

    grams: dict[str, Tensor]
    """(d_in, d_in) float32 at least, by the first of the modules that read the same tensor (q, k and v)."""
    first_of: dict[str, str]
    """Every module -> the module whose Gram matrix is its own too."""


class RegMean(UpdateMerge):
    """base + (sum_i D_i G_i) (sum_i G_i + ANCHOR * I)^-1."""

    scale = 1.0

    def settings(self) -> dict[str, Any]:
        """Return what shapes the Gram matrices."""
        return {"off_diagonal": OFF_DIAGONAL, "anchor": ANCHOR, "positions": "all"}

    def merged_updates(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """Write the prompts that a search of this seed has, searched and unseen, and solve for each module.

        Raises:
            InputError: an expert writes no prompts, or its activations are not finite.
        """
        setup = load_setup(self.config, self.loaded_base)
        rows_of = write_rows(setup, self.name, self.output)
        n_tokens = sum(len(row) for rows in rows_of for row in rows)
        self.report = f"regmean: inputs of {n_tokens} tokens that the models wrote"
        solved = solve_updates(setup.parts, rows_of)
        return {module: add_updates(updates).dense().float() for module, updates in solved.items()}


def write_rows(setup: Setup, method: str, output: Path) -> list[Rows]:
    """Write prompts as a search does, into a trace in `output` too; return each expert's, (n_experts,)."""
    with TraceWriter(output / TRACE_FILE) as trace:
        trace.header({**setup.describe(), "method": method})
        return rows_by_expert(setup.write_prompts(trace, Record()))


def rows_by_expert(written: WrittenPrompts) -> list[Rows]:
    """Return each expert's prompts, searched and unseen, (n_experts,)."""
    rows: list[list[tuple[int, ...]]] = [[] for _ in range(written.searched.n_experts)]
    for prompts in (written.searched, written.unseen):
        for ids, expert in zip(prompts.ids, prompts.expert.tolist(), strict=True):
            rows[expert].append(ids)
    return list(rows)


def solve_updates(parts: Parts, rows_of: Sequence[Rows]) -> dict[str, list[LowRank]]:
    """Return the updates that RegMean adds up, of each module's experts in their order.

    Args:
        rows_of: (n_experts,) what each expert wrote.
    """
    sums = GramSums(OFF_DIAGONAL)
    for expert, (adapter, rows) in enumerate(zip(parts.adapters, rows_of, strict=True)):
        sums.add(adapter, measure_inputs(parts, rows, expert))
    return sums.solve(ANCHOR)


@torch.no_grad()
def measure_inputs(parts: Parts, rows: Rows, expert: int) -> InputGrams:
    """Return the Gram matrices of all touched modules' inputs on `rows`, under that expert's weights."""
    found = InputGrams({}, {})

    def step(batch: list[int]) -> None:
        one_hot = torch.zeros(len(batch), *parts.shape)
        one_hot[:, :, expert] = 1
        with population(parts.model, parts.stacked, one_hot, parts.groups):
            inputs = capture_inputs(parts.model, list(parts.stacked.modules), [rows[row] for row in batch])
        firsts: dict[int, str] = {}
        found.first_of.update((module, firsts.setdefault(id(x), module)) for module, x in inputs.items())
        new = {first: _gram(inputs[first]) for first in firsts.values()}  # all, or none if memory runs out
        for first, gram in new.items():
            found.grams[first] = found.grams[first].add_(gram) if first in found.grams else gram

    TokenBudget(default_token_budget(parts.model.device)).run([len(ids) for ids in rows], step)
    return found


def _gram(x: Tensor) -> Tensor:
    wide = x.to(at_least_float32(x.dtype))
    return wide.T @ wide


def capture_inputs(model: Any, modules: Sequence[str], rows: Rows) -> dict[str, Tensor]:
    """Run `rows` through the model and return what each module read at their tokens, (n_tokens, d_in).

    Modules that read the same tensor have the same object here.
    """
    longest = max(len(ids) for ids in rows)
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rows])  # no token sees its right
    is_token = torch.tensor([[t < len(ids) for t in range(longest)] for ids in rows])
    read: dict[str, Tensor] = {}

    def keep(module: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, inputs: read.update({module: inputs[0]})

    with ExitStack() as undo:
        for module in modules:
            undo.callback(model.get_submodule(module).register_forward_pre_hook(keep(module)).remove)
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    flat = {id(x): x[is_token.to(x.device)] for x in read.values()}
    return {module: flat[id(x)] for module, x in read.items()}


class GramSums:
    """sum_i G_i of every input, and D_i G_i of every update as factors, added an expert at a time."""

    def __init__(self, off_diagonal: float) -> None:
        self._off_diagonal = off_diagonal
        self._first_of: dict[str, str] = {}
        self._totals: dict[str, Tensor] = {}
        self._weighted: dict[str, list[LowRank]] = {}

    def add(self, adapter: Adapter, inputs: InputGrams) -> None:
        """Add one expert's Gram matrices, of every module that any adapter touches.

        Raises:
            InputError: they are not finite.
        """
        self._first_of |= inputs.first_of
        shaped = {
            first: shape_gram(_check_finite(gram, adapter, first), self._off_diagonal)
            for first, gram in inputs.grams.items()
        }
        for module in adapter.modules:
            (update,) = low_rank_updates([adapter], module, shaped[inputs.first_of[module]].device)
            weighted = LowRank(update.B, update.A @ shaped[inputs.first_of[module]].double())
            self._weighted.setdefault(module, []).append(weighted)
        for first, gram in shaped.items():
            self._totals[first] = self._totals[first].add_(gram) if first in self._totals else gram

    def solve(self, anchor: float) -> dict[str, list[LowRank]]:
        """Return D_i G_i (sum_j G_j + anchor * I)^-1 of each module's experts, in the order of `add`."""
        return {module: self._solve_module(module, anchor) for module in self._weighted}

    def _solve_module(self, module: str, anchor: float) -> list[LowRank]:
        total = self._totals[self._first_of[module]].double()
        root = torch.linalg.cholesky(total + anchor * torch.eye(len(total)).to(total))
        weighted = self._weighted[module]
        return [LowRank(B, torch.cholesky_solve(A.T, root).T) for B, A in weighted]


def shape_gram(gram: Tensor, off_diagonal: float) -> Tensor:
    """Scale a Gram matrix (d_in, d_in) to mean diagonal 1, and its off-diagonal entries by a factor more.

    Zeros, of a layer that only ever read zeros, stay.
    """
    diagonal = gram.diagonal()
    scaled = gram / diagonal.mean().clamp(min=torch.finfo(gram.dtype).tiny)
    shaped = scaled * off_diagonal
    shaped.diagonal().copy_(scaled.diagonal())
    return shaped


def _check_finite(gram: Tensor, adapter: Adapter, module: str) -> Tensor:
    if not torch.isfinite(gram).all():
        raise InputError(
            f"adapter {adapter.name!r} ({adapter.source}): what {module} reads on its own prompts is not "
            "finite. Drop the adapter, or set base.dtype to float32."
        )
    return gram
