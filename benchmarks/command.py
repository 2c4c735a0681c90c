"""How a benchmark's command ends: its exit code, and one line where it did not work.

Knows errors and signals; not what is run.
"""

import signal
import sys
from collections.abc import Callable

from search.errors import InputError


def exit_code(run: Callable[[], int]) -> int:
    """Run; return its number, 2 with a line for bad input, 130 after Ctrl-C or SIGTERM.

    SIGTERM is Ctrl-C, so that the runs under way end too.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


def run_and_report(run: Callable[[], int], report: Callable[[], None], *, only_report: bool) -> int:
    """Run, which counts what failed, unless a report alone is wanted; then report, and end as `exit_code`."""

    def both() -> int:
        n_failed = 0 if only_report else run()
        report()
        return 1 if n_failed else 0

    return exit_code(both)
