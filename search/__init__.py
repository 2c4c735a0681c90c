"""Concord: search, without data, for the mixture of LoRA experts that agrees with each on its own text.

`run_search(load_config(Path("configs/demo.yaml")), output=Path("output/mine"))` does all of it; `Steps` lets
the caller drive each step; `search.merge` turns coefficients into a model.
"""

from search.config import SearchConfig, load_config
from search.outcome import RunResult
from search.run import run_search
from search.steps import Steps
from search.trace import Trace

__all__ = ["RunResult", "SearchConfig", "Steps", "Trace", "load_config", "merge", "run_search"]
