"""The house rules that a reader relies on: who imports whom, names that are unique, sizes, first lines."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"errors", "versions"},
    {
        "card",
        "checks",
        "compiled",
        "groups",
        "interruption",
        "memory",
        "picture",
        "profiles",
        "provenance",
        "sep_cma",
        "shorten",
        "timebox",
        "transforms",
        "workspace",
    },
    {
        "files",
        "hub_errors",
        "import_block",
        "locate",
        "objective",
        "sampling",
        "skeleton",
        "space",
        "syntax",
        "trace",
        "yaml_input",
    },
    {"dummy", "hub", "plain_cma", "sources"},
    {"adapters", "archive", "base", "finalists", "gradient", "movement", "optimizer", "plugin", "priors"}
    | {"racing", "report", "settings", "tables"},
    {
        "config",
        "figures",
        "figures_genomes",
        "finding",
        "kit_optimizer",
        "loop",
        "prior_learning",
        "recorded",
        "stack",
    },
    {"balance", "forecast", "merge", "parts", "pin", "population", "progress", "reserves", "resume", "stages"}
    | {"summary"},
    {"compress", "delivery", "diagnosis", "drafts", "folding", "joined", "planning", "trust"}
    | {"verify_record"},
    {"diagnosis_text", "export", "prompts", "statement", "verify_answers"},
    {"experts"},
    {"passes"},
    {"evaluate"},
    {"steering"},
    {"ending", "kit_signals", "setup"},
    {"kit_search", "outcome", "steps", "trial", "verify_inputs", "verify_search"},
    {"footprint", "phases", "plain_parts", "stand_ins", "verify_scores"},
    {"doctor", "run", "submission", "verify"},
    {"bundle"},
    {"handing_in", "options"},
    {"__init__", "__main__"},
)
"""A file of search/ imports only from layers above its own here."""
TORCH_FREE = {
    *(
        "archive",
        "card",
        "checks",
        "config",
        "diagnosis",
        "diagnosis_text",
        "errors",
        "figures",
        "figures_genomes",
    ),
    *("files", "finalists", "finding", "forecast", "gradient", "groups", "interruption", "locate", "loop"),
    *(
        "movement",
        "optimizer",
        "picture",
        "plain_cma",
        "planning",
        "prior_learning",
        "priors",
        "profiles",
        "progress",
    ),
    *(
        "provenance",
        "racing",
        "report",
        "reserves",
        "resume",
        "sep_cma",
        "settings",
        "skeleton",
        "space",
        "stages",
        "summary",
    ),
    *("tables", "timebox", "trace", "transforms", "trust", "workspace", "yaml_input"),
}
ONLY_IN = {
    "nevergrad": {"optimizer"},
    "cma": {"plain_cma"},
    "ray": set(),
    "tqdm": {"progress"},
    "pandas": {"figures_genomes", "movement", "tables"},
    "matplotlib": {"figures", "figures_genomes", "picture"},
    "nbformat": {"report"},
    "nbclient": {"report"},
    "nbconvert": {"report"},
    "jupyter_client": {"report"},
}
OPTIONAL = {"pandas", "matplotlib", "nbformat", "nbclient", "nbconvert", "jupyter_client"}
"""Installed with the extra `report`; everything but a report does without them."""
FORBIDDEN_IN_SEARCH = {"llm_merging", "benchmarks", "tests"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 40

LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
SEARCH = sorted((ROOT / "search").glob("*.py"))
SIZED = SEARCH + sorted(
    path for folder in ("llm_merging", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every import of a file, inside functions too: the module, and how it is written."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), ast.unparse(node)


def imports_inside_functions(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom))


def packages(path: Path) -> set[str]:
    """Top-level packages that a file imports itself."""
    return {module.partition(".")[0] for module, _ in imports(path)}


def siblings(path: Path) -> set[str]:
    """Files of search/ that a file imports itself."""
    return {module.split(".")[1] for module, _ in imports(path) if module.startswith("search.")}


def reachable(name: str) -> set[str]:
    """Files of search/ that importing one of them runs, itself included."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting.extend(siblings(ROOT / "search" / f"{current}.py"))
    return reached


def module_names(body: list[ast.stmt]) -> Iterator[str]:
    """Names that statements define at module level; imports and dunders left out."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from module_names(node.body + getattr(node, "orelse", []))


@pytest.mark.parametrize("path", SEARCH, ids=label)
def test_imports_point_down(path):
    assert path.stem in LAYER_OF, f"give {path.name} its place in LAYERS"
    above = {name for name in siblings(path) if LAYER_OF[name] >= LAYER_OF[path.stem]}
    assert not above, f"{path.name} (layer {LAYER_OF[path.stem]}) may not import from {sorted(above)}"


@pytest.mark.parametrize("path", SEARCH, ids=label)
def test_the_library_is_imported_name_by_name(path):
    for module, written in imports(path):
        assert not module.startswith("."), f"{written}: write `from search.x import name`"
        assert module != "search", f"{written}: write `from search.x import name`"
        assert not (module.startswith("search.") and written.startswith("import ")), written
        assert not written.endswith("import *"), written


@pytest.mark.parametrize("path", SEARCH, ids=label)
def test_the_library_does_not_know_who_uses_it(path):
    assert not packages(path) & FORBIDDEN_IN_SEARCH


@pytest.mark.parametrize("path", SEARCH, ids=label)
def test_a_package_that_one_file_wraps_is_imported_there_only(path):
    for package, files in ONLY_IN.items():
        assert package not in packages(path) or path.stem in files, f"{package} belongs in {sorted(files)}"


@pytest.mark.parametrize("path", SEARCH, ids=label)
def test_imports_stand_at_the_top_unless_the_package_is_optional(path):
    for node in imports_inside_functions(path):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        for name in names:
            assert name.partition(".")[0] in OPTIONAL, f"{ast.unparse(node)}: write it at the top"


@pytest.mark.parametrize("name", ["__init__", "run"])
def test_a_run_needs_no_package_of_reports(name):
    for reached in reachable(name):
        assert not packages(ROOT / "search" / f"{reached}.py") & OPTIONAL, f"{name} through {reached}"


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_torch_free_files_stay_torch_free(name):
    for reached in reachable(name):
        heavy = packages(ROOT / "search" / f"{reached}.py") & {"torch", "transformers", "peft"}
        assert not heavy, f"{name} imports {heavy} through {reached}"


def test_module_level_names_are_unique_across_the_library():
    homes = defaultdict(set)
    for path in SEARCH:
        for name in module_names(parse(path).body):
            homes[name].add(path.name)
    twice = {
        name: sorted(files) for name, files in homes.items() if len(files) > 1 and not name.startswith("__")
    }
    assert not twice


@pytest.mark.parametrize("path", SIZED + TESTS, ids=label)
def test_a_file_opens_with_its_job(path):
    tree = parse(path)
    assert not tree.body or ast.get_docstring(tree), "start with a docstring"


@pytest.mark.parametrize("path", SIZED, ids=label)
def test_files_and_functions_stay_small(path):
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= MAX_FILE_LINES, f"{n_lines} lines: split it"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has a body of {length} lines: split it"
