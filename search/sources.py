"""Cut search/'s modules to what some names need, and join them in one namespace, comments and all.

Knows Python's syntax tree; not what the code does. A definition is kept if a kept one names it; a method, if
any kept code has an attribute of its name.
"""

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from search.errors import InputError
from search.shorten import is_text, join_rows, shorten_texts, span, with_comments
from search.syntax import OWN, Definition, Key, Module, Unit, read_module, renames

STAND_IN_MODULE = "search.stand_ins"
MOST_BREAKS = 2
"""Constants of more lines stand apart from others."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is kept of one module."""

    name: str
    headline: str
    text: str
    imports: tuple[str, ...]
    guarded: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """What a bundle does without."""

    stand_ins: Mapping[Key, Key]
    """What is taken in place of what; ("", "") for what is defined elsewhere. A class that derives from the
    one that it stands in for gives it its methods."""
    left_out: Mapping[Key, Collection[str]] = field(default_factory=dict)
    """Methods of classes that go whatever names them."""
    kept_items: Mapping[Key, Collection[str]] = field(default_factory=dict)
    """Keys that dictionaries keep."""


def cut_sources(entries: tuple[str, Sequence[str]], cuts: Cuts) -> list[Source]:
    """Return what the entries (a module and names in it) need of each module, in an order that runs.

    Raises:
        InputError: if two modules import different things under one name.
    """
    cut = _Cutting(cuts, entries[0])
    cut.reach(entries)
    return cut.write()


class _Cutting:
    def __init__(self, cuts: Cuts, entry: str) -> None:
        self._cuts, self._entry = cuts, entry
        self._modules: dict[str, Module] = {}
        self._kept: dict[Key, Unit] = {}
        self._kept_nodes: set[int] = set()
        self._imports: dict[str, set[str]] = defaultdict(set)
        self._attributes: set[str] = set()
        self._classes: list[tuple[Key, Unit]] = []
        self._methods: dict[int, Unit] = {}
        """By the node of the method in whose place it stands."""

    def reach(self, entries: tuple[str, Sequence[str]]) -> None:
        """Keep what the entries need."""
        todo: list[Key] = [(entries[0], name) for name in entries[1]]
        while todo:
            while todo:
                todo += self._keep(*self._place(todo.pop()))
            for key, unit in list(self._classes):
                for name, method in unit.methods.items():
                    wanted = name in self._attributes or name.startswith("__")
                    gone = name in self._cuts.left_out.get(key, ())
                    if wanted and not gone and id(method.node) not in self._kept_nodes:
                        self._kept_nodes.add(id(method.node))
                        todo += self._use(self._methods.get(id(method.node), method))

    def _place(self, key: Key) -> Key:
        taken = self._cuts.stand_ins.get(key, key)
        return key if taken != key and taken[1] and self._override(key, taken) else taken

    def _override(self, key: Key, by: Key) -> bool:
        """Take the methods of a class for those of the one that it derives from, if it does."""
        node = self._module(by[0]).units[by[1]].node
        if not isinstance(node, ast.ClassDef) or key[1] not in [ast.unparse(base) for base in node.bases]:
            return False
        own = self._module(key[0]).units[key[1]].methods
        for name, method in self._module(by[0]).units[by[1]].methods.items():
            self._methods[id(own[name].node)] = method
        return True

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
            kept = {key[1]: items for key, items in self._cuts.kept_items.items() if key[0] == name}
            self._modules[name] = read_module(name, kept)
        return self._modules[name]

    def write(self) -> list[Source]:
        """Join what is kept."""
        final = self._choose_names()
        writers = [_Writer(self, self._modules[name], final) for name in self._in_order()]
        return [writer.write(tuple(self._imports[writer.module.name])) for writer in writers]

    def _in_order(self) -> Iterator[str]:
        """Modules after those that they import, by name where that leaves a choice."""
        kept, done = {module for module, _ in self._kept}, set[str]()

        def visit(name: str) -> Iterator[str]:
            if name in done:
                return
            done.add(name)
            for needed in sorted({module for module, _ in self._module(name).own.values()}):
                if needed != STAND_IN_MODULE:
                    yield from visit(needed)
            if name in kept:
                yield name

        for name in sorted(kept - {self._entry}):
            yield from visit(name)
        yield from visit(self._entry)

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

    def is_kept(self, node: ast.stmt) -> bool:
        """Whether a statement or a method is kept."""
        return id(node) in self._kept_nodes

    def in_place_of(self, method: ast.stmt) -> Unit | None:
        """Return the method that stands in for one."""
        return self._methods.get(id(method))

    def renamed_in(self, module: Module, final: Mapping[Key, str]) -> dict[str, str]:
        """Return the names of a module that the bundle calls otherwise."""
        names = {name: final.get(self._place(self._origin(module, name)), name) for name in module.own}
        names |= {name: final.get(self._place((module.name, name)), name) for name in module.units}
        return {name: new for name, new in names.items() if name != new}


class _Writer:
    """Writes what is kept of one module."""

    def __init__(self, cutting: _Cutting, module: Module, final: Mapping[Key, str]) -> None:
        self._cutting, self.module, self._final = cutting, module, final

    def write(self, imports: Sequence[str]) -> Source:
        """Join the kept statements: two blank lines around definitions, none between plain constants."""
        body = self.module.tree.body
        text, last = "", None
        for index, node in enumerate(body):
            if self._cutting.is_kept(node):
                piece = self._text_of(self.module, body[index : index + 2])
                is_definition = isinstance(node, Definition)
                apart = 3 if is_definition or last == "definition" else 1
                if apart == 1 and max(piece.count("\n"), (last or "").count("\n")) > MOST_BREAKS:
                    apart = 2
                text += "\n" * apart * bool(text) + piece
                last = "definition" if is_definition else piece
        headline = (ast.get_docstring(self.module.tree) or "").splitlines()[0]
        plain = sorted(line for line in imports if not line.startswith("try"))
        tried = sorted(line for line in imports if line.startswith("try"))
        return Source(self.module.name, headline, text, tuple(plain), tuple(tried))

    def _text_of(self, module: Module, nodes: Sequence[ast.stmt]) -> str:
        """Return the text of the first statement; the second may be a note on it."""
        node = nodes[0]
        lines = self._renamed(module, node)
        noted = len(nodes) > 1 and not isinstance(node, Definition) and is_text(nodes[1])
        begin, end = span(node)
        begin, end = with_comments(lines, begin), span(nodes[1])[1] if noted else end
        edits = shorten_texts(nodes if noted else nodes[:1], lines)
        if isinstance(node, ast.ClassDef):
            for part in [p for p in node.body if isinstance(p, ast.FunctionDef)]:
                rows = span(part)
                other = self._cutting.in_place_of(part)
                if other or not self._cutting.is_kept(part):
                    edits |= {row: [] for row in range(with_comments(lines, rows[0]), rows[1])}
                if other and self._cutting.is_kept(part):
                    edits[rows[0]] = self._text_of(other.module, [other.node]).split("\n")
        written = [text for row in range(begin, end) for text in edits.get(row, [lines[row]])]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(written))
        text = re.sub(r"  # (type: ignore|noqa: PLR0913).*", "", text)
        return join_rows(re.sub(r"(def .*:)\n\n", r"\1\n", text).rstrip())

    def _renamed(self, module: Module, node: ast.stmt) -> list[str]:
        lines = list(module.lines)
        renamed = self._cutting.renamed_in(module, self._final)
        for line, column, old, new in sorted(renames(node, renamed), reverse=True):
            row = lines[line]
            if row[column : column + len(old)] != old:
                raise InputError(f"{module.name}:{line + 1}: cannot rename {old!r} there")
            lines[line] = row[:column] + new + row[column + len(old) :]
        return lines
