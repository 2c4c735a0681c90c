"""The report: labels of runs, one file that needs nothing else, and the mistakes that a user can make."""

import importlib.util
import json
import os
import re
import sys
import tempfile

import nbformat
import pytest

from search import report
from search.errors import InputError
from search.report import load_traces, write_report
from search.trace import TraceWriter
from tests.traces import make_event, tiny_trace


@pytest.fixture
def trace_file(tmp_path):
    """A tiny trace on disk, in a folder whose name has to be escaped in HTML."""
    return save_trace(tmp_path / "my <run>" / "trace.jsonl")


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Put cells in the notebook's place; with these a kernel has little to import."""

    def put(*sources):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        cells[0].metadata["tags"] = ["parameters"]
        path = tmp_path / "notebooks" / "short.ipynb"
        path.parent.mkdir()
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        monkeypatch.setattr(report, "NOTEBOOK", path)
        return path

    return put


def save_trace(path):
    trace = tiny_trace()
    with TraceWriter(path) as writer:
        writer.header({key: value for key, value in trace.header.items() if key != "kind"})
        for generation in trace.generations:
            writer.generation(generation)
        for event in trace.events:
            writer.event(event["event"], **{k: v for k, v in event.items() if k not in make_event("")})
    return path


def test_runs_are_labelled_by_their_folders(tmp_path):
    first, second = (save_trace(tmp_path / name / "trace.jsonl") for name in ("first", "second"))
    assert list(load_traces([first, str(second)])) == ["first", "second"]
    other = save_trace(tmp_path / "kept.jsonl")
    assert list(load_traces([other, other])) == ["kept"]


def test_runs_in_folders_of_one_name_are_labelled_by_their_paths(tmp_path):
    paths = [save_trace(tmp_path / name / "run" / "trace.jsonl") for name in ("a", "b")]
    assert list(load_traces(paths)) == [str(path) for path in paths]


def test_no_trace_is_refused():
    with pytest.raises(InputError, match="no trace was given; name one"):
        load_traces([])


def test_the_report_runs_the_notebook_on_the_traces_named_with_this_python(trace_file, notebook, tmp_path):
    notebook("TRACES = ['elsewhere']", "import sys, os\nprint(TRACES, sys.executable, os.getcwd(), 6 * 7)")
    output = tmp_path / "deep" / "report.html"
    write_report([trace_file], output)
    page = output.read_text(encoding="utf-8")
    assert "trace.jsonl" in page
    assert "elsewhere" not in page
    assert sys.executable in page
    assert str(tmp_path / "notebooks") in page
    assert "6 * 7" not in page  # no input is shown
    assert "42" in page
    assert "<title>Search report: my &lt;run&gt;</title>" in page
    assert not re.search(r"<script|<link|https?://|@import", page)
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_a_kernel_that_somebody_registered_as_python3_is_left_alone(
    trace_file, notebook, tmp_path, monkeypatch, capfd
):
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "theirs", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook("TRACES = []", "import sys; print(sys.executable)")
    write_report([trace_file], tmp_path / "report.html")
    assert sys.executable in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "WARNING" not in capfd.readouterr().err  # of a kernel that talks over an open port


def test_relative_traces_and_any_working_directory_do(trace_file, notebook, tmp_path, monkeypatch):
    notebook("TRACES = []", "print(open(TRACES[0]).readline().count('header'), 'header')")
    monkeypatch.chdir(trace_file.parent)
    write_report([trace_file.relative_to(trace_file.parent)], tmp_path / "report.html")
    assert "1 header" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_cell_that_fails_is_one_line_with_its_line_and_leaves_no_file(trace_file, notebook, tmp_path):
    notebook("TRACES = []", "first = 1\nsecond = first / 0")
    output = tmp_path / "report.html"
    output.write_text("the report before")
    with pytest.raises(InputError) as caught:
        write_report([trace_file], output)
    assert str(caught.value) == (
        "short.ipynb: the cell's line `second = first / 0` failed: ZeroDivisionError: division by zero"
    )
    assert output.read_text() == "the report before"


def test_a_kernel_that_dies_is_told(trace_file, notebook, tmp_path):
    notebook("TRACES = []", "import os; os._exit(1)")
    with pytest.raises(InputError, match=r"^short.ipynb could not be run: Kernel died$"):
        write_report([trace_file], tmp_path / "report.html")


@pytest.fixture
def long_folder(tmp_path, monkeypatch):
    """A folder for temporary files whose path leaves no room for a socket's name."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_long_folder_for_temporary_files_is_no_hindrance(trace_file, notebook, tmp_path, long_folder):
    notebook("TRACES = []", "print(6 * 7)")
    write_report([trace_file], tmp_path / "report.html")
    assert "42" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not list(long_folder.iterdir())


def test_a_folder_that_takes_no_socket_is_one_line_with_the_way_out(
    trace_file, notebook, tmp_path, long_folder, monkeypatch
):
    notebook("TRACES = []")
    monkeypatch.setattr(report, "_short_folder", lambda: None)
    with pytest.raises(InputError) as caught:
        write_report([trace_file], tmp_path / "report.html")
    assert str(caught.value) == (
        f"short.ipynb: no kernel can be started with its files in {long_folder}: AF_UNIX path too long; "
        "set TMPDIR to a folder of a short path that can be written to"
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"in .*gone: .*No such file.*; set TMPDIR to a folder"):
        write_report([trace_file], tmp_path / "report.html")


def test_a_trace_that_cannot_be_read_is_refused_before_any_kernel_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_render_notebook", lambda _: pytest.fail("rendered"))
    with pytest.raises(InputError, match=r"none.jsonl: cannot read the trace"):
        write_report([tmp_path / "none.jsonl"], tmp_path / "report.html")


def test_missing_libraries_are_named_with_the_line_that_installs_them(trace_file, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "nbclient" else found(name))
    with pytest.raises(
        InputError, match=r"needs nbclient, not installed here; run: pip install matplotlib pandas"
    ):
        write_report([trace_file], tmp_path / "report.html")


def test_a_package_without_its_notebook_says_where_it_was_looked_for(trace_file, tmp_path, monkeypatch):
    missing = tmp_path / "gone.ipynb"
    monkeypatch.setattr(report, "NOTEBOOK", missing)
    with pytest.raises(InputError, match=rf"no notebook at {re.escape(str(missing))}: .* clone it"):
        write_report([trace_file], tmp_path / "report.html")


def test_a_notebook_without_its_parameters_is_refused(trace_file, notebook, tmp_path):
    path = notebook("TRACES = []")
    nbformat.write(nbformat.v4.new_notebook(), path)
    with pytest.raises(InputError, match='found 0 cells tagged "parameters", expected one; restore the file'):
        write_report([trace_file], tmp_path / "report.html")


def test_an_output_that_cannot_be_written_is_one_line(trace_file, notebook, tmp_path):
    notebook("TRACES = []")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*report.html: File exists"):
        write_report([trace_file], tmp_path / "file" / "report.html")


def test_the_kernel_keeps_what_the_user_has_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    root = str(report.NOTEBOOK.parents[1])
    assert report._kernel_environment(tmp_path)["PYTHONPATH"] == os.pathsep.join([root, "/elsewhere"])
    monkeypatch.delenv("PYTHONPATH")
    assert report._kernel_environment(tmp_path)["PYTHONPATH"] == root
