"""One scored generation with parts of it taken away, and its matrix products and attention by themselves.

Knows a search step's scene and how an evaluator fills its passes; not the profiler, tables or files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.bench_search_step import OBJECTIVE, StepScene
from benchmarks.speed_scene import ALL_SEVEN
from search.compiled import pad_to, row_sizes
from search.experts import TokenBudget, scored_logits
from search.optimizer import BatchOptimizer
from search.plain_cma import MIN_POPULATION


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass of a generation."""

    candidates: list[int]
    prompts: list[int]
    n_rows: int
    """With those of padding."""


class GenerationParts:
    """Ways to run more and more of a generation, each over all of its forward passes."""

    def __init__(self, scene: StepScene, n_candidates: int) -> None:
        """Draw the candidates; the scene has the prompts."""
        self.scene, self.forward = scene, scene.forward
        self.model: Any = scene.forward.model
        scene.table = scene.forward.coefficients(n_candidates)
        self.width = scene.passes.lengths[0]  # all prompts are of one length
        self.batches = self._fill_batches(n_candidates)
        self._drawn: dict[tuple[int, ...], Tensor] = {}

    def _fill_batches(self, n_candidates: int) -> list[Batch]:
        """Return the passes that an evaluator makes: all candidates on a prompt, then on the next one."""
        tokens = self.forward.sizes.tokens_per_forward
        sizes = row_sizes(self.width, tokens) if self.scene.passes.widths else []
        rows, per_pass = range(n_candidates * len(self.scene.rows)), max(1, tokens // self.width)
        batches = []
        for start in range(0, len(rows), per_pass):
            own = rows[start : start + per_pass]
            places = [row % n_candidates for row in own], [row // n_candidates for row in own]
            batches.append(Batch(*places, pad_to(len(own), sizes)))
        return batches

    @property
    def n_tokens(self) -> int:
        """Tokens of all candidates' prompts."""
        return sum(len(batch.prompts) for batch in self.batches) * self.forward.sizes.n_tokens

    @property
    def n_padded_tokens(self) -> int:
        """The same, with what passes are padded by."""
        return sum(batch.n_rows for batch in self.batches) * self.width

    @property
    def n_scored(self) -> int:
        """Positions that pass through the output layer."""
        scored = self.scene.prompts.scored
        return sum(len(scored[prompt]) for batch in self.batches for prompt in batch.prompts)

    @cached_property
    def weights(self) -> list[Tensor]:
        """The linear layers' weights (d_out, d_in), in order."""
        named = self.model.named_modules()
        return [layer.weight for name, layer in named if name.endswith(ALL_SEVEN)]

    def ways(self) -> dict[str, Callable[[], object]]:
        """Return all ways to time, by name."""
        return {
            "base_products": self.base_products,
            "output_product": self.output_product,
            "attention": self.attention,
            "decoder": self.decoder,
            "base": self.base,
            "mixed": self.mixed,
            "scored": self.score,
            "generation": self.scene.score_population,
            "optimizer": self.optimizer_step,
        }

    # ---- by themselves

    def base_products(self) -> None:
        """The linear layers' products alone, on random activations."""
        for batch in self.batches:
            for weight in self.weights:
                F.linear(self._draw(batch.n_rows * self.width, weight.shape[1]), weight)

    def output_product(self) -> None:
        """The output layer's product alone, at as many positions as are scored."""
        weight = self.model.get_output_embeddings().weight
        for batch in self.batches:
            n_scored = sum(len(self.scene.prompts.scored[prompt]) for prompt in batch.prompts)
            F.linear(self._draw(n_scored, weight.shape[1]), weight)

    def attention(self) -> None:
        """Causal attention alone, of all layers."""
        sizes = self.forward.sizes
        d_head = sizes.d_model // sizes.n_heads
        for batch in self.batches:
            q = self._draw(batch.n_rows, sizes.n_heads, self.width, d_head)
            k = self._draw(batch.n_rows, sizes.n_kv_heads, self.width, d_head)
            for _ in range(sizes.n_layers):
                F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    def _draw(self, *shape: int) -> Tensor:
        """Return random numbers of a shape, the same each time."""
        if shape not in self._drawn:
            gen = torch.Generator(self.forward.device).manual_seed(len(self._drawn))
            drawn = torch.randn(shape, generator=gen, device=self.forward.device)
            self._drawn[shape] = drawn.to(self.forward.sizes.dtype)
        return self._drawn[shape]

    # ---- more and more of the whole

    def decoder(self) -> None:
        """The base's layers, without its output layer."""
        for batch in self.batches:
            ids = torch.zeros(batch.n_rows, self.width, dtype=torch.int64)
            ids[: len(batch.prompts)] = torch.tensor([self.scene.prompts.ids[p] for p in batch.prompts])
            with self.forward.active():
                self.model.base_model(input_ids=ids.to(self.forward.device), use_cache=False)

    def base(self) -> None:
        """The base, its output layer where prompts are scored."""
        for batch in self.batches:
            with self.forward.active():
                shape = batch.n_rows, self.width
                scored_logits(self.model, self.scene.prompts, batch.prompts, shape=shape)

    def mixed(self) -> None:
        """The same, every row under its own mixture."""
        for batch in self.batches:
            self._mix(batch)

    def score(self) -> None:
        """The same, and the objective's sums."""
        for batch in self.batches:
            self.scene.passes.sums(OBJECTIVE, self._mix(batch), batch.prompts)

    def _mix(self, batch: Batch) -> Tensor:
        budget = TokenBudget(self.forward.sizes.tokens_per_forward)
        return self.scene.passes.mixed(self.scene.table[batch.candidates], batch.prompts, budget)

    @cached_property
    def _optimizer(self) -> BatchOptimizer:
        n_candidates, *shape = self.scene.table.shape
        start, n_asked = [0.3] * (shape[0] * shape[1]), max(MIN_POPULATION, n_candidates)
        return BatchOptimizer(start, 0.15, n_candidates=n_asked, budget=10_000, seed=0)

    def optimizer_step(self) -> None:
        """Ask for a generation with a coefficient an adapter and layer, and tell its losses."""
        genomes = self._optimizer.ask()
        self._optimizer.tell((genomes**2).sum(1))


def split_parts(parts: GenerationParts, ms: Mapping[str, float], flops_per_s: float) -> dict[str, Any]:
    """Return which share of a generation each part has, in ms, and the floors of matrix products.

    The shares add up to the generation with its optimiser step. What is timed by itself counts as it is; the
    rest of what it is part of is the difference.
    """
    padding = 1 - parts.n_tokens / parts.n_padded_tokens
    shares = {
        "base matrix products": ms["base_products"] * (1 - padding),
        "their padding": ms["base_products"] * padding,
        "attention": ms["attention"],
        "norms, rotary, elementwise, launches": ms["decoder"] - ms["base_products"] - ms["attention"],
        "output layer": ms["base"] - ms["decoder"],
        "adapters, each row's mixture": ms["mixed"] - ms["base"],
        "objective": ms["scored"] - ms["mixed"],
        "sums, and waiting for the host": ms["generation"] - ms["scored"],
        "ask and tell": ms["optimizer"],
    }
    adapters = parts.forward.stacked.modules.values()
    n_multiplied = {
        "base matrix products": parts.n_tokens * sum(weight.numel() for weight in parts.weights),
        "output layer": parts.n_scored * parts.model.get_output_embeddings().weight.numel(),
        "adapters, each row's mixture": parts.n_tokens * sum(m.A.numel() + m.B.numel() for m in adapters),
    }
    floors = {name: 1000 * 2 * n / flops_per_s for name, n in n_multiplied.items()}
    return {"shares_ms": shares, "floors_ms": floors, "wall_ms": sum(shares.values())}
