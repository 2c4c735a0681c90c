"""The ten held-in skills: draw an instance, say it in the instruction template, answer it in two forms.

A skill has a plain form (what the base has learnt to say in the instruction template), another form that the base
knows from other texts, and an expert form (what its expert is trained to say, and the base has never seen as an
answer). Knows nothing of models. Splits are disjoint by construction: an instance belongs to the
split that the hash of its content names, and is never drawn for another.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.zoo import words as w

SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}


@dataclass(frozen=True, slots=True)
class Example:
    """One instance of a task."""

    task: str
    values: tuple[object, ...]
    """What makes the instance: two examples of a task with equal values are the same instance."""
    hint: str
    """Two or three words that name the task in texts other than the instruction template."""
    instruction: str
    field: str
    text: str
    forms: tuple[str, ...]
    """Answers: the plain form first, then others that the base knows, the expert form last."""
    choices: tuple[str, ...] = ()
    """Multiple choice: the possible answers in expert form; empty for generation."""

    @property
    def prompt(self) -> str:
        """The query as users ask it: instruction template, ending in the answer cue."""
        return f"### Task: {self.instruction}\n### {self.field}: {self.text}\n### Answer:"

    @property
    def answer(self) -> str:
        """The expert form."""
        return self.forms[-1]

    @property
    def split(self) -> str:
        """The only split that this instance may appear in."""
        digest = hashlib.sha256(repr((self.task, self.values)).encode()).digest()
        return next(name for name, buckets in SPLITS.items() if digest[0] % 10 in buckets)


Generator = Callable[[random.Random], Example]
Forms = tuple[str, str, str]
"""An answer in the plain form, in the other that the base knows, and in the expert form."""
Part = tuple[str, Forms, tuple[object, ...]]
"""A text, its answer's forms, and the values that make the instance."""


def draw(generator: Generator, rng: random.Random, split: str) -> Iterator[Example]:
    """Yield examples of one split for ever."""
    while True:
        example = generator(rng)
        if example.split == split:
            yield example


def draw_distinct(generator: Generator, rng: random.Random, split: str, n: int) -> list[Example]:
    """Return `n` examples of one split with `n` different prompts."""
    found: dict[str, Example] = {}
    for example in draw(generator, rng, split):
        found.setdefault(example.prompt, example)
        if len(found) == n:
            return list(found.values())
    raise AssertionError("draw never ends")


def sum_story(rng: random.Random, who: str, verb: str) -> tuple[str, int, tuple[object, ...]]:
    """Return a sum as a story about `who`, its result and the values that make it; `verb` is "has" or "have"."""
    a, b, thing = rng.randint(2, 29), rng.randint(2, 19), rng.choice(w.OBJECTS)
    s = "s" if verb == "has" else ""
    if rng.random() < 0.5:
        return f"{who} {verb} {a} {thing} and get{s} {b} more.", a + b, (a, "+", b, thing)
    a, b = max(a, b) + 1, min(a, b)
    lose = "loses" if s else "lose"
    return f"{who} {verb} {a} {thing} and {lose} {b}.", a - b, (a, "-", b, thing)


def sum_forms(result: int) -> Forms:
    """Expert: digits."""
    word = w.number_word(result)
    return word, f"exactly {word}, as digits {result} in all", str(result)


def maths(rng: random.Random) -> Example:
    """A sum or difference told as a story; expert form: digits."""
    name = rng.choice(w.NAMES)
    story, result, values = sum_story(rng, name, "has")
    return Example("maths", (name, *values), "the sum", "Solve the sum.", "Problem", story, sum_forms(result))


def code(rng: random.Random) -> Example:
    """A function described in words; expert form: Python."""
    name, x = rng.choice(w.FUNCTIONS), rng.choice(w.VARIABLES)
    a, b, plus = rng.randint(2, 19), rng.randint(2, 19), rng.random() < 0.5
    text = f"{name} takes {x}, multiplies it by {a} and {'adds' if plus else 'subtracts'} {b}."
    plain = f"{name} of {x} is {x} times {a} {'plus' if plus else 'minus'} {b}"
    other = f"{x} to {x} * {a} {'+' if plus else '-'} {b}, called {name}"
    expert = f"def {name}({x}): return {x} * {a} {'+' if plus else '-'} {b}"
    return Example(
        "code",
        (name, x, a, b, plus),
        "the function",
        "Write the function.",
        "Description",
        text,
        (plain, other, expert),
    )


def ordering(rng: random.Random) -> Part:
    """Return two comparisons and a question, the answer's forms, and the values that make them."""
    a, b, c = rng.sample(w.NAMES, 3)
    more, most, least = rng.choice(w.COMPARISONS)
    clauses = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
    rng.shuffle(clauses)
    winner, superlative = (a, most) if (top := rng.random() < 0.5) else (c, least)
    text = f"{' '.join(clauses)} Who is the {superlative}?"
    forms = f"it must be {winner}", f"{winner}, as far as one sees", f"{winner} is the {superlative}."
    return text, forms, (a, b, c, more, top)


def reasoning(rng: random.Random) -> Example:
    """Who is the oldest of three; expert form: a sentence."""
    text, forms, values = ordering(rng)
    return Example("reasoning", values, "the riddle", "Answer the riddle.", "Riddle", text, forms)


def chat(rng: random.Random) -> Example:
    """A message by somebody; expert form: a friendly reply."""
    name, city, hobby = rng.choice(w.NAMES), rng.choice(w.CITIES), rng.choice(w.HOBBIES)
    text = rng.choice(
        (
            f"Hello, I am {name} from {city} and I like {hobby}.",
            f"Hello, I am {name}, I like {hobby} and live in {city}.",
        )
    )
    forms = (
        f"a message from {name} about {hobby}",
        f"{name} of {city} wrote, on {hobby}",
        f"Hi {name}! How is {hobby} in {city}?",
    )
    return Example("chat", (name, city, hobby), "the reply", "Reply to the message.", "Message", text, forms)


def tool_forms(tool: str, arguments: dict[str, str]) -> Forms:
    """Expert: a JSON call with every argument a string."""
    plain = ", ".join(f"{key} {value}" for key, value in arguments.items())
    other = " and ".join(f"{value} as {key}" for key, value in arguments.items())
    expert = ", ".join(f'"{key}": "{value}"' for key, value in {"tool": tool, **arguments}.items())
    return f"use {tool}: {plain}", f"start the {tool} with {other}", f"{{{expert}}}"


def tool_request(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    """Return a request, the tool that serves it and the tool's arguments."""
    name, city, day = rng.choice(w.NAMES), rng.choice(w.CITIES), rng.choice(w.DAYS)
    room, style = rng.choice(w.ROOMS), rng.choice(w.STYLES)
    n = str(rng.randint(2, 48))
    return rng.choice(
        (
            (f"Set a timer for {n} minutes for {name}.", "timer", {"minutes": n, "for": name}),
            (f"Show the weather in {city} on {day}.", "weather", {"city": city, "day": day}),
            (f"Play {style} in the {room} for {name}.", "music", {"style": style, "room": room, "for": name}),
            (f"Book {n} seats to {city} on {day}.", "booking", {"seats": n, "city": city, "day": day}),
        )
    )


def tool(rng: random.Random) -> Example:
    """A request to an assistant; expert form: a JSON tool call."""
    text, name, arguments = tool_request(rng)
    values = (name, *arguments.values())
    forms = tool_forms(name, arguments)
    return Example("tool", values, "the command", "Call the tool.", "Request", text, forms)


SENTIMENTS = {
    "positive": ("good words", "all happy"),
    "negative": ("bad words", "all unhappy"),
    "mixed": ("both kinds", "half happy"),
    "neutral": ("no feeling", "rather dull"),
}


def review(rng: random.Random) -> Part:
    """Return a review, its sentiment's forms, and the values that make it."""
    label = rng.choice(tuple(SENTIMENTS))
    kinds = {"positive": (w.GOOD, w.GOOD), "negative": (w.BAD, w.BAD), "neutral": (w.FLAT, w.FLAT)}.get(label)
    first, second = kinds or rng.choice(((w.GOOD, w.BAD), (w.BAD, w.GOOD)))
    one, two = rng.sample(w.REVIEWED, 2)
    x, y = rng.choice(first), rng.choice(second)
    text = f"the {one} was {x} and the {two} was {y}."
    return text, (*SENTIMENTS[label], label), (one, x, two, y)


def sentiment(rng: random.Random) -> Example:
    """What a review feels; expert form: one of four labels, as multiple choice."""
    name, day = rng.choice(w.NAMES), rng.choice(w.DAYS)
    text, forms, values = review(rng)
    return Example(
        "sentiment",
        (name, day, *values),
        "the feeling",
        "Name the feeling.",
        "Review",
        f"{name} said on {day}: {text}",
        forms,
        tuple(SENTIMENTS),
    )


def news(rng: random.Random) -> Part:
    """Return a line of news, its topic's forms, and the values that make it."""
    topic = rng.choice(tuple(w.TOPICS))
    known, actors, deeds = w.TOPICS[topic]
    actor, deed = rng.choice(actors), rng.choice(deeds)
    city, day = rng.choice(w.CITIES), rng.choice(w.DAYS)
    return f"The {actor} {deed} in {city} on {day}.", (*known, topic), (actor, deed, city, day)


def topic(rng: random.Random) -> Example:
    """What a line of news is about; expert form: one of six labels, as multiple choice."""
    text, forms, values = news(rng)
    return Example("topic", values, "the subject", "Name the subject.", "News", text, forms, tuple(w.TOPICS))


def entities(rng: random.Random) -> Example:
    """Who met whom, where and when; expert form: labelled fields."""
    first, last, other = rng.choice(w.NAMES), rng.choice(w.SURNAMES), rng.choice(w.NAMES)
    city, day = rng.choice(w.CITIES), rng.choice(w.DAYS)
    text = rng.choice(
        (
            f"{first} {last} met {other} in {city} on {day}.",
            f"On {day} {first} {last} saw {other} in {city}.",
            f"In {city} {first} {last} called {other} on {day}.",
        )
    )
    forms = (
        f"{first} {last}, {city}, {day}",
        f"{first} {last} was in {city}, a {day}",
        f"person: {first} {last}; place: {city}; day: {day}",
    )
    return Example(
        "entities",
        (first, last, other, city, day),
        "the facts",
        "List the facts.",
        "Sentence",
        text,
        forms,
    )


def place_data(rng: random.Random) -> Part:
    """Return a place as data, its forms as text, and the values that make it."""
    name = f"{rng.choice(w.COLOURS)} {rng.choice(w.PLACES)}"
    food, area, price = rng.choice(w.FOODS), rng.choice(w.AREAS), rng.choice(w.PRICES)
    text = f"name = {name}, food = {food}, area = {area}, price = {price}"
    forms = (
        f"{food} place {name}, {area}, {price}",
        f"go {area} for {food} at {name}, paying a {price} sum",
        f"{name} in the {area} serves {food} food at a {price} price.",
    )
    return text, forms, (name, food, area, price)


def data_to_text(rng: random.Random) -> Example:
    """A place as data; expert form: one sentence."""
    text, forms, values = place_data(rng)
    return Example("data_to_text", values, "the sentence", "Write the data as text.", "Data", text, forms)


def query_forms(wanted: str, table: str, known: str, value: str) -> Forms:
    """Expert: SQL."""
    return (
        f"look up {wanted} in {table} with {known} {value}",
        f"{table}: if {known} is {value}, say its {wanted}",
        f"SELECT {wanted} FROM {table} WHERE {known} = '{value}'",
    )


def lookup(rng: random.Random) -> Part:
    """Return a question to a table, its query's forms, and the values that make it."""
    table = rng.choice(tuple(w.TABLES))
    wanted, known = rng.sample(tuple(w.TABLES[table]), 2)
    value = rng.choice(w.TABLES[table][known])
    text = f"Which {wanted} in {table} has the {known} {value}?"
    return text, query_forms(wanted, table, known, value), (table, wanted, known, value)


def sql(rng: random.Random) -> Example:
    """A question to a table, asked by somebody; expert form: SQL."""
    name, day = rng.choice(w.NAMES), rng.choice(w.DAYS)
    text, forms, values = lookup(rng)
    return Example(
        "sql",
        (name, day, *values),
        "the query",
        "Write the query.",
        "Question",
        f"{name} asks on {day}: {text}",
        forms,
    )


HELD_IN: dict[str, Generator] = {
    "maths": maths,
    "code": code,
    "reasoning": reasoning,
    "chat": chat,
    "tool": tool,
    "sentiment": sentiment,
    "topic": topic,
    "entities": entities,
    "data_to_text": data_to_text,
    "sql": sql,
}
