"""Train the zoo's base from scratch on its own text.

Knows token streams and sizes, not skills.
"""

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from benchmarks.zoo.sizes import ZooSize

PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05


def new_base(size: ZooSize, tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """Return an untrained model in float32."""
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MistralForCausalLM(config)


def warmup_cosine(step: int, n_steps: int, n_warmup: int) -> float:
    """Factor on the peak learning rate: linear up, then a cosine down to a twentieth."""
    if step < n_warmup:
        return (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(model: MistralForCausalLM, stream: NDArray[np.uint16], size: ZooSize, seed: int) -> None:
    """Train `model` in place on rows cut at random places of `stream` (n_tokens,); bf16 autocast on CUDA."""
    device = model.device
    cuda = device.type == "cuda"
    tokens = torch.from_numpy(stream.astype(np.int16)).to(device)  # ids fit: vocabularies are below 32,768
    gen = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=cuda
    )
    forward = torch.compile(model) if cuda else model
    offsets = torch.arange(size.row_tokens, device=device)
    model.train()
    started = time.monotonic()
    for step in range(size.pretrain_steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * warmup_cosine(step, size.pretrain_steps, 200)
        high = len(tokens) - size.row_tokens
        starts = torch.randint(high, (size.pretrain_rows, 1), device=device, generator=gen)
        ids = tokens[starts + offsets].long()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0 or step == size.pretrain_steps - 1:
            elapsed_s = time.monotonic() - started
            print(f"pretrain {step}/{size.pretrain_steps} loss {loss.item():.4f} {elapsed_s:.0f} s")
    model.eval()
