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
