"""A search in the competition's kit: one space, no resumption; generations, finalists, a winner in time.

Knows a run's settings as plain values, and the clock; not the kit, files or signals. On equal settings
it finds what `search.phases` finds, which can do more.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.archive import Archive
from search.ending import MERGE_TIMES
from search.finalists import (
    BALANCED,
    PRIOR,
    UNIFORM,
    Finalist,
    Judgement,
    choose_finalists,
    judge_finalists,
    make_candidates,
    stack_coefficients,
)
from search.gradient import adam_descend
from search.kit_signals import KitRun, KitSteering
from search.loop import CAUTION, N_LOOKED_BACK
from search.optimizer import BatchOptimizer
from search.racing import Rung, order_blocks, plan_race, rank_by_rung, select_survivors
from search.reserves import OPTIONAL, EndingCosts, Reserves
from search.space import FloatArray, Space
from search.stages import SAME
from search.timebox import OutOfTime


@dataclass(frozen=True, slots=True, eq=False)
class Raced:
    """What a race of candidates came to."""

    losses: FloatArray
    """(n_candidates,) to tell the optimiser."""
    per_expert: FloatArray
    """(n_candidates, n_experts) on the prompts that each candidate was scored on."""
    rungs: list[dict[str, Any]]
    """As `Race.rungs`: those of the last are scored on all prompts."""
    n_tokens: int


def race(evaluator: Any, table: FloatArray, rungs: Sequence[Rung], order: NDArray[np.int64]) -> Raced:
    """Score coefficients (n_candidates, n_groups, n_adapters) on blocks in this order, survivors on more."""
    alive, n_seen, n_prompts, n_tokens, counts = np.arange(len(table)), 0, 0, 0, 0.0
    sums = np.zeros((len(table), table.shape[2]))
    per_expert = np.full(sums.shape, np.nan)
    shown: list[dict[str, Any]] = []
    for rung in rungs:
        if shown:
            alive = alive[select_survivors(shown[-1]["losses"], rung.n_candidates)]
        if not len(alive):
            break
        found = evaluator.score_blocks(table[alive], order[n_seen : rung.n_blocks].tolist())
        sums[alive] += found.sums
        counts, n_tokens, n_seen = counts + found.counts, n_tokens + found.n_tokens, rung.n_blocks
        losses, per_expert[alive] = evaluator.combine(sums[alive], counts)
        n_prompts += len(found.prompts)
        shown.append({"prompts": n_prompts, "candidates": alive, "losses": losses})
    told = rank_by_rung(len(table), [(rung["candidates"], rung["losses"]) for rung in shown])
    return Raced(told, per_expert, shown, n_tokens)


def seconds_of(step: Callable[[], object]) -> float:
    """Do a step, and return the seconds that it took."""
    started_s = time.monotonic()
    step()
    return time.monotonic() - started_s


def search_in_kit(run: KitRun) -> Finalist:
    """Search and return the winner: without a search, where the time box has no room for one."""
    measuring_s = seconds_of(lambda: run.box.reserve("later", run.measure_later()))
    hook = run.model.register_forward_pre_hook(lambda *_: run.box.check())
    try:
        search = _KitSearch(run, KitSteering(run), measuring_s)
    except OutOfTime:
        logging.getLogger(__name__).warning("the time box of %g s is too short to search", run.box.limit_s)
        run.trace.event("search_skipped", left_s=run.box.left_s())
        if run.has_prior:
            return Finalist(PRIOR, run.start, True)
        return Finalist(BALANCED, np.broadcast_to(run.balanced, run.start.shape).copy(), True)
    finally:
        hook.remove()
    return search.find_winner()


class _KitSearch:
    """What follows the signals."""

    def __init__(self, run: KitRun, steering: KitSteering, measuring_s: float) -> None:
        """Measure what follows the search, and keep time for it."""
        self._run, self._steering, self._settings = run, steering, run.settings.search
        self._box, self._bounds, self._log = run.box, steering.bounds, logging.getLogger(__name__)
        self._space: Space = run.make_space(steering.bounds.low, steering.bounds.high)
        self._archive = Archive(self._settings.n_finalists)
        self._uniform = next(one.coefficients for one in steering.references if one.name == UNIFORM)
        self._merge_s = MERGE_TIMES * seconds_of(lambda: run.mix(self._uniform))
        self._later_s: float | None = run.box.reserves["later"]  # measured a moment ago
        self._reserves = Reserves(run.box, self._measure_costs, measuring_s)

    def _measure_costs(self) -> EndingCosts:
        steering, steps = self._steering, self._settings.gradient.refine_steps
        later_s = self._run.measure_later() if self._later_s is None else self._later_s
        n_references, n_singles = len(steering.references), len(self._run.stacked.names)
        n_timed = 2 if steps else 0  # the first may allocate
        gradients_s = [seconds_of(lambda: steering.searched.gradient(self._uniform)) for _ in range(n_timed)]
        self._later_s = None
        return EndingCosts(
            candidate_s=seconds_of(lambda: steering.unseen.score(self._uniform[None])),
            n_finalists=n_references + self._settings.n_finalists + 2,  # the mean, and a refined one
            n_few=n_references - n_singles + 3,
            gradient_s=min(gradients_s, default=0.0),
            n_gradients=steps + 1 if steps else 0,
            merge_s=self._merge_s,
            later_s=later_s,
        )

    def find_winner(self) -> Finalist:
        """Search, refine the best and compare it with the merges that need no search."""
        steering, trace = self._steering, self._run.trace
        steering.searched.checkpoint = steering.unseen.checkpoint = partial(self._box.check, OPTIONAL)
        self._log.info("search")
        mean = self._search()
        self._log.info("finalists")
        judgement, prompts = self._judge(mean)
        losses, winner = judgement.losses.tolist(), judgement.winner
        names = [finalist.name for finalist in judgement.finalists]
        facts = {"names": names, "losses": losses, "verdicts": judgement.verdicts, "winner": winner.name}
        facts["agreement"] = [judgement.agreements.get(place) for place in range(len(names))]
        facts |= {"per_expert": judgement.per_expert, "winner_coefficients": winner.coefficients}
        trace.event("finalists", prompts=prompts, **facts)
        uniform = losses[names.index(UNIFORM)]
        found = winner.name, losses[judgement.place], prompts, uniform
        self._log.info("winner: %s, loss %.4f on %s prompts (uniform %.4f)", *found)
        del self._reserves  # it refers back to this: what the experts say would outlive the search
        return winner

    def _search(self) -> FloatArray:
        """Ask, race and tell until evaluations or clock run out; return the mean (n_groups, n_adapters)."""
        run, settings, box = self._run, self._settings, self._box
        start = np.clip(run.start, self._bounds.low, self._bounds.high)
        genome, spread = self._space.encode(start, run.spread)
        n_candidates, seed = settings.n_candidates, settings.seed % 2**32
        n_most = max(1, settings.max_evaluations // n_candidates)
        budget = max(settings.max_evaluations, n_candidates)
        optimizer = BatchOptimizer(genome, spread, n_candidates, budget, seed, settings.optimizer)
        run.trace.event("search", start=start, spread=run.spread, reserves_s=box.reserves)
        recent_s, ended_by = deque([0.0], maxlen=N_LOOKED_BACK), "clock"
        try:
            for generation in range(n_most):
                if generation and not box.fits(CAUTION * max(recent_s)):
                    break
                recent_s.append(seconds_of(partial(self._run_generation, optimizer, generation)))
                self._reserves.see_generation(*self._scored, max(recent_s))
                if 10 * (generation + 1) // n_most > 10 * generation // n_most:  # a tenth
                    done = generation + 1, n_most, self._archive.best_loss(), max(0.0, box.left_s())
                    self._log.info("%d of %d generations, best loss %.4f, %.0f s left", *done)
            else:
                ended_by = "evaluations"
        except OutOfTime:
            pass
        run.trace.event("search_ended", ended_by=ended_by, elapsed_s=box.elapsed_s())
        mean: FloatArray = self._space.to_coefficients(optimizer.mean()[None])[0]
        return mean

    def _run_generation(self, optimizer: BatchOptimizer, index: int) -> None:
        genomes, started_s = optimizer.ask(), self._box.elapsed_s()
        evaluator, settings = self._steering.searched, self._settings
        rungs = plan_race(len(genomes), evaluator.n_blocks, settings.race_keep)
        order = order_blocks(evaluator.n_blocks, settings.seed, index)
        raced = race(evaluator, self._space.to_coefficients(genomes), rungs, order)
        self._scored = self._box.elapsed_s() - started_s, raced.n_tokens
        shown: dict[str, Any] = {"genomes": genomes, "evaluations": (index + 1) * len(genomes)}
        shown |= {name: getattr(raced, name) for name in ("losses", "per_expert", "rungs", "n_tokens")}
        shown |= {"elapsed_s": self._box.elapsed_s(), "seconds": self._scored[0]}
        self._run.trace.write("generation", index=index, **shown)
        full = raced.rungs[-1]["candidates"]
        self._archive.add(genomes[full], raced.losses[full], raced.per_expert[full])
        optimizer.tell(raced.losses)

    def _judge(self, mean: FloatArray) -> tuple[Judgement, str]:
        """Compare on unseen prompts; without time for that, on searched ones, where all is known already."""
        steering, (best, losses, per_expert) = self._steering, self._archived()
        self._reserves.begin_ending()
        try:
            if self._reserves.may_compare():
                candidates = make_candidates(best, mean, self._refine(best))
                finalists = [*steering.references, *candidates]
                finalists = choose_finalists(finalists, self._reserves.n_affordable())
                found = steering.unseen.score(stack_coefficients(finalists))
                scored = found.losses, found.per_expert, self._bounds
                return judge_finalists(finalists, *scored, steering.unseen.agreement), "unseen"
        except OutOfTime:
            pass
        known = steering.known
        candidates = make_candidates(best[:1], mean, None)[:-1]  # but the mean, which nobody has scored
        finalists = [*steering.references[: len(known.losses)], *candidates]
        losses = np.concatenate([known.losses, losses[:1]])
        per_expert = np.concatenate([known.per_expert, per_expert[:1]])
        return judge_finalists(finalists, losses, per_expert, self._bounds), "searched"

    def _archived(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the archive's distinct tables (k, n_groups, n_adapters), losses and losses per expert."""
        n_experts = len(self._run.stacked.names)
        genomes, losses, per_expert = self._archive.contents(self._space.n_params, n_experts)
        tables, best = self._space.to_coefficients(genomes), list[int]()
        for place in range(len(tables)):
            if not (np.abs(tables[best] - tables[place]).max(axis=(1, 2)) < SAME).any():
                best.append(place)
        return tables[best], losses[best], per_expert[best]

    def _refine(self, best: FloatArray) -> FloatArray | None:
        """Descend from the best, back into the space; None where there is no time for one gradient."""
        settings, searched = self._settings.gradient, self._steering.searched

        def go_on() -> bool:
            return settings.refine_steps > 0 and self._reserves.may_refine()

        def gradient_of(coefficients: FloatArray) -> tuple[float, FloatArray]:
            scores = searched.gradient(coefficients)
            return scores.loss, scores.gradient

        if not len(best) or not go_on():
            return None
        descent = adam_descend(
            gradient_of,
            best[0],
            steps=settings.refine_steps + 1,
            learning_rate=settings.learning_rate,
            low=self._bounds.low,
            high=self._bounds.high,
            go_on=go_on,
        )
        self._run.trace.event("refined", losses=descent.losses)
        genome, _ = self._space.encode(descent.best, np.ones(self._space.shape))
        refined: FloatArray = self._space.to_coefficients(genome[None])[0]
        return refined
