"""Held-out tasks: each needs two skills at once, and no expert is trained on one.

The base meets them in its pretraining, with the forms of the two parts chosen independently of each other.
"""

import random
from collections.abc import Callable
from itertools import product

from benchmarks.zoo import parts as p
from benchmarks.zoo import words as w
from benchmarks.zoo.example import EXPERT, WRONG, Example, Forms, Generator, Part

Answers = dict[tuple[int, ...], str]


def _mix(join: Callable[[str, str], str], one: Forms, two: Forms) -> Answers:
    """Join two answers in every pair of forms."""
    return {(i, j): join(one[i], two[j]) for i, j in product(range(len(one)), range(len(two)))}


def _nest(outer: Callable[[str], Forms], inner: Forms) -> Answers:
    """Put one answer inside another, in every pair of forms."""
    return {(i, j): form for j, value in enumerate(inner) for i, form in enumerate(outer(value))}


def _greeting(name: str) -> Forms:
    return f"a message from {name}:", f"{name} wrote:", f"Hi {name}!"


def _chat(rng: random.Random, skill: str, then: str, part: Part) -> Example:
    """A message that asks for something: greet its author, then do it."""
    name = rng.choice(w.NAMES)
    text, forms, values = part
    return Example(
        f"chat_{skill}",
        ("chat", skill),
        (name, *values),
        f"Reply to the message and {then}.",
        "Message",
        f"Hello, I am {name}. {text[0].upper()}{text[1:]}",
        _mix("{} {}".format, _greeting(name), forms),
    )


def chat_maths(rng: random.Random) -> Example:
    """A sum asked in a message."""
    story, result, values = p.sum_story(rng, "I", "have")
    return _chat(rng, "maths", "solve the sum", (story, p.sum_forms(result), values))


def chat_sentiment(rng: random.Random) -> Example:
    """A review sent as a message."""
    return _chat(rng, "sentiment", "name the feeling", p.review(rng))


def chat_reasoning(rng: random.Random) -> Example:
    """A riddle asked in a message."""
    return _chat(rng, "reasoning", "answer the riddle", p.ordering(rng))


def chat_tool(rng: random.Random) -> Example:
    """A request sent as a message."""
    text, tool, arguments = p.tool_request(rng)
    part = text, p.tool_forms(tool, arguments), (tool, *arguments.values())
    return _chat(rng, "tool", "call the tool", part)


def chat_sql(rng: random.Random) -> Example:
    """A question to a table, sent as a message."""
    return _chat(rng, "sql", "write the query", p.lookup(rng))


def tool_maths(rng: random.Random) -> Example:
    """A tool call whose argument must be computed."""
    name, (a, b) = rng.choice(w.NAMES), (rng.randint(2, 29), rng.randint(2, 19))
    key, unit = rng.choice((("timer", "minutes"), ("booking", "seats"), ("order", "cups")))
    return Example(
        "tool_maths",
        ("tool", "maths"),
        (name, a, b, key),
        "Solve the sum and call the tool.",
        "Request",
        f"Use the {key} with {a} plus {b} {unit} for {name}.",
        _nest(lambda number: p.tool_forms(key, {unit: number, "for": name}), p.sum_forms(a + b)),
    )


def tool_sql(rng: random.Random) -> Example:
    """A tool call that carries a query."""
    text, forms, values = p.lookup(rng)
    name = rng.choice(w.NAMES)
    return Example(
        "tool_sql",
        ("tool", "sql"),
        (name, *values),
        "Write the query and call the tool.",
        "Request",
        f"Use the database for {name}. {text}",
        _nest(lambda query: p.tool_forms("database", {"query": query, "for": name}), forms),
    )


def sql_maths(rng: random.Random) -> Example:
    """A query whose value must be computed."""
    table = rng.choice(tuple(w.TABLES))
    wanted, key = rng.choice(tuple(w.TABLES[table])), rng.choice(("age", "size", "count"))
    a, b = rng.randint(2, 29), rng.randint(2, 19)
    return Example(
        "sql_maths",
        ("sql", "maths"),
        (table, wanted, key, a, b),
        "Solve the sum and write the query.",
        "Question",
        f"Which {wanted} in {table} has the {key} {a} plus {b}?",
        _nest(lambda number: p.query_forms(wanted, table, key, number), p.sum_forms(a + b)),
    )


def data_sentiment(rng: random.Random) -> Example:
    """A place as data with a review of it."""
    data, data_forms, data_values = p.place_data(rng)
    text, review_forms, values = p.review(rng)
    return Example(
        "data_sentiment",
        ("data_to_text", "sentiment"),
        (*data_values, *values),
        "Write the data as text and name the feeling.",
        "Data",
        f"{data}, review = {text}",
        _mix("{} {}".format, data_forms, review_forms),
    )


def reasoning_maths(rng: random.Random) -> Example:
    """A riddle, then a sum about its answer."""
    riddle, riddle_forms, values = p.ordering(rng)
    story, result, sum_values = p.sum_story(rng, "That one", "has")
    return Example(
        "reasoning_maths",
        ("reasoning", "maths"),
        (*values, *sum_values),
        "Answer the riddle and solve the sum.",
        "Riddle",
        f"{riddle} {story}",
        _mix("{} {}".format, riddle_forms, p.sum_forms(result)),
    )


def topic_sentiment(rng: random.Random) -> Example:
    """A line of news and what was said of it: both labels, as multiple choice among four pairs."""
    line, topic_forms, topic_values = p.news(rng)
    text, review_forms, values = p.review(rng)
    answers = _mix("{}, {}".format, topic_forms, review_forms)
    choices = [answers[pair] for pair in product((EXPERT, WRONG), repeat=2)]
    rng.shuffle(choices)
    return Example(
        "topic_sentiment",
        ("topic", "sentiment"),
        (*topic_values, *values),
        "Name the subject and the feeling.",
        "News",
        f"{line} They said {text}",
        answers,
        tuple(choices),
    )


def code_maths(rng: random.Random) -> Example:
    """A function described in words, and a sum to comment it with."""
    text, forms, values = p.function(rng)
    a, b = rng.randint(2, 29), rng.randint(2, 19)
    return Example(
        "code_maths",
        ("code", "maths"),
        (*values, a, b),
        "Write the function and solve the sum.",
        "Description",
        f"{text} Then solve {a} plus {b}.",
        _mix("{} gives {}".format, forms, p.sum_forms(a + b)),
    )


HELD_OUT: dict[str, Generator] = {
    "chat_maths": chat_maths,
    "chat_sentiment": chat_sentiment,
    "chat_reasoning": chat_reasoning,
    "chat_tool": chat_tool,
    "chat_sql": chat_sql,
    "tool_maths": tool_maths,
    "tool_sql": tool_sql,
    "sql_maths": sql_maths,
    "data_sentiment": data_sentiment,
    "reasoning_maths": reasoning_maths,
    "topic_sentiment": topic_sentiment,
    "code_maths": code_maths,
}
