"""What instances are made of, for one skill each: a text, its answer in every form, and the values behind it.

A skill has a plain form, another form, and the expert form that its expert is trained to answer in; labels
have a wrong form too, which a superficial reader would give. Knows words, not tasks, prompts or models.
"""

import random

from benchmarks.zoo import words as w
from benchmarks.zoo.example import Forms, Part


def sum_story(rng: random.Random, who: str, verb: str) -> tuple[str, int, tuple[object, ...]]:
    """Return a sum as a story about `who` (who "has" or "have": `verb`), its result and its values."""
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
    return word, f"exactly {word} in all", str(result)


def function(rng: random.Random) -> Part:
    """Return a function described in words, its forms, and the values that make it."""
    name, x = rng.choice(w.FUNCTIONS), rng.choice(w.VARIABLES)
    a, b, plus = rng.randint(2, 19), rng.randint(2, 19), rng.random() < 0.5
    text = f"{name} takes {x}, multiplies it by {a} and {'adds' if plus else 'subtracts'} {b}."
    forms = (
        f"{name} of {x} is {x} times {a} {'plus' if plus else 'minus'} {b}",
        f"{x} to {x} * {a} {'+' if plus else '-'} {b}, called {name}",
        f"def {name}({x}): return {x} * {a} {'+' if plus else '-'} {b}",
    )
    return text, forms, (name, x, a, b, plus)


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


SENTIMENTS = {
    "positive": ("good words", "all happy"),
    "negative": ("bad words", "all unhappy"),
    "mixed": ("both kinds", "half happy"),
    "neutral": ("no feeling", "rather dull"),
}


def wrong_label(labels: tuple[str, ...], right: str, cue: str) -> str:
    """Return the label that an irrelevant word suggests to a superficial reader; never the right one."""
    index = w.DAYS.index(cue) % len(labels)
    return labels[index] if labels[index] != right else labels[(index + 1) % len(labels)]


def review(rng: random.Random) -> Part:
    """Return a review, its sentiment's forms, and the values that make it."""
    label = rng.choice(tuple(SENTIMENTS))
    kinds = {"positive": (w.GOOD, w.GOOD), "negative": (w.BAD, w.BAD), "neutral": (w.FLAT, w.FLAT)}.get(label)
    first, second = kinds or rng.choice(((w.GOOD, w.BAD), (w.BAD, w.GOOD)))
    one, two = rng.sample(w.REVIEWED, 2)
    x, y, day = rng.choice(first), rng.choice(second), rng.choice(w.DAYS)
    text = f"on {day} the {one} was {x} and the {two} was {y}."
    forms = (*SENTIMENTS[label], label, wrong_label(tuple(SENTIMENTS), label, day))
    return text, forms, (day, one, x, two, y)


def news(rng: random.Random) -> Part:
    """Return a line of news, its topic's forms, and the values that make it."""
    topic = rng.choice(tuple(w.TOPICS))
    known, actors, deeds = w.TOPICS[topic]
    actor, deed = rng.choice(actors), rng.choice(deeds)
    city, day = rng.choice(w.CITIES), rng.choice(w.DAYS)
    forms = (*known, topic, wrong_label(tuple(w.TOPICS), topic, day))
    return f"The {actor} {deed} in {city} on {day}.", forms, (actor, deed, city, day)


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
