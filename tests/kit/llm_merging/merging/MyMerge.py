"""What a submission replaces."""

from llm_merging.merging.Merges import Merges


class MyMerge(Merges):
    def merge(self):
        raise NotImplementedError("drop a submission here")
