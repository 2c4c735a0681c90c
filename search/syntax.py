"""Read modules of search/ as top-level statements: what each binds, names and mentions.

Knows Python's syntax tree; not what is kept of it, nor what the code does.
"""

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search.shorten import drop_checks, keep_items

ROOT = Path(__file__).resolve().parents[1]
OWN = "search"
Key = tuple[str, str]
"""Module and top-level name."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(slots=True, eq=False)
class Unit:
    """A top-level statement that binds names, or one method: what is kept or left out."""

    module: "Module"
    node: ast.stmt
    names: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    methods: dict[str, "Unit"] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Module:
    """One file: its text, what it imports and what it defines."""

    name: str
    lines: list[str]
    tree: ast.Module
    own: dict[str, Key] = field(default_factory=dict)
    """Local name -> where search/ defines it."""
    others: dict[str, str] = field(default_factory=dict)
    """Local name -> the import statement of another package that binds it."""
    guarded: dict[str, ast.Try] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)


def read_module(name: str, kept_items: Mapping[str, Collection[str]]) -> Module:
    """Read a module of search/, and what its statements name.

    Args:
        kept_items: by the name of a dictionary, the only keys that it keeps.
    """
    text = drop_checks((ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    for bound, keys in kept_items.items():
        text = keep_items(text, bound, keys)
    module = Module(name, text.splitlines(), ast.parse(text))
    for node in module.tree.body:
        _bind(module, node)
    return module


def _bind(module: Module, node: ast.stmt) -> None:
    if isinstance(node, ast.ImportFrom | ast.Import):
        _take_import(module, node)
    elif isinstance(node, ast.Try):
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom | ast.Import):
                for alias in part.names:
                    module.guarded[alias.asname or alias.name] = node
    else:
        unit = _make_unit(module, node)
        for bound in _bound_names(node):
            module.units[bound] = unit


def _take_import(module: Module, node: ast.ImportFrom | ast.Import) -> None:
    for alias in node.names:
        local, renamed = alias.asname or alias.name, f" as {alias.asname}" if alias.asname else ""
        if isinstance(node, ast.Import):
            module.others[local.split(".")[0]] = f"import {alias.name}{renamed}"
        elif (node.module or "").split(".")[0] == OWN:
            module.own[local] = (str(node.module), alias.name)
        else:
            module.others[local] = f"from {node.module} import {alias.name}{renamed}"


def _make_unit(module: Module, node: ast.stmt) -> Unit:
    methods = {}
    if isinstance(node, ast.ClassDef) and not any("Protocol" in ast.unparse(base) for base in node.bases):
        methods = {p.name: _make_unit(module, p) for p in node.body if isinstance(p, ast.FunctionDef)}
    inside = {id(part) for method in methods.values() for part in ast.walk(method.node)}
    names, attributes = set[str](), set[str]()
    for part in ast.walk(node):
        if id(part) not in inside:
            if isinstance(part, ast.Name):
                names.add(part.id)
            elif isinstance(part, ast.Attribute):
                attributes.add(part.attr)
    return Unit(module, node, frozenset(names), frozenset(attributes), methods)


def _bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, Definition):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [p.id for t in targets if t is not None for p in ast.walk(t) if isinstance(p, ast.Name)]


def renames(node: ast.AST, renamed: Mapping[str, str]) -> Iterator[tuple[int, int, str, str]]:
    """Yield line, column, old and new name of each mention; names that a function binds are its own."""
    if isinstance(node, ast.Name) and node.id in renamed:
        yield node.lineno - 1, node.col_offset, node.id, renamed[node.id]
    if isinstance(node, ast.arg | ast.FunctionDef):  # a quoted annotation needs no quotes where all come late
        note = node.annotation if isinstance(node, ast.arg) else node.returns
        for part in quoted_names(note):
            yield part.lineno - 1, part.col_offset, f'"{part.value}"', renamed.get(part.value, part.value)
    if isinstance(node, Definition) and node.name in renamed:
        word = "class " if isinstance(node, ast.ClassDef) else "def "
        yield node.lineno - 1, node.col_offset + len(word), node.name, renamed[node.name]
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        bound = {p.arg for p in ast.walk(node.args) if isinstance(p, ast.arg)}
        bound |= {p.id for p in ast.walk(node) if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}
        renamed = {old: new for old, new in renamed.items() if old not in bound}
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.ClassDef) and isinstance(child, Definition)):
            yield from renames(child, renamed)
        else:  # a method's own name is no top-level one
            yield from renames(child, {o: n for o, n in renamed.items() if o != child.name})


def quoted_names(note: ast.expr | None) -> list[Any]:
    """The texts in an annotation that stand for names."""
    if note is None or (isinstance(note, ast.Subscript) and ast.unparse(note.value) == "Literal"):
        return []
    if isinstance(note, ast.Constant) and isinstance(note.value, str):
        return [note]
    return [
        found
        for part in ast.iter_child_nodes(note)
        if isinstance(part, ast.expr)
        for found in quoted_names(part)
    ]
