"""Method names to classes."""

from llm_merging.merging.MyMerge import MyMerge

METHODS = {"my_merge": MyMerge}
