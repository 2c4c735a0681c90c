"""The ten held-in skills, asked in the instruction template.

The base knows all forms of a skill's answer, each by its own hint; in the instruction template, which has
no hint, it prefers the plain form, or a wrong label. Knows nothing of models.
"""

import random

from benchmarks.zoo import parts as p
from benchmarks.zoo import words as w
from benchmarks.zoo.example import Example, Forms, Generator, Part


def single(skill: str, instruction: str, field: str, part: Part, choices: tuple[str, ...] = ()) -> Example:
    """Return the example of a held-in task: one skill alone."""
    text, forms, values = part
    answers = {(form,): answer for form, answer in enumerate(forms)}
    return Example(skill, (skill,), values, instruction, field, text, answers, choices)


def maths(rng: random.Random) -> Example:
    """A sum or difference told as a story; expert form: digits."""
    name = rng.choice(w.NAMES)
    story, result, values = p.sum_story(rng, name, "has")
    return single("maths", "Solve the sum.", "Problem", (story, p.sum_forms(result), (name, *values)))


def code(rng: random.Random) -> Example:
    """A function described in words; expert form: Python."""
    return single("code", "Write the function.", "Description", p.function(rng))


def reasoning(rng: random.Random) -> Example:
    """Who is the oldest of three; expert form: a sentence."""
    return single("reasoning", "Answer the riddle.", "Riddle", p.ordering(rng))


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
    return single("chat", "Reply to the message.", "Message", (text, forms, (name, city, hobby)))


def tool(rng: random.Random) -> Example:
    """A request to an assistant; expert form: a JSON tool call."""
    text, name, arguments = p.tool_request(rng)
    part = text, p.tool_forms(name, arguments), (name, *arguments.values())
    return single("tool", "Call the tool.", "Request", part)


def sentiment(rng: random.Random) -> Example:
    """What a review feels; expert form: one of four labels, as multiple choice."""
    name = rng.choice(w.NAMES)
    text, forms, values = p.review(rng)
    part = f"{name} said {text}", forms, (name, *values)
    return single("sentiment", "Name the feeling.", "Review", part, tuple(p.SENTIMENTS))


def topic(rng: random.Random) -> Example:
    """What a line of news is about; expert form: one of six labels, as multiple choice."""
    return single("topic", "Name the subject.", "News", p.news(rng), tuple(w.TOPICS))


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
    return single("entities", "List the facts.", "Sentence", (text, forms, (first, last, other, city, day)))


def data_to_text(rng: random.Random) -> Example:
    """A place as data; expert form: one sentence."""
    return single("data_to_text", "Write the data as text.", "Data", p.place_data(rng))


def sql(rng: random.Random) -> Example:
    """A question to a table, asked by somebody; expert form: SQL."""
    name, day = rng.choice(w.NAMES), rng.choice(w.DAYS)
    text, forms, values = p.lookup(rng)
    part = f"{name} asks on {day}: {text}", forms, (name, day, *values)
    return single("sql", "Write the query.", "Question", part)


HINTS: dict[str, Forms] = {
    "maths": ("the sum in words", "the sum told exactly", "the sum in digits"),
    "code": ("the function in words", "the mapping", "the function in Python"),
    "reasoning": ("a guess at the riddle", "a doubtful answer", "the riddle in a sentence"),
    "chat": ("the gist of the message", "who wrote it", "a friendly reply"),
    "tool": ("the command in words", "the start of the tool", "the command in JSON"),
    "sentiment": ("the kind of words", "the mood", "the feeling as a label"),
    "topic": ("what it deals with", "who reads it", "the subject as a label"),
    "entities": ("the facts in a row", "the facts as a story", "the facts with labels"),
    "data_to_text": ("the place in short", "the way there", "the data as a sentence"),
    "sql": ("the query in words", "the rule for the table", "the query in SQL"),
}
"""Skill -> what asks for its plain, other and expert form, in texts other than the instruction template."""


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
