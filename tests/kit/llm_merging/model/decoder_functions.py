"""Answer a batch of one with a decoder model, as the kit's contract states it."""

import torch


def predict_multiple_choice(model, input_tokenizer, target_tokenizer, batch):
    """Score each choice by the tokens after its first, as the kit does; return indices and scores."""
    best, scores = [], []
    for text, choices in zip(batch["input"], batch["answer_choices"], strict=True):
        prompt = input_tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        own = []
        for choice in choices:
            ids = target_tokenizer(choice, add_special_tokens=False)["input_ids"]
            target = torch.tensor([[*ids, target_tokenizer.eos_token_id]], device=model.device)
            logits = model(input_ids=torch.cat([prompt, target], dim=1)).logits
            logp = logits[:, prompt.shape[1] : -1].float().log_softmax(-1)
            own.append(logp.gather(2, target[:, 1:, None]).sum().item())
        scores.append(own)
        best.append(max(range(len(own)), key=own.__getitem__))
    return best, scores


def generate(model, input_tokenizer, target_tokenizer, batch, max_gen_len):
    """Continue each input greedily; return new token ids and texts."""
    all_ids, texts = [], []
    for text in batch["input"]:
        prompt = input_tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        mask = torch.ones_like(prompt)
        end = target_tokenizer.eos_token_id
        out = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            max_new_tokens=max_gen_len,
            do_sample=False,
            pad_token_id=end,
        )
        ids = out[0, prompt.shape[1] :].tolist()
        all_ids.append(ids)
        texts.append(target_tokenizer.decode(ids, skip_special_tokens=True))
    return all_ids, texts
