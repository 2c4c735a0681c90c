"""A model of Mistral's architecture with random weights, and random adapters: what speed is measured on.

Knows sizes and devices; not what is measured. No weight is zero: zeros let a device run faster.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig

from search.groups import Groups, group_modules
from search.prompts import PromptSet
from search.stack import StackedFactors, StackedModule

Q_AND_V = ("q_proj", "v_proj")
ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_UPDATE_NORM = 0.1
"""An adapter's update, in norms of the weight it is added to: trained ones have 0.05 to 0.15."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is built; the defaults are Mistral-7B and the competition's adapters."""

    n_vocab: int = 32_000
    d_model: int = 4_096
    d_inner: int = 14_336
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 8
    n_adapters: int = 27
    n_tokens: int = 64
    """Of each prompt; the second half is scored."""
    tokens_per_forward: int = 8_192
    dtype: torch.dtype = torch.bfloat16

    def flops_per_token(self, n_scored_share: float = 0.5) -> float:
        """Return the model's own FLOPs: two a weight, causal attention, the output layer where scored."""
        d_kv = self.d_model // self.n_heads * self.n_kv_heads
        layer = 2 * self.d_model * (self.d_model + d_kv) + 3 * self.d_model * self.d_inner
        attention = self.n_tokens * self.d_model  # scores and values, on average half the tokens each
        output = n_scored_share * self.n_vocab * self.d_model
        return 2 * (self.n_layers * (layer + attention) + output)


MISTRAL_7B = Sizes()
TINY = Sizes(
    n_vocab=320,
    d_model=64,
    d_inner=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    n_adapters=3,
    n_tokens=16,
    tokens_per_forward=128,
    dtype=torch.float32,
)
"""Seconds on a CPU: to see that all runs and agrees."""


def _weight_std(sizes: Sizes) -> float:
    """Standard deviation of the weights: 0.02 at Mistral-7B's width, so that logits spread as much at any."""
    return 0.02 * (4_096 / sizes.d_model) ** 0.5


def build_model(sizes: Sizes, device: torch.device, seed: int = 0) -> Any:
    """Return the model, its weights drawn on the device."""
    config = MistralConfig(
        vocab_size=sizes.n_vocab,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_inner,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        sliding_window=None,
        max_position_embeddings=4_096,
        initializer_range=_weight_std(sizes),
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype)  # type: ignore[no-untyped-call]
    return model.eval().requires_grad_(False)


def build_stack(
    model: Any, sizes: Sizes, targets: tuple[str, ...] = Q_AND_V, rank: int = 8, seed: int = 1
) -> tuple[StackedFactors, Groups]:
    """Return random adapters on some modules of every layer, and a coefficient for each layer."""
    gen = torch.Generator(model.device).manual_seed(seed)
    total_rank = sizes.n_adapters * rank
    owner = torch.arange(sizes.n_adapters, device=model.device).repeat_interleave(rank)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=gen, device=model.device) * scale).to(sizes.dtype)

    modules = {}
    for name, layer in model.named_modules():
        if name.endswith(targets):
            d_out, d_in = layer.weight.shape
            scale = _UPDATE_NORM * _weight_std(sizes) * (d_in / rank) ** 0.5
            A, B = draw(total_rank, d_in, scale=d_in**-0.5), draw(d_out, total_rank, scale=scale)
            modules[name] = StackedModule(A, B, owner)
    names = tuple(f"adapter{index}" for index in range(sizes.n_adapters))
    return StackedFactors(modules, names), group_modules(modules, "layer")


def in_float32(stacked: StackedFactors) -> StackedFactors:
    """Return the same factors in float32."""
    wide = {name: replace(m, A=m.A.float(), B=m.B.float()) for name, m in stacked.modules.items()}
    return StackedFactors(wide, stacked.names)


def draw_prompts(sizes: Sizes, n_prompts: int, seed: int = 2) -> PromptSet:
    """Return random prompts of one length, the adapters' in turn, with their second half scored."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, sizes.n_vocab, (n_prompts, sizes.n_tokens)).tolist()
    return PromptSet(
        ids=tuple(map(tuple, ids)),
        expert=np.arange(n_prompts) % sizes.n_adapters,
        scored=(tuple(range(sizes.n_tokens // 2, sizes.n_tokens - 1)),) * n_prompts,
        texts=("",) * n_prompts,
        from_skeleton=(True,) * n_prompts,
        n_experts=sizes.n_adapters,
    )


def draw_coefficients(sizes: Sizes, n_candidates: int, n_groups: int, seed: int = 3) -> Tensor:
    """Return coefficients (n_candidates, n_groups, n_adapters), as PEFT has them: the same in all groups."""
    gen = torch.Generator().manual_seed(seed)
    weights = torch.rand(n_candidates, 1, sizes.n_adapters, generator=gen) * 0.5 + 0.05
    return weights.expand(-1, n_groups, -1)
