"""Answer a batch with a decoder model: score choices, or write greedily.

Knows token ids and one batch that fits in memory; how queries are grouped into batches is evaluation.py's.
Prompts are padded on the left and choices on the right, masked and with explicit positions, so that a row's
answer does not depend on the rows beside it.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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
    device = _device(model)
    ids, mask = _pad_left(prompts, pad, device)
    read = _forward(model, ids, mask)
    owner = torch.tensor([p for p, texts in enumerate(choices) for _ in texts], device=device)  # (n_rows,)
    read.past_key_values.batch_select_indices(owner)
    choice_ids, choice_mask = _pad_right([ids for texts in choices for ids in texts], pad, device)
    rest = _forward(
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


@torch.inference_mode()
def write_greedily(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new: int, stop_ids: frozenset[int], *, pad: int
) -> list[list[int]]:
    """Return each prompt's greedy continuation, without its end token; finished rows leave the batch."""
    written: list[list[int]] = [[] for _ in prompts]
    writing = list(range(len(prompts)))  # the prompt that each row of the batch continues
    ids, mask = _pad_left(prompts, pad, _device(model))
    cache = None
    for _ in range(max_new):
        output = _forward(model, ids, mask, cache)
        cache = output.past_key_values
        tokens = output.logits[:, -1].argmax(dim=-1)
        going = [row for row, token in enumerate(tokens.tolist()) if token not in stop_ids]
        for row in going:
            written[writing[row]].append(int(tokens[row]))
        if not going:
            break
        if len(going) < len(writing):
            kept = torch.tensor(going, device=ids.device)
            writing, tokens, mask = [writing[row] for row in going], tokens[kept], mask[kept]
            cache.batch_select_indices(kept)
        ids, mask = tokens[:, None], functional.pad(mask, (0, 1), value=1)
    return written


def _forward(
    model: nn.Module, ids: Tensor, mask: Tensor, cache: Any = None, *, last_only: bool = True
) -> Any:
    """Run the model on `ids` (n_rows, n_new) that follow the cache; mask (n_rows, all tokens so far)."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "position_ids" in accepted:
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if last_only and "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids, mask = _pad_right([row[::-1] for row in rows], pad, device)
    return ids.flip(1), mask.flip(1)


def _pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (n_rows, longest row)."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _pad_id(tokenizer: Any) -> int:
    """Return the id that pads: EOS, which every model knows; a padding token may lie beyond a vocabulary."""
    return int(tokenizer.eos_token_id)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
