"""Concord: search, without data, for the mixture of adapters that agrees with each expert on its own text.

Knows the order of the steps only: `search.run` finds the coefficients, `search.merge` sums the adapters.
"""

from llm_merging.merging.Merges import Merges
from search.merge import fold_adapters
from search.run import run_search


class MyMerge(Merges):
    """Coefficients per adapter, evolved inside the time box; see docs/METHOD.md."""

    def merge(self) -> None:
        """Search, write trace, adapter and coefficients to `output`, and fold the winner into the base."""
        self._load_base_model()
        self._load_tokenizer()
        result = run_search(
            self.config,
            output=self.output,
            base=self.loaded_base,
            reserve_s=self.gone_s(),
            measure_later_s=self.measure_answers_s,
        )
        fold_adapters(self.base_model, result.adapters, result.coefficients, result.groups)
        self.merged_model = result.merged.state_dict
        self.ended_by = "interrupt" if result.interrupted else result.ended_by
        self.report = result.report
