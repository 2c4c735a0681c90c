"""The baseline: every adapter with the coefficient 1/n, summed exactly.

Knows nothing of search; all but the coefficient is task arithmetic's.
"""

from llm_merging.merging.task_arithmetic import TaskArithmetic
from search.adapters import Adapter
from search.config import SearchConfig


class UniformAverage(TaskArithmetic):
    """base + sum_i (1/n) s_i B_i A_i."""

    def __init__(self, name: str, config: SearchConfig | None = None) -> None:
        super().__init__(name, config)
        self.scale = 1 / len(self.config.adapters)

    def _load_everything(self) -> list[Adapter]:
        adapters = super()._load_everything()
        self.scale = 1 / len(adapters)  # the config may list some that the hub does not have
        return adapters
