"""Models and adapters of random weights, in the exact shapes of real ones: to measure without a download.

`dummy:mistral-7b` is a base, `dummy:mistral-7b/q_proj,v_proj/r8#3` an adapter of rank 8 on these modules,
the third of its kind. Knows shapes, seeds and names; not files, the hub or what is measured.
"""

import itertools
import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

from search.errors import InputError
from search.locate import DUMMY
from search.versions import dtype_option

RELATIVE_NORM = 0.1
"""||Delta|| / ||W|| (Frobenius) of each module of a random adapter; trained ones have 0.05 to 0.15."""
EMBEDDING_DEVIATION = 1.0
"""Of its embeddings, which transformers draws like all else: attention's mean over the text then drowns which
token came last, and a third of greedy answers are loops (1,024 wide, 8 layers; with 1.0 none of them is)."""
SCALING = 2.0
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
"""The most frequent ones first: the vocabulary ends before all groups of three are in."""
ARCHITECTURES: dict[str, dict[str, float]] = {
    "mistral-7b": {  # config.json of mistralai/Mistral-7B-v0.1; all else is MistralConfig's default
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "tiny": {  # for a CPU; a layer changes its input as much as above: 0.16 * sqrt(64) = 0.02 * sqrt(4096)
        "initializer_range": 0.16,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "sliding_window": 4096,
    },
}
_ADAPTER = re.compile(r"dummy:(?P<base>[\w.-]+)/(?P<modules>\w+(?:,\w+)*)/r(?P<rank>[1-9]\d*)#(?P<seed>\d+)")


@dataclass(frozen=True, slots=True)
class RandomFactors:
    """A (rank, d_in) and B (d_out, rank) of each module, by its name in the base."""

    factors: dict[str, tuple[Tensor, Tensor]]
    base: str
    """Source of the base that they fit."""
    sha256: str
    """Of the source: the same source gives the same numbers."""


def is_dummy(source: str) -> bool:
    """Say whether a source asks for random weights."""
    return source.startswith(DUMMY)


def architecture(source: str) -> MistralConfig:
    """Return the configuration of a base.

    Raises:
        InputError: for an architecture that there is not.
    """
    name = source.removeprefix(DUMMY)
    if name not in ARCHITECTURES:
        known = ", ".join(DUMMY + known for known in ARCHITECTURES)
        raise InputError(f"base {source!r}: no such architecture; expected one of {known}.")
    shapes: Any = ARCHITECTURES[name]
    return MistralConfig(**shapes, tie_word_embeddings=False)


def make_model(source: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Draw a base's weights on the device and in the type that they stay in, no copy; the same each time.

    Raises:
        InputError: for an architecture that there is not.
    """
    config: Any = architecture(source)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, **dtype_option(dtype))  # type: ignore[no-untyped-call]
        nn.init.normal_(model.get_input_embeddings().weight, 0, EMBEDDING_DEVIATION)
    return model  # type: ignore[no-any-return]


def make_shapes(source: str) -> nn.Module:
    """Build a base without weights, on torch's meta device.

    Raises:
        InputError: for an architecture that there is not.
    """
    with torch.device("meta"):
        shapes: nn.Module = AutoModelForCausalLM.from_config(architecture(source))  # type: ignore[no-untyped-call]
    return shapes


def make_factors(source: str) -> RandomFactors:
    """Draw an adapter's factors, float32 on the CPU; every module's update has RELATIVE_NORM.

    E ||B A||^2 = d_out d_in rank s_A^2 s_B^2 for entries of deviations s_A and s_B.

    Raises:
        InputError: if the source is not ARCHITECTURE/MODULES/rRANK#SEED, or names modules that are not there.
    """
    parts = _ADAPTER.fullmatch(source)
    if parts is None:
        raise InputError(
            f"adapter {source!r}: expected dummy:ARCHITECTURE/MODULE,MODULE/rRANK#SEED, for example "
            "dummy:mistral-7b/q_proj,v_proj/r8#1."
        )
    base, rank, wanted = DUMMY + parts["base"], int(parts["rank"]), parts["modules"].split(",")
    linear = {
        name: m for name, m in make_shapes(base).named_modules() if isinstance(m, nn.Linear) and "." in name
    }
    known = {name.rpartition(".")[2] for name in linear}
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"adapter {source!r}: no module {unknown[0]!r}; known: {', '.join(sorted(known))}.")
    gen = torch.Generator().manual_seed(int(parts["seed"]))
    deviation = architecture(base).initializer_range
    spread = (RELATIVE_NORM * deviation / SCALING) ** 0.5 / rank**0.25  # s_A = s_B
    factors = {
        name: (
            spread * torch.randn(rank, module.in_features, generator=gen),
            spread * torch.randn(module.out_features, rank, generator=gen),
        )
        for name, module in linear.items()
        if name.rpartition(".")[2] in wanted
    }
    return RandomFactors(factors, base, sha256(source.encode()).hexdigest())


@cache
def make_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that fills the vocabulary with groups of two and three letters.

    It makes a token of 2.3 letters of real prompts, where Mistral's makes one of about 4: what is measured in
    queries, not in tokens, takes longer with it. Every id has a text, so that what random weights write can
    be read and tokenised again.

    Raises:
        InputError: for an architecture that there is not.
    """
    size = architecture(source).vocab_size
    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    groups = (
        prefix + "".join(group)
        for length in (2, 3)
        for prefix in ("\u0120", "")  # a space, in the byte-level alphabet
        for group in itertools.product(LETTERS, repeat=length)
    )
    pieces = dict.fromkeys(itertools.chain(special, letters, groups))
    vocabulary = [(piece, -1.0) for piece in itertools.islice(pieces, size)]  # fewest pieces win
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
