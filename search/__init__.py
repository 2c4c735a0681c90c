"""Concord: search, without data, for the mixture of LoRA experts that agrees with each on its own text.

`run_search(load_config(Path("configs/demo.yaml")), output=Path("output/mine"))` does all of it; `Steps` lets
the caller drive each step; `search.merge` turns coefficients into a model.
"""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m search`, whose own code comes later: Ctrl-C in the seconds of imports leaves no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from search.config import SearchConfig, load_config
from search.outcome import RunResult
from search.run import run_search
from search.steps import Steps
from search.trace import Trace

__all__ = ["RunResult", "SearchConfig", "Steps", "Trace", "load_config", "merge", "run_search"]
