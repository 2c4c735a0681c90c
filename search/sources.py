"""Cut search/'s modules to what some names need, and join them in one namespace, comments and all.

Knows Python's syntax tree; not what the code does. A definition is kept if a kept one names it; a method, if
any kept code has an attribute of its name.
"""

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from search.errors import InputError
from search.syntax import OWN, Definition, Key, Module, Unit, read_module, renames


@dataclass(frozen=True, slots=True)
class Source:
    """What is kept of one module."""

    name: str
    headline: str
    text: str
    starts_with_definition: bool
    imports: tuple[str, ...]
    guarded: tuple[str, ...]

    @property
    def spaced(self) -> str:
        """The text with the blank lines that belong before it."""
        return ("\n\n" if self.starts_with_definition else "\n") + self.text


def cut_sources(
    entries: tuple[str, Sequence[str]], stand_ins: Mapping[Key, Key], left_out: Mapping[Key, set[str]]
) -> list[Source]:
    """Return what the entries (a module and names in it) need of each module, in an order that runs.

    Args:
        stand_ins: what is taken in place of what; ("", "") for what is defined elsewhere.
        left_out: methods of classes that go whatever names them.

    Raises:
        InputError: if two modules import different things under one name.
    """
    cut = _Cutting(stand_ins, left_out)
    cut.reach(entries)
    return cut.write()


class _Cutting:
    def __init__(self, stand_ins: Mapping[Key, Key], left_out: Mapping[Key, set[str]]) -> None:
        self._stand_ins, self._left_out = stand_ins, left_out
        self._modules: dict[str, Module] = {}
        self._kept: dict[Key, Unit] = {}
        self._kept_nodes: set[int] = set()
        self._imports: dict[str, set[str]] = defaultdict(set)
        self._attributes: set[str] = set()
        self._classes: list[tuple[Key, Unit]] = []

    def reach(self, entries: tuple[str, Sequence[str]]) -> None:
        """Keep what the entries need."""
        todo: list[Key] = [(entries[0], name) for name in entries[1]]
        while todo:
            while todo:
                todo += self._keep(*self._place(todo.pop()))
            for key, unit in list(self._classes):
                for name, method in unit.methods.items():
                    wanted = name in self._attributes or name.startswith("__")
                    gone = name in self._left_out.get(key, ())
                    if wanted and not gone and id(method.node) not in self._kept_nodes:
                        todo += self._use(method)

    def _place(self, key: Key) -> Key:
        return self._stand_ins.get(key, key)

    def _keep(self, module_name: str, name: str) -> list[Key]:
        if (module_name, name) in self._kept or not module_name.startswith(OWN + "."):
            return []
        unit = self._module(module_name).units[name]
        self._kept[module_name, name] = unit
        if isinstance(unit.node, ast.ClassDef):
            self._classes.append(((module_name, name), unit))
        return self._use(unit)

    def _use(self, unit: Unit) -> list[Key]:
        self._kept_nodes.add(id(unit.node))
        self._attributes |= unit.attributes
        module, found = unit.module, []
        for name in sorted(unit.names):
            key = self._place(self._origin(module, name))
            if key[0].startswith(OWN + ".") and key[1]:
                found.append(key)
            elif name in module.others:
                self._imports[module.name].add(module.others[name])
            elif name in module.guarded:
                self._imports[module.name].add(ast.unparse(module.guarded[name]))
        return found

    def _origin(self, module: Module, name: str) -> Key:
        if name in module.own:
            return module.own[name]
        return (module.name, name) if name in module.units else ("", "")

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            self._modules[name] = read_module(name)
        return self._modules[name]

    def write(self) -> list[Source]:
        """Join what is kept."""
        final = self._choose_names()
        order = list(self._in_order())
        return [self._write_module(self._modules[name], final) for name in order]

    def _in_order(self) -> Iterator[str]:
        """Modules after those that they import, by name where that leaves a choice."""
        kept, done = {module for module, _ in self._kept}, set[str]()

        def visit(name: str) -> Iterator[str]:
            if name in done:
                return
            done.add(name)
            for needed in sorted({module for module, _ in self._module(name).own.values()}):
                if needed != "search.stand_ins":
                    yield from visit(needed)
            if name in kept:
                yield name

        for name in sorted(kept - {"search.submission"}):
            yield from visit(name)
        yield from visit("search.submission")

    def _choose_names(self) -> dict[Key, str]:
        """Give every kept definition its own name: of equal ones all but the first get their module's."""
        final: dict[Key, str] = {}
        taken = set(dir(builtins))
        for module in self._in_order():
            for key in sorted(key for key in self._kept if key[0] == module):
                name = key[1]
                if name in taken:
                    name = f"{name}_{module.rsplit('.', 1)[-1]}"
                taken.add(name)
                final[key] = name
        return final

    def _write_module(self, module: Module, final: Mapping[Key, str]) -> Source:
        renamed = {}
        for name in [*module.own, *module.units]:
            key = self._place(self._origin(module, name))
            target = final.get(key, name)
            if target != name:
                renamed[name] = target
        pieces: list[tuple[bool, str]] = []
        for index, node in enumerate(module.tree.body):
            if id(node) in self._kept_nodes:
                text = self._text_of(module, node, index, renamed)
                pieces.append((isinstance(node, Definition), text))
        text = ""
        for place, (is_definition, piece) in enumerate(pieces):
            apart = is_definition or (place and pieces[place - 1][0])
            text += ("\n\n\n" if apart else "\n\n") * bool(place) + piece
        headline = (ast.get_docstring(module.tree) or "").splitlines()[0]
        imports = self._imports[module.name]
        plain = sorted(line for line in imports if not line.startswith("try"))
        tried = sorted(line for line in imports if line.startswith("try"))
        return Source(module.name, headline, text, pieces[0][0], tuple(plain), tuple(tried))

    def _text_of(self, module: Module, node: ast.stmt, index: int, renamed: Mapping[str, str]) -> str:
        lines = list(module.lines)
        for line, column, old, new in sorted(renames(node, renamed), reverse=True):
            row = lines[line]
            if row[column : column + len(old)] != old:
                raise InputError(f"{module.name}:{line + 1}: cannot rename {old!r} there")
            lines[line] = row[:column] + new + row[column + len(old) :]
        gone: set[int] = set()
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and id(part) not in self._kept_nodes:
                    begin, end = _span(part)
                    gone |= set(range(_with_comments(module.lines, begin), end))
        begin, end = _span(node)
        following = module.tree.body[index + 1 : index + 2]
        if not isinstance(node, Definition) and following and _is_text(following[0]):
            end = following[0].end_lineno or end
        begin = _with_comments(module.lines, begin)
        text = "\n".join(lines[row] for row in range(begin, end) if row not in gone)
        return re.sub(r"\n{3,}", "\n\n", text).rstrip()


def _span(node: ast.stmt) -> tuple[int, int]:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]) - 1, node.end_lineno or node.lineno


def _with_comments(lines: Sequence[str], begin: int) -> int:
    while begin and lines[begin - 1].lstrip().startswith("#"):
        begin -= 1
    return begin


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
