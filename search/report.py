"""Write the report on searches: the notebook run on their traces, as one HTML file that needs nothing else.

Knows where the notebook lies, Jupyter's libraries (optional) and HTML; not what the notebook shows.
"""

import html
import os
import re
import socket
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from search.errors import InputError
from search.files import atomic_write
from search.trace import Trace

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "search_traces.ipynb"
REPORT_LIBRARIES = "matplotlib", "pandas", "nbformat", "nbclient", "nbconvert", "ipykernel"
CELL_LIMIT_S = 600
"""A cell that draws dozens of large runs takes minutes; one that hangs must not hang for ever."""
MAX_FOLDER_BYTES = 70
"""Of the folder for temporary files: below it come 27 more, and a socket's path has some 100."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 1040px;
  margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; height: auto; }}
h1, h2 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; }}
table {{ border: 0; border-collapse: collapse; font-size: 0.8rem; }}
th, td {{ padding: 0.25rem 0.6rem; border: 0; border-bottom: 1px solid #ddd; text-align: right;
  vertical-align: top; }}
tbody tr:nth-child(even) {{ background: #f6f6f6; }}
td {{ max-width: 32rem; overflow-wrap: anywhere; }}
.output_area, .output_subarea {{ overflow-x: auto; }}
.output_stderr pre {{ color: #8a3b00; white-space: pre-wrap; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def load_traces(paths: Sequence[str | Path]) -> dict[str, Trace]:
    """Read traces, each under a label: its folder's name, or its path where folders share one.

    Raises:
        InputError: for no trace at all, and what `Trace.load` raises.
    """
    files = list(dict.fromkeys(Path(path) for path in paths))
    if not files:
        raise InputError("no trace was given; name one or several trace.jsonl of `search run`")
    short = [file.absolute().parent.name if file.name == "trace.jsonl" else file.stem for file in files]
    labels = [name if short.count(name) == 1 else str(file) for name, file in zip(short, files, strict=True)]
    return {label: Trace.load(file) for label, file in zip(labels, files, strict=True)}


def write_report(traces: Sequence[Path], output: Path) -> None:
    """Run the notebook on these traces with this Python, and write what it shows as one HTML file.

    The file holds its images and styles and loads nothing. It appears whole or not at all.

    Raises:
        InputError: for a trace that cannot be read, a library or the notebook that is missing, a cell that
            fails, or an output that cannot be written.
    """
    titles = list(load_traces(traces))
    body = _render_notebook([str(Path(path).resolve()) for path in traces])
    title = "Search report: " + ", ".join(titles)
    with atomic_write(output) as temporary:
        temporary.write_text(_PAGE.format(title=html.escape(title), body=body), encoding="utf-8")


def _render_notebook(paths: list[str]) -> str:
    """Return the body of the page."""
    if missing := [name for name in REPORT_LIBRARIES if find_spec(name) is None]:
        raise InputError(
            f"a report needs {', '.join(missing)}, not installed here; run: pip install "
            + " ".join(REPORT_LIBRARIES)
        )
    import nbformat
    from nbconvert import HTMLExporter

    if not NOTEBOOK.is_file():
        raise InputError(
            f"no notebook at {NOTEBOOK}: a report needs the repository, not the package alone; clone it, "
            "and run the command there"
        )
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    _hand_over(notebook, paths)
    try:
        with tempfile.TemporaryDirectory(dir=_short_folder()) as folder:
            _try_socket(Path(folder) / "kernel-ipc-0")
            _execute_notebook(notebook, Path(folder))
    except OSError as error:
        raise InputError(
            f"{NOTEBOOK.name}: no kernel can be started with its files in {tempfile.gettempdir()}: {error}; "
            "set TMPDIR to a folder of a short path that can be written to"
        ) from error
    exporter = HTMLExporter(  # type: ignore[no-untyped-call]
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    body: str = exporter.from_notebook_node(notebook)[0]
    return body


def _short_folder() -> str | None:
    """Return where the kernel's sockets can lie; None for the usual folder of temporary files."""
    is_long = len(os.fsencode(tempfile.gettempdir())) > MAX_FOLDER_BYTES
    return "/tmp" if is_long and os.access("/tmp", os.W_OK) else None


def _try_socket(path: Path) -> None:
    """Open a socket as the kernel's (OSError): later it fails halfway, with an error that zmq alone knows."""
    with socket.socket(socket.AF_UNIX) as attempt:
        attempt.bind(str(path))


def _hand_over(notebook: Any, paths: list[str]) -> None:
    """Put the traces' paths in place of those of the cell tagged "parameters"."""
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise InputError(
            f'{NOTEBOOK}: found {len(tagged)} cells tagged "parameters", expected one; restore the file'
        )
    tagged[0].source = f"TRACES = {paths!r}"


def _execute_notebook(notebook: Any, folder: Path) -> None:
    """Run all cells in place, with the Python that runs this; `folder` takes the kernel's own files."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

    kernel = AsyncKernelManager(
        kernel_name="python3",
        transport="ipc",
        connection_file=str(folder / "kernel.json"),
        # Without folders to look in, "python3" is sys.executable, whatever is registered by this name.
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
    )
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = NotebookClient(notebook, km=kernel, timeout=CELL_LIMIT_S, resources=resources)
    try:
        client.execute(env=_kernel_environment(folder), cleanup_kc=True)
    except CellExecutionError as error:
        reason = " ".join(f"{error.ename}: {error.evalue}".split())
        raise InputError(
            f"{NOTEBOOK.name}: the cell's line `{_failing_line(error.traceback)}` failed: {reason}"
        ) from error
    except (CellControlSignal, DeadKernelError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{NOTEBOOK.name} could not be run: {reason}") from error


def _kernel_environment(folder: Path) -> Mapping[str, str]:
    """Return an environment in which this package is found, and no profile of the user's."""
    root = str(NOTEBOOK.parents[1])
    path = os.pathsep.join(entry for entry in (root, os.environ.get("PYTHONPATH")) if entry)
    # Libraries imported on the way ask tqdm for widgets, which a report has no use for.
    warnings = ",".join(w for w in (os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found") if w)
    own = {"PYTHONPATH": path, "IPYTHONDIR": str(folder / "ipython"), "PYTHONWARNINGS": warnings}
    return {**os.environ, **own}


def _failing_line(traceback: str) -> str:
    """Return the line of the cell that failed, from a traceback with colours: its first arrow."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    arrow = re.search(r"^-+> +\d+ (.*)$", plain, re.MULTILINE)
    return arrow.group(1).strip() if arrow else "?"
