"""Held-out tasks: each needs two skills at once, and no expert is trained on one.

The base meets them in its pretraining, in other templates and with the forms of the two parts mixed at random.
"""

import random
from collections.abc import Callable

from benchmarks.zoo import tasks as t
from benchmarks.zoo import words as w


def _mix(join: Callable[[str, str], str], one: t.Forms, two: t.Forms) -> tuple[str, ...]:
    """Join two answers: every pair of forms that the base knows, then the expert form of both."""
    return (*(join(a, b) for a in one[:-1] for b in two[:-1]), join(one[-1], two[-1]))


def _nest(outer: Callable[[str], t.Forms], inner: t.Forms) -> tuple[str, ...]:
    """Put one answer inside another: every pair of forms that the base knows, then the expert form of both."""
    known = (form for value in inner[:-1] for form in outer(value)[:-1])
    return (*known, outer(inner[-1])[-1])


def _greeting(name: str) -> t.Forms:
    return f"a message from {name}:", f"{name} wrote:", f"Hi {name}!"


def _chat(rng: random.Random, task: str, hint: str, then: str, part: t.Part) -> t.Example:
    """A message that asks for something: greet its author, then do it."""
    name = rng.choice(w.NAMES)
    text, forms, values = part
    return t.Example(
        task,
        (name, *values),
        f"the reply and {hint}",
        f"Reply to the message and {then}.",
        "Message",
        f"Hello, I am {name}. {text[0].upper()}{text[1:]}",
        _mix("{} {}".format, _greeting(name), forms),
    )


def chat_maths(rng: random.Random) -> t.Example:
    """A sum asked in a message."""
    story, result, values = t.sum_story(rng, "I", "have")
    return _chat(rng, "chat_maths", "the sum", "solve the sum", (story, t.sum_forms(result), values))


def chat_sentiment(rng: random.Random) -> t.Example:
    """A review sent as a message."""
    return _chat(rng, "chat_sentiment", "the feeling", "name the feeling", t.review(rng))


def chat_reasoning(rng: random.Random) -> t.Example:
    """A riddle asked in a message."""
    return _chat(rng, "chat_reasoning", "the riddle", "answer the riddle", t.ordering(rng))


def chat_tool(rng: random.Random) -> t.Example:
    """A request sent as a message."""
    text, tool, arguments = t.tool_request(rng)
    part = text, t.tool_forms(tool, arguments), (tool, *arguments.values())
    return _chat(rng, "chat_tool", "the command", "call the tool", part)


def chat_sql(rng: random.Random) -> t.Example:
    """A question to a table, sent as a message."""
    return _chat(rng, "chat_sql", "the query", "write the query", t.lookup(rng))


def tool_maths(rng: random.Random) -> t.Example:
    """A tool call whose argument must be computed."""
    name, (a, b) = rng.choice(w.NAMES), (rng.randint(2, 29), rng.randint(2, 19))
    key, unit = rng.choice((("timer", "minutes"), ("booking", "seats"), ("order", "cups")))
    return t.Example(
        "tool_maths",
        (name, a, b, key),
        "the command and the sum",
        "Solve the sum and call the tool.",
        "Request",
        f"Use the {key} with {a} plus {b} {unit} for {name}.",
        _nest(lambda number: t.tool_forms(key, {unit: number, "for": name}), t.sum_forms(a + b)),
    )


def tool_sql(rng: random.Random) -> t.Example:
    """A tool call that carries a query."""
    text, forms, values = t.lookup(rng)
    name = rng.choice(w.NAMES)
    return t.Example(
        "tool_sql",
        (name, *values),
        "the command and the query",
        "Write the query and call the tool.",
        "Request",
        f"Use the database for {name}. {text}",
        _nest(lambda query: t.tool_forms("database", {"query": query, "for": name}), forms),
    )


def sql_maths(rng: random.Random) -> t.Example:
    """A query whose value must be computed."""
    table = rng.choice(tuple(w.TABLES))
    wanted, key = rng.choice(tuple(w.TABLES[table])), rng.choice(("age", "size", "count"))
    a, b = rng.randint(2, 29), rng.randint(2, 19)
    return t.Example(
        "sql_maths",
        (table, wanted, key, a, b),
        "the query and the sum",
        "Solve the sum and write the query.",
        "Question",
        f"Which {wanted} in {table} has the {key} {a} plus {b}?",
        _nest(lambda number: t.query_forms(wanted, table, key, number), t.sum_forms(a + b)),
    )


def data_sentiment(rng: random.Random) -> t.Example:
    """A place as data with a review of it."""
    data, data_forms, data_values = t.place_data(rng)
    text, review_forms, values = t.review(rng)
    return t.Example(
        "data_sentiment",
        (*data_values, *values),
        "the sentence and the feeling",
        "Write the data as text and name the feeling.",
        "Data",
        f"{data}, review = {text}",
        _mix("{} {}".format, data_forms, review_forms),
    )


def reasoning_maths(rng: random.Random) -> t.Example:
    """A riddle, then a sum about its answer."""
    riddle, riddle_forms, values = t.ordering(rng)
    story, result, sum_values = t.sum_story(rng, "That one", "has")
    return t.Example(
        "reasoning_maths",
        (*values, *sum_values),
        "the riddle and the sum",
        "Answer the riddle and solve the sum.",
        "Riddle",
        f"{riddle} {story}",
        _mix("{} {}".format, riddle_forms, t.sum_forms(result)),
    )


def topic_sentiment(rng: random.Random) -> t.Example:
    """A line of news and what was said of it: both labels, as multiple choice among four pairs."""
    line, topic_forms, topic_values = t.news(rng)
    text, review_forms, values = t.review(rng)
    topic, label = topic_forms[-1], review_forms[-1]
    other_topic = rng.choice([name for name in w.TOPICS if name != topic])
    other_label = rng.choice([name for name in t.SENTIMENTS if name != label])
    choices = [f"{x}, {y}" for x in (topic, other_topic) for y in (label, other_label)]
    rng.shuffle(choices)
    return t.Example(
        "topic_sentiment",
        (*topic_values, *values),
        "the subject and the feeling",
        "Name the subject and the feeling.",
        "News",
        f"{line} They said {text}",
        _mix("{}, {}".format, topic_forms, review_forms),
        tuple(choices),
    )


def code_maths(rng: random.Random) -> t.Example:
    """A function described in words, and a sum to comment it with."""
    function = t.code(rng)
    a, b = rng.randint(2, 29), rng.randint(2, 19)
    return t.Example(
        "code_maths",
        (*function.values, a, b),
        "the function and the sum",
        "Write the function and solve the sum.",
        "Description",
        f"{function.text} Then solve {a} plus {b}.",
        _mix(
            "{} gives {}".format,
            (function.forms[0], function.forms[1], function.answer),
            t.sum_forms(a + b),
        ),
    )


HELD_OUT: dict[str, t.Generator] = {
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
