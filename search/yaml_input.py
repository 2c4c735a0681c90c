"""Read a YAML mapping from a file and lay "section.key=value" overrides over it.

Knows YAML and dotted keys, not what any key means.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from search.errors import InputError


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key that appears twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} appears twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_SHORT_FORMS = {"base": "source", "space": "groups"}
"""Sections that may be a string, and the key that it stands for."""


def read_mapping(path: Path, overrides: Sequence[str]) -> dict[Any, Any]:
    """Return the file's top-level mapping with the overrides applied; sections left empty are dropped.

    Raises:
        InputError: for a file that cannot be read, is not UTF-8, not YAML or no mapping, or a bad override.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read the config: {error.strerror or error}") from error
    document = _parse_yaml(text, str(path))
    if not isinstance(document, dict):
        raise InputError(
            f"{path}: found {_kind(document)}, expected keys, at least `base: PATH` and `adapters: PATH`"
        )
    for override in overrides:
        _apply_override(document, override)
    return {key: value for key, value in document.items() if value is not None}


def _kind(document: object) -> str:
    return "an empty file" if document is None else f"a {type(document).__name__}"


def _parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; the error names the line."""
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:  # a 13th month
        raise InputError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from error


def _apply_override(document: dict[Any, Any], override: str) -> None:
    """Set "key=value" or "section.key=value" in place, however deep; a short form keeps its value."""
    path, equals, text = override.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not all([*sections, key]):
        raise InputError(f"override {override!r}: expected section.key=value, such as search.seed=3")
    value = _parse_yaml(text, f"override {override!r}")
    settings = document
    for section in sections:
        inner = settings.get(section) or {}
        if isinstance(inner, str) and section in _SHORT_FORMS:
            inner = {_SHORT_FORMS[section]: inner}
        if not isinstance(inner, dict):
            raise InputError(
                f"override {override!r}: {section!r} is a {type(inner).__name__} here, expected "
                "section.key=value, such as search.seed=3; change it in the file"
            )
        settings[section] = {**inner}
        settings = settings[section]
    settings[key] = value
