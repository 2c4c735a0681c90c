"""What a verification says of one thing, in a line.

Knows words and numbers; not what is verified.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mark = Literal["ok", "differs", "note"]
SHOWN = 3
"""Differences that a line shows."""
MOST_SHOWN = 80
"""Characters of a value that a line shows."""
_PLAIN = re.compile(r"[\w./:+, -]{1,80}")
_HASH = re.compile(r"[0-9a-f]{40,64}(-dirty)?")


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, how it is, and what there is to say."""

    name: str
    mark: Mark
    text: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.mark}{': ' if self.text else ''}{self.text}"


def tell_differences(name: str, differences: Iterable[str], fine: str = "") -> Check:
    """Return a check that is ok, saying `fine`, where there are no differences, else shows the first few."""
    found = list(differences)
    if not found:
        return Check(name, "ok", fine)
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return Check(name, "differs", "; ".join(found[:SHOWN]) + more)


def compare(what: str, recorded: Any, found: Any) -> list[str]:
    """Say in words how two values differ; nothing where they are equal."""
    if recorded == found:
        return []
    prefix = f"{what} " if what else ""
    return [f"{prefix}recorded {show(recorded)}, found {show(found)}"]


def compare_all(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Compare two mappings key by key; a key that one lacks counts as None there."""
    keys = sorted(recorded.keys() | found.keys())
    return [text for key in keys for text in compare(key, recorded.get(key), found.get(key))]


def show(value: Any) -> str:
    """Write a value as a line has room for it: hashes by their beginning, odd text in quotes."""
    if value is None:
        return "none"
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:12] + "-dirty" * value.endswith("-dirty")
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    text = json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."
