"""The merge methods by name; a method of one's own goes into MyMerge.py."""

from llm_merging.merging.Merges import Merges
from llm_merging.merging.MyMerge import MyMerge
from llm_merging.merging.uniform_average import UniformAverage

METHODS: dict[str, type[Merges]] = {"my_merge": MyMerge, "uniform_average": UniformAverage}

__all__ = ["METHODS", "Merges", "MyMerge", "UniformAverage"]
