"""Measure a model on the zoo's tasks: exact match, or the likeliest choice.

Knows models and examples, not how either was made.
"""

import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.example import Example, draw_distinct
from benchmarks.zoo.tasks import HELD_IN

Key = TypeVar("Key", bound=Hashable)
BATCH_ROWS = 1024


def measured_examples(n: int, split: str, seed: int) -> dict[str, list[Example]]:
    """Return `n` examples of each task of one split."""
    tasks = {**HELD_IN, **HELD_OUT}
    return {
        name: draw_distinct(generator, random.Random(f"{seed} {name}"), split, n)
        for name, generator in tasks.items()
    }


def _batches(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), BATCH_ROWS):
        yield examples[start : start + BATCH_ROWS]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    max_new_tokens: int,
) -> list[str]:
    """Answer greedily; returns one stripped text an example."""
    answers: list[str] = []
    for part in _batches(examples):
        prompts = tokenizer([e.prompt for e in part], return_tensors="pt", padding=True, padding_side="left")
        prompts = prompts.to(model.device)
        ids = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


@torch.inference_mode()
def choose_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[str]:
    """Return for each example its choice with the highest summed log-probability, EOS included."""
    chosen: list[str] = []
    for part in _batches(examples):
        n_choices = len(part[0].choices)
        prompts = [tokenizer(e.prompt).input_ids for e in part for _ in e.choices]
        choices = [
            [*tokenizer(c, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            for e in part
            for c in e.choices
        ]
        scores = _choice_log_probability(model, prompts, choices, tokenizer.pad_token_id)
        best = scores.view(-1, n_choices).argmax(dim=1).tolist()
        chosen += [example.choices[index] for example, index in zip(part, best, strict=True)]
    return chosen


def _choice_log_probability(
    model: PreTrainedModel, prompts: list[list[int]], choices: list[list[int]], pad: int
) -> Tensor:
    """Return the summed log-probability (n_rows,) of each choice after its prompt."""
    rows = [p + c for p, c in zip(prompts, choices, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
    logp = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1]
    token_logp = logp.gather(2, ids[:, 1:, None])[..., 0]
    position = torch.arange(1, longest, device=model.device)
    first = torch.tensor([len(p) for p in prompts], device=model.device)[:, None]
    last = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    return (token_logp * ((position >= first) & (position < last))).sum(dim=1)


def accuracies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Mapping[Key, list[Example]],
    max_new_tokens: int,
) -> dict[Key, float]:
    """Return the share of right answers of each group of examples of one task."""
    free = [e for group in examples.values() for e in group if not e.choices]
    given = dict(zip(map(id, free), generate_answers(model, tokenizer, free, max_new_tokens), strict=True))
    for group in examples.values():
        if group[0].choices:
            given |= dict(zip(map(id, group), choose_answers(model, tokenizer, group), strict=True))
    return {key: sum(given[id(e)] == e.answer for e in group) / len(group) for key, group in examples.items()}


def load(base: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the base in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).eval()
    return model, AutoTokenizer.from_pretrained(base)


@torch.no_grad()
def summed_deltas(base: Path, adapters: Sequence[Path]) -> dict[str, Tensor]:
    """Return the sum of the adapters' weight updates by module name, as PEFT computes them."""
    total: dict[str, Tensor] = {}
    for folder in adapters:
        model = PeftModel.from_pretrained(load(base, "cpu")[0], folder)
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                delta = module.get_delta_weight("default").float()
                total[name] = total.get(name, torch.zeros_like(delta)) + delta
    return total


@torch.no_grad()
def scaled_merge(base: Path, deltas: dict[str, Tensor], scale: float, device: str) -> PreTrainedModel:
    """Return the base with `scale` times the summed updates added."""
    model, _ = load(base, "cpu")
    for name, delta in deltas.items():
        model.get_submodule(name).weight += scale * delta
    return model.to(device)
