"""The merge methods by name; a method of one's own goes into MyMerge.py."""

from llm_merging.merging.Merges import Merges
from llm_merging.merging.MyMerge import MyMerge
from llm_merging.merging.task_arithmetic import TaskArithmetic
from llm_merging.merging.uniform_average import UniformAverage

METHODS: dict[str, type[Merges]] = {
    "my_merge": MyMerge,
    "task_arithmetic": TaskArithmetic,
    "uniform_average": UniformAverage,
}

__all__ = ["METHODS", "Merges", "MyMerge", "UniformAverage"]
