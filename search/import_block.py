"""One import block of many modules' imports, sorted as a linter sorts them.

Knows import statements and the standard library's names; not what is imported.
"""

import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable

from search.errors import InputError
from search.shorten import BUNDLE_WIDTH

NEWER = {"Self"}
"""Names of `typing` that Python 3.10 lacks: only annotations have them, which are not evaluated."""

REFUSING = """try:
{}
except ImportError as error:
    raise SystemExit(f"error: MyMerge.py needs {{error.name or error}}: install it") from error"""
"""Around imports that nothing goes without."""


def join_imports(lines: Iterable[str], tried: Iterable[str], kit_import: str) -> str:
    """Return the block: standard library, other packages, the kit's, what may be missing."""
    modules, members = set[str](), defaultdict[str, set[str]](set)
    bound: dict[str, str] = {}
    for line in {*lines, "import logging", "from pathlib import Path"}:
        name = line.rsplit(" ", 1)[-1]
        if bound.setdefault(name, line) != line:
            raise InputError(f"{line!r} and {bound[name]!r} bind one name; rename one in search/")
        if found := re.fullmatch(r"from (\S+) import (.+)", line):
            members[found[1]].add(found[2])
        else:
            modules.add(line)
    late = members["typing"] & NEWER
    members["typing"] -= NEWER
    if late:
        members["typing"].add("TYPE_CHECKING")
    needed = "\n\n".join([_write(modules, members, is_standard=False), kit_import])
    blocks = [_write(modules, members, is_standard=True), REFUSING.format(textwrap.indent(needed, " " * 4))]
    blocks += sorted(set(tried))
    if late:
        blocks.append(f"if TYPE_CHECKING:\n    from typing import {', '.join(sorted(late))}")
    return "\n\n".join(blocks)


def _write(modules: Iterable[str], members: dict[str, set[str]], *, is_standard: bool) -> str:
    def belongs(module: str) -> bool:
        return (module.split(".")[0] in sys.stdlib_module_names) == is_standard

    rows = sorted(line for line in modules if belongs(line.split(" ")[1]))
    for module in sorted(name for name, found in members.items() if found and belongs(name)):
        names = sorted(members[module], key=_by_case)
        row = f"from {module} import {', '.join(names)}"
        if len(row) > BUNDLE_WIDTH:
            row = f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
        rows.append(row)
    return "\n".join(rows)


def _by_case(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name
