"""Train LoRA experts (and the joint LoRA) on the instruction template, with PEFT.

Knows specs, generators and a base; PEFT does the adapting and the saving.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.zoo.example import Example, Generator, draw
from benchmarks.zoo.pretrain import warmup_cosine
from benchmarks.zoo.sizes import ExpertSpec

BASE_NAME = "data/zoo/base"
"""What the adapters call their base."""
IGNORED = -100
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config(spec: ExpertSpec) -> LoraConfig:
    """Scaling 2 for every expert: alpha = 2 rank, or 2 sqrt(rank) with rsLoRA."""
    alpha = 2 * math.sqrt(spec.rank) if spec.rslora else 2 * spec.rank
    return LoraConfig(
        r=spec.rank,
        lora_alpha=round(alpha),
        use_rslora=spec.rslora,
        target_modules=ALL_MODULES if spec.modules == "all" else ["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )


def batch(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, loss_on: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids, attention mask and labels, each (n_rows, n_tokens), right-padded."""
    rows, labels = [], []
    for example in examples:
        prompt = tokenizer(example.prompt).input_ids
        answer = [
            *tokenizer(example.answer, add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]
        rows.append(prompt + answer)
        labels.append((prompt if loss_on == "sequence" else [IGNORED] * len(prompt)) + answer)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask, targets


def train_lora(
    base: Path,
    spec: ExpertSpec,
    generators: Sequence[Generator],
    *,
    n_rows: int,
    seed: int,
    device: str,
) -> PeftModel:
    """Return the trained PEFT model (float32); examples come from the training split, tasks in turn."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    model = get_peft_model(model, lora_config(spec))
    sources = [draw(generator, rng, "train") for generator in generators]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=0.0)
    model.train()
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * warmup_cosine(step, spec.steps, max(1, spec.steps // 20))
        examples = [next(sources[i % len(sources)]) for i in range(n_rows)]
        ids, mask, labels = (t.to(device) for t in batch(examples, tokenizer, spec.loss_on))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"{spec.task}: {spec.modules} r={spec.rank} loss {loss.item():.4f}")
    return model.eval()


def save_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """Save with PEFT in bf16, naming the base as users of the zoo load it."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT compares with the shipped base
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the zoo has one for all
