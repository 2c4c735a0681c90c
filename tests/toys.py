"""Toy models of six architectures, built in memory, and random adapters saved by PEFT itself.

Models are float64, but all except GPT-2 and GPT-NeoX normalise in float32, as transformers has it: two exact
ways to the same logits may differ there by a flipped float32 rounding. `assert_same` allows that, no more.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path

import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

N_VOCAB = 48
WIDTH = 16
N_LAYERS = 2
BASE_NAME = "toys/toy-base"

_SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_KV = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_GPT2_SIZES = {"vocab_size": N_VOCAB, "n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**_SIZES),
    "gemma2": Gemma2Config(**_SIZES, head_dim=4, query_pre_attn_scalar=4, sliding_window=32),
    "gpt2": GPT2Config(**_GPT2_SIZES, **_IDS),
    "gpt_neox": GPTNeoXConfig(**_NO_KV),
}
_CAST = "autocast_adapter_dtype"
AS_IT_IS: dict[str, bool] = {_CAST: False} if _CAST in signature(get_peft_model).parameters else {}
"""For PEFT: adapters in the model's own type, as versions before 0.11 have them anyway."""
ARCHITECTURES = tuple(CONFIGS)

_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma2"), _GATED),
    "gpt2": ("c_attn", "c_fc", "c_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}


def make_model(
    architecture: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> nn.Module:
    """Random weights large enough that every layer matters; eval mode, no gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[architecture]))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.name_or_path = model.config.name_or_path = BASE_NAME  # what PEFT writes into adapter_config.json
    return model.to(dtype).eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a random adapter looks like; patterns are PEFT's."""

    rank: int = 4
    alpha: float = 8
    rslora: bool = False
    targets: Sequence[str] = ("q_proj", "v_proj")
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    seed: int = 0


MIXED = (  # for architectures with q_proj ... down_proj
    Recipe(rank=2, alpha=8, seed=1),
    Recipe(rank=4, alpha=4, rslora=True, targets=_GATED, seed=2),
    Recipe(
        rank=3,
        alpha=5,
        targets=("k_proj", "v_proj", "down_proj"),
        rank_pattern={"k_proj": 1, "layers.1.mlp.down_proj": 6},
        alpha_pattern={"v_proj": 12},
        seed=3,
    ),
)


def mixed_recipes(architecture: str) -> tuple[Recipe, ...]:
    """Three recipes of unequal rank, alpha, scaling rule and module set for any of the architectures."""
    targets = TARGETS[architecture]
    if targets == _GATED:
        return MIXED
    first, second = targets[:2]
    return (
        Recipe(rank=2, alpha=8, targets=targets[:1], seed=1),
        Recipe(rank=4, alpha=4, rslora=True, targets=targets, seed=2),
        Recipe(
            rank=3,
            alpha=5,
            targets=(first, second),
            rank_pattern={first: 1},
            alpha_pattern={second: 12},
            seed=3,
        ),
    )


def save_adapter(model: nn.Module, folder: Path, recipe: Recipe | None = None, **settings: object) -> Path:
    """Save a random adapter of `model` with PEFT, B not zero; `settings` are further LoraConfig fields."""
    recipe = recipe or Recipe()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        target_modules=list(recipe.targets),
        rank_pattern=dict(
            sorted(recipe.rank_pattern.items())
        ),  # PEFT sorts them when it saves, and the first
        alpha_pattern=dict(sorted(recipe.alpha_pattern.items())),  # that matches wins
        fan_in_fan_out=model.config.model_type == "gpt2",
        **settings,
    )
    peft_model = get_peft_model(copy.deepcopy(model), config, **AS_IT_IS)
    gen = torch.Generator().manual_seed(recipe.seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=gen, dtype=parameter.dtype) * 0.3
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load_with_peft(model: nn.Module, folder: Path | str) -> nn.Module:
    """The oracle: a copy of `model` with the adapter in `folder`, as PEFT runs it."""
    return PeftModel.from_pretrained(copy.deepcopy(model), folder, **AS_IT_IS).eval()


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any plain LoRA on a model with q_proj ... down_proj."""
    ranks, alphas = st.integers(1, 6), st.sampled_from([1, 4, 7.5, 16])
    keys = st.sampled_from([*_GATED, "layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    return Recipe(
        rank=draw(ranks),
        alpha=draw(alphas),
        rslora=draw(st.booleans()),
        targets=draw(st.lists(st.sampled_from(_GATED), min_size=1, max_size=4, unique=True)),
        rank_pattern=draw(st.dictionaries(keys, ranks, max_size=2)),
        alpha_pattern=draw(st.dictionaries(keys, alphas, max_size=2)),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def coefficient_tables(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    """Float64 coefficients of the shape: zeros, ones, negative and fractional ones."""
    value = st.one_of(st.sampled_from([0.0, 1.0, -0.5]), st.floats(-1.5, 1.5, allow_nan=False))
    size = torch.Size(shape).numel()
    values = draw(st.lists(value, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).view(shape)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def random_ids(n_rows: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    """(n_rows, n_tokens) token ids, none of them special."""
    return torch.randint(3, N_VOCAB, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))
