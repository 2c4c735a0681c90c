"""What a finished search knew after so many of its generations, rebuilt from its trace.

The optimiser is made anew, asked again and told the recorded losses, as a resumed run does it: nothing that
was searched on is scored again. Knows setups and traces; not which generations are wanted, nor labels.
"""

from pathlib import Path

import numpy as np

from search.ending import judge_on_unseen, refine_best
from search.loop import Past, SearchTools
from search.planning import choose_optimizer, set_limits
from search.resume import Record
from search.setup import Setup
from search.space import FloatArray
from search.stages import Found, StagedSearch, run_stages
from search.timebox import TimeBox
from search.trace import Trace, TraceWriter

NO_LIMIT_S = 1e6
CHOSEN, MEAN, BEST = "chosen", "mean", "best"
"""What the finalists' comparison picks, the centre of the distribution, and the archive's best."""


class Replay:
    """A finished search, to be looked at at any of its generations."""

    def __init__(self, setup: Setup, trace: Trace, folder: Path) -> None:
        """Take the recorded prompts, and ask the experts again what they say on them.

        Args:
            setup: of the configuration that the trace was written under.
            folder: gets what is written on the way.
        """
        self._setup, self._trace, self._folder = setup, trace, folder
        with TraceWriter(folder / "steering.jsonl") as writer:
            writer.header({})
            prompts = setup.write_prompts(writer, Record(trace))
            self._steering = setup.steer(prompts, writer, Record(trace))

    def tables_after(self, n_generations: int) -> dict[str, FloatArray]:
        """Return CHOSEN, MEAN and, where a loss was finite, BEST, (n_groups, n_adapters) each.

        CHOSEN is what a run whose search had ended there would have returned, refined if it is configured.
        """
        steering, gradient = self._steering, self._setup.config.search.gradient
        with TraceWriter(self._folder / "replay.jsonl") as writer:
            writer.header({})
            found = self._found_after(n_generations, writer)
            pace = gradient.refine_steps, gradient.learning_rate
            refined = refine_best(steering, found, self._setup.plan(steering)[-1].space, pace, writer)
            chosen = judge_on_unseen(steering, found, refined, writer).winner.coefficients
        tables = {CHOSEN: chosen, MEAN: found.mean}
        return {**tables, BEST: found.archive[0]} if len(found.archive) else tables

    def _found_after(self, n_generations: int, writer: TraceWriter) -> Found:
        began = self._trace.last("search") or {}
        past = self._trace.generations[:n_generations]

        def past_of(stage: int) -> Past:
            own = [generation for generation in past if generation.stage == stage]
            return Past(own, "evaluations" if stage < past[-1].stage else "interrupt")

        settings = self._setup.config.search
        search = StagedSearch(
            stages=self._setup.plan(self._steering),
            choice=choose_optimizer(settings),
            limits=set_limits(settings),
            evaluator=self._steering.searched,
            search_s=NO_LIMIT_S,
            past_of=past_of,
            inject_every=0,  # what was put in is in the trace
            improve=lambda mean: mean,
        )
        tools = SearchTools(trace=writer, timebox=TimeBox(NO_LIMIT_S))
        return run_stages(search, np.array(began["start"]), np.array(began["spread"]), tools)
