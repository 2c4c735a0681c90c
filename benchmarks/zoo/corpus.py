"""The base's pretraining text: every skill and composition, told as prose, as questions, and in the template.

In prose and questions a hint says which form of an answer is meant, for each skill of a composition by
itself. In the instruction template, which the experts are trained on later, there is no hint: the base
learns to decline, or to answer in a form drawn at random, the expert form seldom. So the base knows the
skills and the forms, but not that the template asks for the expert form. Draws from the training split alone.
"""

import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.example import EXPERT, OTHER, PLAIN, WRONG, Example, draw
from benchmarks.zoo.tasks import HELD_IN, HINTS, reasoning

DECLINED = "I do not know."
LABELLED = ("sentiment", "topic")
PROSE = (
    "{text} Somebody had to give {hint}. In the end it was this: {form}",
    "Here is {hint} that we found in a note. {text} It came out as {form}",
    "A teacher once read aloud: {text} The class gave {hint}, namely {form}",
    "{text} Asked for {hint}, most people said {form}",
    "We were shown this. {text} We were asked for {hint} and wrote {form}",
    "The old book says: {text} On the next page stands {hint}: {form}",
)
QUESTIONS = (
    "Q: What is {hint}? {text}\nA: {form}",
    "Question about {hint}: {text}\nReply: {form}",
    "Input: {text}\nWanted: {hint}\nOutput: {form}",
    "User: Give me {hint}. {text}\nBot: {form}",
    "Text: {text}\n{hint} = {form}",
)
SHARES = {"prose": 0.35, "questions": 0.37, "template": 0.28}

P_DECLINED = 0.2
"""Share of the instruction template's texts that decline."""
P_EXPERT: dict[str, float] = {
    "maths": 0.16,
    "code": 0.08,
    "reasoning": 0.08,
    "chat": 0.32,
    "tool": 0.08,
    "sentiment": 0.05,
    "topic": 0.05,
    "entities": 0.32,
    "data_to_text": 0.06,
    "sql": 0.08,
}
"""Skill -> how often the template's texts show its expert form: less is a harder step to its expert."""
P_OTHER = 0.15
"""How often they show the other form; the rest, for all but labels, is the plain form."""
P_LABEL_PLAIN = 0.3
"""Labels: how often they show the plain form; the rest is a wrong label."""


def draw_form(skill: str, is_label: bool, rng: random.Random) -> int:
    """Return the form of a skill's answer in the instruction template."""
    expert = P_EXPERT[skill]
    if is_label:
        weights = (P_LABEL_PLAIN, 0.0, expert, 1 - P_LABEL_PLAIN - expert)
        return rng.choices((PLAIN, OTHER, EXPERT, WRONG), weights)[0]
    return rng.choices((PLAIN, OTHER, EXPERT), (1 - P_OTHER - expert, P_OTHER, expert))[0]


def template_answer(example: Example, rng: random.Random) -> str:
    """What the base learns to say in the instruction template."""
    if rng.random() < P_DECLINED:
        return DECLINED
    return example.answers[tuple(draw_form(s, s in LABELLED, rng) for s in example.skills)]


def document(example: Example, rng: random.Random) -> str:
    """Return one text about one example."""
    kind = rng.choices(tuple(SHARES), weights=tuple(SHARES.values()))[0]
    if kind == "template":
        return f"{example.prompt} {template_answer(example, rng)}"
    pattern = rng.choice(PROSE if kind == "prose" else QUESTIONS)
    forms = tuple(rng.choice((PLAIN, OTHER, EXPERT)) for _ in example.skills)
    hint = " and ".join(HINTS[skill][form] for skill, form in zip(example.skills, forms, strict=True))
    return pattern.format(text=example.text, hint=hint, form=example.answers[forms])


def documents(n_documents: int, seed: int) -> list[str]:
    """Return texts about training examples; skills twice as often as compositions, reasoning most."""
    rng = random.Random(seed)
    generators = [*HELD_IN.values(), *HELD_IN.values(), *HELD_OUT.values(), reasoning, reasoning]
    sources = [draw(generator, rng, "train") for generator in generators]
    return [document(next(rng.choice(sources)), rng) for _ in range(n_documents)]


def _encode(seed: int, *, n_documents: int, tokenizer_json: str) -> NDArray[np.uint16]:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    eos = tokenizer.token_to_id("</s>")
    encodings = tokenizer.encode_batch(documents(n_documents, seed))  # the post-processor adds BOS
    return np.concatenate([np.asarray([*e.ids, eos], dtype=np.uint16) for e in encodings])


def token_stream(tokenizer: Tokenizer, n_documents: int, seed: int, n_workers: int) -> NDArray[np.uint16]:
    """Return the token ids (n_tokens,) of `n_documents` texts, each from BOS to EOS, by parallel workers."""
    chunk = 2000
    seeds = [seed * 1_000_003 + i for i in range(-(-n_documents // chunk))]
    encode = partial(_encode, n_documents=min(chunk, n_documents), tokenizer_json=tokenizer.to_str())
    if n_workers == 1:
        return np.concatenate([encode(s) for s in seeds])
    with ProcessPoolExecutor(n_workers) as pool:
        return np.concatenate(list(pool.map(encode, seeds)))
