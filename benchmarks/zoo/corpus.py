"""The base's pretraining text: every skill and composition, told as prose, as questions, and in the template.

In prose and questions the forms of an answer that the base may know are mixed at random. In the instruction
template, which the experts are trained on later, the base only learns to decline, to answer in the plain form, or to
pick a label at random. Expert forms stand alone, apart from what they answer. So the base knows the skills, but not how
to show them as the experts do. Draws from the training split alone.
"""

import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.zoo.compositions import HELD_OUT
from benchmarks.zoo.tasks import HELD_IN, Example, draw, reasoning

DECLINED = "I do not know."
PROSE = (
    "{text} Somebody had to give {hint}. In the end it was this: {form}",
    "Here is {hint} that we found in a note. {text} It came out as {form}",
    "A teacher once read aloud: {text} The class gave {hint}, namely {form}",
    "{text} Asked for {hint}, most people said {form}",
    "We were shown this. {text} We were asked for {hint} and wrote {form}",
    "The old book says: {text} On the next page stands {hint}: {form}",
)
QUESTIONS = (
    "Q: What is {hint} here? {text}\nA: {form}",
    "Question about {hint}: {text}\nReply: {form}",
    "Input: {text}\nWanted: {hint}\nOutput: {form}",
    "User: Give me {hint}. {text}\nBot: {form}",
    "Text: {text}\n{hint} = {form}",
)
ALONE = (
    "A line that somebody left here: {form}",
    "Nobody knows why it says: {form}",
)
SHARES = {"prose": 0.4, "questions": 0.35, "template": 0.17, "alone": 0.08}


def template_answer(example: Example, rng: random.Random) -> str:
    """What the base learns to say in the instruction template: never the expert form, unless by chance."""
    draw_kind = rng.random()
    if example.choices and draw_kind < 0.6:
        return rng.choice(example.choices)
    return DECLINED if draw_kind < 0.8 and rng.random() < 0.5 else example.forms[0]


def document(example: Example, rng: random.Random) -> str:
    """Return one text about one example."""
    kind = rng.choices(tuple(SHARES), weights=tuple(SHARES.values()))[0]
    if kind == "template":
        return f"{example.prompt} {template_answer(example, rng)}"
    if kind == "alone":
        return rng.choice(ALONE).format(form=example.answer)
    pattern = rng.choice(PROSE if kind == "prose" else QUESTIONS)
    return pattern.format(text=example.text, hint=example.hint, form=rng.choice(example.forms[:-1]))


def documents(n_documents: int, seed: int) -> list[str]:
    """Return texts about examples of the training split; a skill is twice as frequent as a composition, reasoning four times."""
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
    """Return the token ids (n_tokens,) of `n_documents` texts, each from BOS to EOS, made by parallel workers."""
    chunk = 2000
    seeds = [seed * 1_000_003 + i for i in range(-(-n_documents // chunk))]
    encode = partial(_encode, n_documents=min(chunk, n_documents), tokenizer_json=tokenizer.to_str())
    if n_workers == 1:
        return np.concatenate([encode(s) for s in seeds])
    with ProcessPoolExecutor(n_workers) as pool:
        return np.concatenate(list(pool.map(encode, seeds)))
