"""Make the folder that is handed in from a finished run: `python -m search submission RUN -o submission`.

Knows the run's record, what must hold before it is handed in, and files; not what a bundle is made of.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from search.bundle import QUERIES_AHEAD, write_bundle
from search.card import CARD_FILE
from search.checks import Check
from search.errors import InputError
from search.merge import replace_folder
from search.recorded import COEFFICIENTS_FILE, TRACE_FILE
from search.statement import TITLE, write_statement
from search.verify_answers import check_answers, find_answers
from search.verify_inputs import restore_config
from search.verify_record import RunRecord, check_record, read_run

METHOD_FILE = "MyMerge.py"


def hand_in(run: Path, output: Path, *, queries_ahead: int = QUERIES_AHEAD) -> dict[str, Any]:
    """Check answers and record, then write bundle, answers, trace, coefficients and README, all or nothing.

    Args:
        run: folder of a finished run of llm_merging/main.py.
        output: a new folder, or that of an earlier submission, which is replaced.
        queries_ahead: that the bundle leaves time for, in the kit.

    Returns:
        Output, files, rows of answers and lines of the bundle.

    Raises:
        InputError: for a run that cannot be handed in, an output that holds something else, or a full disk.
    """
    record = read_run(run)
    answers = _find_all_answers(record)
    _refuse_differences(run, [*check_answers(record), *check_record(record)])
    described = {
        METHOD_FILE: "the method, in one file, for the starter kit",
        **{path.name: "the answers" for path in answers},
        TRACE_FILE: "all that the search did, a line at a time",
        COEFFICIENTS_FILE: "how much of which adapter went where",
    }
    _refuse_other_folders(output, [*described, CARD_FILE])
    config = restore_config(record)
    prior = config.search.prior_path if config.search.prior else None
    bundle = write_bundle(config, prior, queries_ahead)
    n_lines = len(bundle.splitlines())
    statement = write_statement(record, described, n_lines)
    with replace_folder(output) as temporary:
        (temporary / METHOD_FILE).write_text(bundle, encoding="utf-8")
        (temporary / CARD_FILE).write_text(statement, encoding="utf-8")
        for path in (*answers, run / TRACE_FILE, run / COEFFICIENTS_FILE):
            shutil.copyfile(path, temporary / path.name)
    rows = sum(file["rows"] for file in (record.trace.last("answered") or {})["files"])
    return {"output": str(output), "files": [CARD_FILE, *described], "rows": rows, "lines": n_lines}


def _find_all_answers(record: RunRecord) -> list[Path]:
    answered = record.trace.last("answered")
    if answered is None:
        raise InputError(
            f"{record.folder}: the run answered no queries. Run python llm_merging/main.py, and give its "
            "output/my_merge."
        )
    return [find_answers(record, file) for file in answered["files"]]


def _refuse_differences(run: Path, checks: Sequence[Check]) -> None:
    """Refuse what does not agree with itself; which versions are installed here does not matter."""
    wrong = [check for check in checks if check.mark == "differs" and check.name != "versions"]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{wrong[0].name}: {wrong[0].text}{more}. See python -m search verify {run}")


def _refuse_other_folders(output: Path, ours: Iterable[str]) -> None:
    """Refuse a folder that holds anything but a submission, which writing one would delete."""
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(f"{output}: is a file, expected a folder. Choose another -o.")
    found = {path.name for path in output.iterdir()}
    card = output / CARD_FILE
    is_ours = card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith(TITLE)
    if strangers := sorted(found - set(ours) if is_ours else found):
        raise InputError(
            f"{output}: holds {strangers[0]!r}, which replacing it would delete. Choose a new folder."
        )
