"""A search in the competition's kit: one space, no resumption; generations, finalists, a winner in time.

Knows a run's settings as plain values, and the clock; not the kit, files or signals. On equal settings
it finds what `search.phases` finds, which can do more.
"""

import logging
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

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
from search.racing import Race, order_blocks, plan_race
from search.reserves import OPTIONAL, EndingCosts, Reserves
from search.space import FloatArray, Space
from search.stages import SAME, GenomeEvaluator
from search.timebox import OutOfTime


def search_in_kit(run: KitRun) -> Finalist:
    """Search and return the winner: without a search, where the time box has no room for one."""
    started_s = run.box.elapsed_s()
    run.box.reserve("later", run.measure_later())
    measuring_s = run.box.elapsed_s() - started_s
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
        self._merge_s = MERGE_TIMES * run.measure_merge(self._uniform)
        self._later_s: float | None = run.box.reserves["later"]  # measured a moment ago
        self._reserves = Reserves(run.box, self._measure_costs, measuring_s)

    def _measure_costs(self) -> EndingCosts:
        steering, steps = self._steering, self._settings.gradient.refine_steps
        later_s = self._run.measure_later() if self._later_s is None else self._later_s
        n_references, n_singles = len(steering.references), len(self._run.stacked.names)
        n_timed = 2 if steps else 0  # the first may allocate
        gradients_s = [self._time(lambda: steering.searched.gradient(self._uniform)) for _ in range(n_timed)]
        self._later_s = None
        return EndingCosts(
            candidate_s=self._time(lambda: steering.unseen.score(self._uniform[None])),
            n_finalists=n_references + self._settings.n_finalists + 2,  # the mean, and a refined one
            n_few=n_references - n_singles + 3,
            gradient_s=min(gradients_s, default=0.0),
            n_gradients=steps + 1 if steps else 0,
            merge_s=self._merge_s,
            later_s=later_s,
        )

    def _time(self, step: Callable[[], object]) -> float:
        started_s = self._box.elapsed_s()
        step()
        return self._box.elapsed_s() - started_s

    def find_winner(self) -> Finalist:
        """Search, refine the best and compare it with the merges that need no search."""
        steering, trace = self._steering, self._run.trace
        steering.searched.checkpoint = steering.unseen.checkpoint = lambda: self._box.check(OPTIONAL)
        self._log.info("search")
        mean = self._search()
        self._log.info("finalists")
        judgement, prompts = self._judge(mean)
        losses, winner = judgement.losses.tolist(), judgement.winner
        trace.event(
            "finalists",
            prompts=prompts,
            names=[finalist.name for finalist in judgement.finalists],
            losses=losses,
            verdicts=judgement.verdicts,
            winner=winner.name,
            winner_coefficients=winner.coefficients,
        )
        rivals = ", ".join(f"{name} {loss:.4f}" for name, loss in judgement.rivals.items())
        found = winner.name, losses[judgement.place], prompts, rivals
        self._log.info("winner: %s, loss %.4f on %s prompts (%s)", *found)
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
                recent_s.append(self._time(partial(self._run_generation, optimizer, generation)))
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
        race = Race(genomes, GenomeEvaluator(self._space, self._steering.searched))
        n_blocks = self._steering.searched.n_blocks
        rungs = plan_race(len(genomes), n_blocks, self._settings.race_keep)
        race.run(rungs, order_blocks(n_blocks, self._settings.seed, index))
        self._scored = self._box.elapsed_s() - started_s, race.n_tokens
        losses, full = race.losses(), race.rungs[-1]["candidates"]
        self._run.trace.generation(
            index=index,
            genomes=genomes,
            losses=losses,
            per_expert=race.per_expert,
            rungs=race.rungs,
            n_tokens=race.n_tokens,
            elapsed_s=self._box.elapsed_s(),
        )
        self._archive.add(genomes[full], losses[full], race.per_expert[full])
        optimizer.tell(losses)

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
        genomes, losses, per_expert = self._archive.contents(
            self._space.n_params, len(self._run.stacked.names)
        )
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
