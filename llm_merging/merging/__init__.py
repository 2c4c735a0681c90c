"""The merge methods by name; a method of one's own goes into MyMerge.py."""

from llm_merging.merging.dare import Dare, DareTies
from llm_merging.merging.Merges import Merges
from llm_merging.merging.MyMerge import MyMerge
from llm_merging.merging.peft_linear import Cat, Linear
from llm_merging.merging.task_arithmetic import TaskArithmetic
from llm_merging.merging.ties import Ties
from llm_merging.merging.uniform_average import UniformAverage

METHODS: dict[str, type[Merges]] = {
    "cat": Cat,
    "dare": Dare,
    "dare_ties": DareTies,
    "linear": Linear,
    "my_merge": MyMerge,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "uniform_average": UniformAverage,
}

__all__ = ["METHODS", "Merges", "MyMerge", "UniformAverage"]
