"""The merge methods by name; a method of one's own goes into MyMerge.py."""

from llm_merging.merging.adamerging import AdaMerging
from llm_merging.merging.balanced import Balanced
from llm_merging.merging.best_single import BestSingle
from llm_merging.merging.core_space import CoreSpaceMerge
from llm_merging.merging.dare import Dare, DareTies
from llm_merging.merging.iso import IsoMerge
from llm_merging.merging.knots import KnotsTiesMerge
from llm_merging.merging.lorahub import LoraHub
from llm_merging.merging.Merges import Merges
from llm_merging.merging.MyMerge import MyMerge
from llm_merging.merging.peft_linear import Cat, Linear
from llm_merging.merging.regmean import RegMean
from llm_merging.merging.task_arithmetic import TaskArithmetic
from llm_merging.merging.ties import Ties
from llm_merging.merging.tsv import TsvMerge
from llm_merging.merging.uniform_average import UniformAverage

METHODS: dict[str, type[Merges]] = {
    "adamerging": AdaMerging,
    "balanced": Balanced,
    "best_single": BestSingle,
    "cat": Cat,
    "core_space": CoreSpaceMerge,
    "dare": Dare,
    "dare_ties": DareTies,
    "iso_c": IsoMerge,
    "knots_ties": KnotsTiesMerge,
    "linear": Linear,
    "lorahub": LoraHub,
    "my_merge": MyMerge,
    "regmean": RegMean,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "tsv_m": TsvMerge,
    "uniform_average": UniformAverage,
}

__all__ = ["METHODS", "Merges", "MyMerge", "UniformAverage"]
