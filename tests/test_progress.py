"""The progress line: what it shows, on what kind of stream, and that messages do not tear it."""

import io
import logging

import pytest

from search.loop import Progress
from search.progress import ProgressLine, can_rewrite

SHOWN = "search: 32/2000 evaluations, best loss 0.4321, 99 s left"


class Terminal(io.StringIO):
    """As a person sees it."""

    def isatty(self):
        return True


class NotebookStream(io.StringIO):
    """As a notebook's kernel has it: no terminal, and carriage returns work."""

    __module__ = "ipykernel.iostream"


class Clock:
    """Seconds that pass when told to."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def progress(evaluations=32, best_loss=0.4321, left_s=98.7):
    return Progress(generations=2, evaluations=evaluations, best_loss=best_loss, left_s=left_s)


@pytest.mark.parametrize("stream", [Terminal, NotebookStream])
def test_on_a_terminal_and_in_a_notebook_one_line_is_written_over_and_over(stream):
    file = stream()
    with ProgressLine(2000, file) as line:
        line.phase("search")
        line.show(progress())
    assert file.getvalue().split("\r")[-1].rstrip().startswith(SHOWN)
    assert file.getvalue().count("\n") == 1


def test_the_streams_of_a_real_kernel_count_as_a_notebook():
    iostream = pytest.importorskip("ipykernel.iostream")
    stream = iostream.OutStream.__new__(iostream.OutStream)
    stream.isatty = lambda: False
    assert can_rewrite(stream)


def test_a_file_gets_a_line_a_phase_and_no_carriage_return():
    file = io.StringIO()
    with ProgressLine(2000, file, clock := Clock()) as line:
        line.phase("load")
        clock.seconds = 3.2
        line.phase("search")
        line.show(progress())
        line.phase("finalists")
    lines = ["load, 0 s elapsed", "search, 3 s elapsed", f"{SHOWN}, 3 s elapsed", "finalists, 3 s elapsed"]
    assert file.getvalue() == "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("step_s", "generations_between"),
    [(1.0, 10), (0.125, 80), (60.0, 4)],  # after 10 s; after 10 s again; after a tenth of 320 evaluations
)
def test_a_file_gets_a_line_after_ten_seconds_or_a_tenth_of_the_evaluations_whichever_is_rarer(
    step_s, generations_between
):
    file = io.StringIO()
    with ProgressLine(320, file, clock := Clock()) as line:
        line.phase("search")
        shown_at = []
        for generation in range(1, 5 * generations_between):
            clock.seconds += step_s
            before = len(file.getvalue())
            line.show(progress(evaluations=8 * generation))
            shown_at += [generation] if len(file.getvalue()) > before else []
    assert shown_at == [times * generations_between for times in range(1, 5)]


def test_the_last_progress_is_written_even_if_little_time_has_passed():
    file = io.StringIO()
    with ProgressLine(2000, file) as line:
        line.show(progress())
        assert file.getvalue() == ""
    assert file.getvalue().startswith("start: 32/2000 evaluations")
    assert file.getvalue().count("\n") == 1


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_resumed_run_may_jump_ahead_and_past_the_limit(stream):
    file = stream()
    with ProgressLine(320, file) as line:
        for evaluations in (304, 288, 336):
            line.show(progress(evaluations=evaluations))
    assert "336/" in file.getvalue()


def test_it_goes_to_stderr_and_never_shows_negative_seconds(capsys):
    with ProgressLine(10) as line:
        line.show(progress(5, float("nan"), -3.0))
    out, err = capsys.readouterr()
    assert out == ""
    assert "best loss nan, 0 s left" in err


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_logging_works_during_and_after_the_line(capsys, stream):
    handler = logging.StreamHandler()
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        with ProgressLine(10, stream()):
            logger.warning("loud")
        assert handler in logger.handlers
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err.count("loud\n") == 1


def test_an_error_still_leaves_what_was_reached_in_the_file():
    file = io.StringIO()

    def interrupted_run():
        with ProgressLine(2000, file) as line:
            line.show(progress())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert "32/2000" in file.getvalue()
