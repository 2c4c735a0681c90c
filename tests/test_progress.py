"""The progress line: what it shows, and that messages do not tear it."""

import io
import logging

from search.loop import Progress
from search.progress import ProgressLine


def test_the_line_shows_phase_evaluations_loss_and_seconds_left():
    file = io.StringIO()
    with ProgressLine(2000, file) as line:
        line.phase("search")
        line.show(Progress(generations=2, evaluations=32, best_loss=0.4321, left_s=98.7))
    assert "search: 32/2000 evaluations, best loss 0.4321, 99 s left" in file.getvalue()


def test_it_goes_to_stderr_and_never_shows_negative_seconds(capsys):
    with ProgressLine(10) as line:
        line.show(Progress(1, 5, float("nan"), -3.0))
    out, err = capsys.readouterr()
    assert out == ""
    assert "best loss nan, 0 s left" in err


def test_logging_works_during_and_after_the_line(capsys):
    handler = logging.StreamHandler()
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        with ProgressLine(10):
            logger.warning("loud")
        assert handler in logger.handlers
    finally:
        logger.removeHandler(handler)
    assert "loud" in capsys.readouterr().err
