"""Answer a batch with a decoder model: score choices, or write greedily.

Knows texts and one batch that fits in memory; how queries are grouped is evaluation.py's, and how tokens are
written one after the other writing.py's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_merging.model.rows import device_of, forward, pad_left, pad_right
from llm_merging.model.writing import write_greedily
from search.sampling import encode_input

TIE_NATS = 1e-5
"""Scores this close are equal: the lowest index wins, whatever a batch does to the last bits."""


def predict_multiple_choice(
    transformer: nn.Module,
    input_tokenizer: Any,
    target_tokenizer: Any,
    batch: Mapping[str, Sequence[Any]],
    *,
    skip_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return each query's best choice and all scores: the summed log-probability of the choice's tokens.

    Args:
        batch: `input` (n_queries texts) and `answer_choices` (n_queries lists of texts, of any lengths).
        skip_first: leave every choice's first token out of its score, as the competition's own scorer does.

    Returns:
        Indices (n_queries,) and scores (n_queries, most choices), -inf where a query has fewer choices.
    """
    prompts = [encode_input(input_tokenizer, text) for text in batch["input"]]
    choices = [[encode_choice(target_tokenizer, text) for text in texts] for texts in batch["answer_choices"]]
    scores = score_choices(transformer, prompts, choices, pad=_pad_id(input_tokenizer), skip_first=skip_first)
    best = (scores >= scores.amax(dim=-1, keepdim=True) - TIE_NATS).int().argmax(dim=-1)
    return best, scores


def generate(
    transformer: nn.Module,
    input_tokenizer: Any,
    target_tokenizer: Any,
    batch: Mapping[str, Sequence[Any]],
    max_gen_len: int,
) -> tuple[list[list[int]], list[str]]:
    """Continue each input greedily to an end token or `max_gen_len` tokens; return new ids and texts."""
    prompts = [encode_input(input_tokenizer, text) for text in batch["input"]]
    stop_ids = end_ids(transformer, input_tokenizer)
    written = write_greedily(transformer, prompts, max_gen_len, stop_ids, pad=_pad_id(input_tokenizer))
    return written, [target_tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


def encode_choice(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a choice: without BOS, with EOS."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def end_ids(transformer: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's EOS and those of the model's generation config."""
    configured = getattr(getattr(transformer, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)


@torch.inference_mode()
def score_choices(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    pad: int,
    skip_first: bool,
) -> Tensor:
    """Sum log p(token | prompt, tokens before it) over each choice; a prompt is read once for all of them.

    Returns:
        Scores (n_prompts, most choices) on the CPU, -inf where a prompt has fewer choices.

    Raises:
        FloatingPointError: if a score is not finite.
    """
    device = device_of(model)
    ids, mask = pad_left(prompts, pad, device)
    read = forward(model, ids, mask)
    owner = torch.tensor([p for p, texts in enumerate(choices) for _ in texts], device=device)  # (n_rows,)
    read.past_key_values.batch_select_indices(owner)
    choice_ids, choice_mask = pad_right([ids for texts in choices for ids in texts], pad, device)
    rest = forward(
        model, choice_ids, torch.cat([mask[owner], choice_mask], dim=1), read.past_key_values, last_only=False
    )
    first_logp = _log_softmax(read.logits[:, -1])[owner].gather(1, choice_ids[:, :1])  # (n_rows, 1)
    rest_logp = _log_softmax(rest.logits[:, :-1]).gather(2, choice_ids[:, 1:, None]).squeeze(2)
    logp = torch.cat([torch.zeros_like(first_logp) if skip_first else first_logp, rest_logp], dim=1)
    totals = torch.where(choice_mask.bool(), logp, 0.0).sum(dim=1).cpu()  # (n_rows,)
    if not totals.isfinite().all():
        raise FloatingPointError("a choice's score is not finite: the model's outputs overflow in its dtype")
    per_prompt = totals.split([len(texts) for texts in choices])
    return nn.utils.rnn.pad_sequence(per_prompt, batch_first=True, padding_value=float("-inf"))


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _pad_id(tokenizer: Any) -> int:
    """Return the id that pads: EOS, which every model knows; a padding token may lie beyond a vocabulary."""
    return int(tokenizer.eos_token_id)
