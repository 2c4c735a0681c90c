"""Concord: search, without data, for the mixture of LoRA experts that agrees with each on its own text.

All of it is `run_search(SearchConfig, output=...)`; `search.merge` turns coefficients into a model.
"""

from search.config import SearchConfig
from search.run import RunResult, run_search
from search.trace import Trace

__all__ = ["RunResult", "SearchConfig", "Trace", "merge", "run_search"]
