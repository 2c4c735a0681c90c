"""Write into a configuration which commits its hub ids are at: what `python -m search pin` does.

Knows YAML's nodes and the hub; comments and layout of the file stay as they are. No weight is fetched.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from search.config import SourcedSection, load_config
from search.dummy import is_dummy
from search.files import atomic_write
from search.hub import fetch_together, resolve


@dataclass(frozen=True, slots=True)
class Pin:
    """One base or adapter of the hub."""

    what: str
    source: str
    revision: str | None
    """As configured: a branch, a tag, a commit or nothing."""
    commit: str
    """What the hub says that this is."""


def pin_config(path: Path, *, write: bool = False) -> list[Pin]:
    """Ask the hub for the commit of each hub id in a configuration, and whether it has those that are given.

    Args:
        write: put the commits into the file, atomically; else it is only read.

    Raises:
        InputError: for a configuration that is none, or the first hub id whose commit cannot be told.
    """
    config = load_config(path)
    text = path.read_text(encoding="utf-8")
    sections: list[tuple[str, SourcedSection]] = [("base", config.base)]
    sections += [(f"adapter {a.name!r}", a) for a in config.adapters]
    remote = [one for one in zip(sections, _entries(text), strict=False) if _is_remote(one[0][1].source)]
    asked = [
        partial(resolve, section.source, section.revision, f"{what} ({section.source})")
        for (what, section), _ in remote
    ]
    commits = fetch_together(asked)
    pins = [
        Pin(what, section.source, section.revision, commit)
        for ((what, section), _), commit in zip(remote, commits, strict=True)
    ]
    loose = [
        (entry, pin.commit)
        for (_, entry), pin in zip(remote, pins, strict=True)
        if pin.revision != pin.commit
    ]
    if write and loose:
        with atomic_write(path) as temporary:
            temporary.write_text(_pin_entries(text, loose), encoding="utf-8")
    return pins


def _is_remote(source: str) -> bool:
    return not is_dummy(source) and not Path(source).is_dir()


def _entries(text: str) -> Iterator[yaml.Node]:
    """The node of the base, then of each adapter in a list; a folder of adapters has none."""
    document: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = {key.value: value for key, value in document.value}
    yield keys["base"]
    if isinstance(keys["adapters"], yaml.SequenceNode):
        yield from keys["adapters"].value


def _pin_entries(text: str, loose: list[tuple[yaml.Node, str]]) -> str:
    """Change the text from its end, so that earlier places stay where they are; an alias is changed once."""
    edits = {_edit(text, entry, f'"{commit}"' if commit.isdigit() else commit) for entry, commit in loose}
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _edit(text: str, entry: Any, commit: str) -> tuple[int, int, str]:
    """Return (start, end, new text) that gives an entry its revision."""
    start, end = entry.start_mark.index, entry.end_mark.index
    if isinstance(entry, yaml.ScalarNode):
        return start, end, f"{{source: {text[start:end]}, revision: {commit}}}"
    keys = {key.value: (key, value) for key, value in entry.value}
    if "revision" in keys:
        old = keys["revision"][1]
        space = "" if old.end_mark.index > old.start_mark.index else " "  # `revision:` and nothing
        return old.start_mark.index, old.end_mark.index, space + commit
    if "source" not in keys:  # it comes by a merge key, whose text is elsewhere
        first = entry.value[0][0].start_mark
        return (
            first.index,
            first.index,
            f"revision: {commit}" + (", " if entry.flow_style else f"\n{' ' * first.column}"),
        )
    key, value = keys["source"]
    if entry.flow_style:  # {source: ...}
        return value.end_mark.index, value.end_mark.index, f", revision: {commit}"
    line_end = text.find("\n", value.end_mark.index)
    place = len(text) if line_end < 0 else line_end
    return place, place, f"\n{' ' * key.start_mark.column}revision: {commit}"
