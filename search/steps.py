"""A search that the caller drives step by step: ask, evaluate, tell, save.

Knows how to begin and how to end one; not the clock, stages, races or finalists, which are `run_search`'s.
"""

import time
from pathlib import Path
from typing import Self

import numpy as np

from search.archive import Archive
from search.base import LoadedBase
from search.config import SearchConfig
from search.delivery import ADAPTER_FOLDER, deliver_merge
from search.errors import InputError
from search.loop import Scores
from search.merge import MergedAdapter, refuse_strangers
from search.objective import Objective, objective_label
from search.planning import choose_optimizer
from search.provenance import checkout_commit, library_versions
from search.recorded import TRACE_FILE
from search.resume import Record
from search.setup import load_setup
from search.space import FloatArray
from search.trace import Generation, TraceWriter
from search.workspace import refuse_input_folders, refuse_unwritable


class Steps:
    """Loads, writes prompts and takes signals when made; then each step is the caller's.

    Example:
        with Steps(load_config(Path("configs/demo.yaml")), Path("output/steps")) as steps:
            for _ in range(5):
                genomes = steps.ask()             # (n_candidates, n_params)
                scores = steps.evaluate(genomes)  # losses (n_candidates,), per_expert
                steps.tell(scores)
            steps.save()                          # the best as an adapter

    Any genomes may be evaluated; those that were asked for must be told before the next are asked for.
    """

    def __init__(
        self,
        config: SearchConfig,
        output: Path,
        *,
        base: LoadedBase | None = None,
        objective: Objective | None = None,
    ) -> None:
        """Prepare a search in the configured space; of `search.stages` only the last counts.

        Args:
            output: folder for trace, adapter and coefficients.
            base: the configured base, if it is loaded already.
            objective: a function of (merged_logp, expert_logp, next_tokens) in place of the configured one.

        Raises:
            InputError: for weights or settings that do not fit, or an output that cannot be written or that
                holds a trace already.
        """
        refuse_unwritable(output, "folder")
        refuse_input_folders((output, output / ADAPTER_FOLDER), config.sources, "folder")
        refuse_strangers(output / ADAPTER_FOLDER)
        if (path := output / TRACE_FILE).exists():
            raise InputError(f"{path} exists: a search was run there. Choose another folder, or delete it.")
        self._output, self._started_s = output, time.monotonic()
        self._setup = setup = load_setup(config, base, objective)
        self._trace = TraceWriter(path)
        self._trace.header(setup.describe())
        prompts = setup.write_prompts(self._trace, Record())
        self._steering = setup.steer(prompts, self._trace, Record())
        self.space = setup.plan(self._steering)[-1].space
        """How a genome becomes coefficients."""
        start, spread = self.space.encode(self._steering.confine(setup.first.start), setup.first.spread)
        search = config.search
        self._optimizer = choose_optimizer(search).make(start, spread, search.max_evaluations, 0)
        self._archive = Archive(search.n_finalists)
        self._asked: FloatArray = np.empty((0, self.space.n_params))
        self._asked_s = 0.0
        self._n_generations = self._n_evaluations = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._trace.close()

    def ask(self) -> FloatArray:
        """Return the next genomes (n_candidates, n_params)."""
        self._asked, self._asked_s = self._optimizer.ask(), time.monotonic()
        return self._asked.copy()

    def evaluate(self, genomes: FloatArray) -> Scores:
        """Score genomes (n, n_params) on all searched prompts."""
        return self._steering.searched.score(self.space.to_coefficients(genomes))

    def tell(self, scores: Scores) -> None:
        """Take the scores of the genomes last asked for, record them, and learn.

        Raises:
            ValueError: for another number of losses than genomes asked for.
        """
        generation = Generation(
            index=self._n_generations,
            genomes=self._asked,
            losses=scores.losses,
            per_expert=scores.per_expert,
            evaluations=self._n_evaluations + len(self._asked),
            n_tokens=scores.n_tokens,
            elapsed_s=time.monotonic() - self._started_s,
            seconds=time.monotonic() - self._asked_s,
            peak_bytes=scores.peak_bytes,
        )
        self._optimizer.tell(scores.losses)
        self._trace.generation(generation)
        self._archive.add(self._asked, scores.losses, scores.per_expert)
        self._n_generations, self._n_evaluations = self._n_generations + 1, generation.evaluations

    def best(self) -> FloatArray:
        """Return the best coefficients told so far, (n_groups, n_adapters).

        Raises:
            ValueError: when none had a finite loss.
        """
        genomes = self._archive.contents(self.space.n_params, len(self._setup.parts.names))[0]
        if not len(genomes):
            raise ValueError("no candidate with a finite loss was told yet: ask, evaluate and tell first")
        coefficients: FloatArray = self.space.to_coefficients(genomes[:1])[0]
        return coefficients

    def save(self, coefficients: FloatArray | None = None) -> MergedAdapter:
        """Write the adapter and coefficients.json of a merge (n_groups, n_adapters), the best by default."""
        table = self.best() if coefficients is None else coefficients
        scores = self._steering.searched.score(table[None])
        setup = self._setup
        return deliver_merge(
            setup.parts,
            table,
            setup.config.base.name,
            self._output,
            objective={
                "name": objective_label(setup.objective),
                "combine": setup.config.objective.combine,
                "loss": float(scores.losses[0]),
                "per_expert": scores.per_expert[0].tolist(),
            },
            provenance={
                "commit": checkout_commit(),
                "versions": library_versions(),
                "seed": setup.config.search.seed,
                "trace": TRACE_FILE,
                "evaluations": self._n_evaluations,
                "left_out": dict(setup.left_out),
            },
        )
