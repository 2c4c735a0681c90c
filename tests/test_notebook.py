"""The notebook: short cells that only read, nothing kept of an execution; it runs on the kept trace."""

import ast
import json
import re

import pytest

from search.report import NOTEBOOK, write_report
from tests.test_layers import ROOT

TRACE = ROOT / "tests" / "data" / "trace.jsonl"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on the kept trace."""
    output = tmp_path_factory.mktemp("report") / "report.html"
    write_report([TRACE], output)
    return output.read_text(encoding="utf-8")


def test_nothing_of_an_execution_is_committed():
    for cell in CELLS:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_cells_are_short_and_define_nothing():
    for source in CODE:
        assert source.count("\n") < 9, source
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, defined)], source


def test_the_first_cell_names_the_trace_and_the_last_states_the_finding():
    assert CELLS[0]["metadata"]["tags"] == ["parameters"]
    named = ast.literal_eval(CODE[0].partition("=")[2].partition("#")[0].strip())
    assert [(NOTEBOOK.parent / path).resolve() for path in named] == [TRACE]
    assert CODE[-1] == "state_finding(traces)"


def test_the_kept_trace_is_small():
    assert TRACE.stat().st_size < 250_000


def test_the_report_holds_every_figure_with_its_description(page):
    images = re.findall(r"<img[^>]*>", page)
    assert len(images) == 8  # the ninth puts several runs side by side
    for image in images:
        assert 'src="data:image/png;base64,' in image
        assert re.search(r'alt="[A-Z][^"]{20,}"', image)


def test_the_report_loads_nothing_and_shows_no_code_and_no_warning(page):
    assert not re.search(r"<script|<link|@import|(src|href)=[\"'](?!data:)", page)
    assert "load_traces" not in page
    assert "output_stderr" not in page.partition("</style>")[2]


def test_the_report_states_what_was_found(page):
    last = re.findall(r"<p>(.*?)</p>", page)[-1]
    assert last.startswith("data: the search scored 240 candidates on ")
    assert "On the unseen prompts the winner is" in last
