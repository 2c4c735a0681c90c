"""The last comparison of a run: on prompts that the search has not seen, or on what is known already.

Knows evaluators, finalists and the trace; not the clock, the optimiser or what becomes of the winner.
"""

import numpy as np

from search.finalists import Judgement, judge_finalists, make_candidates, stack_coefficients
from search.loop import SearchOutcome
from search.steering import Steering
from search.trace import TraceWriter


def estimate_finalists_s(steering: Steering, n_archived: int) -> float:
    """Seconds that `judge_on_unseen` takes at most with an archive of this size."""
    n_candidates = n_archived + 1  # and the distribution's mean
    n_losses = n_candidates + len(steering.references)
    n_agreements = n_candidates + 2  # and the uniform merge, and a reference that wins
    return (n_losses + n_agreements) * steering.unseen_candidate_s


def judge_on_unseen(steering: Steering, outcome: SearchOutcome, trace: TraceWriter) -> Judgement:
    """Compare archive, distribution mean and all references on the unseen prompts."""
    candidates = make_candidates(steering.space, outcome.archive_genomes, outcome.mean_genome)
    finalists = [*steering.references, *candidates]
    scores = steering.unseen.score(stack_coefficients(finalists))
    judgement = judge_finalists(
        finalists, scores.losses, scores.per_expert, steering.space, steering.unseen.agreement
    )
    _record_judgement(judgement, "unseen", trace)
    return judgement


def judge_on_searched(steering: Steering, outcome: SearchOutcome, trace: TraceWriter) -> Judgement:
    """Compare the archive's best, if there is one, with base and uniform merge on the searched prompts.

    Costs one candidate; nobody is asked for agreement.
    """
    known = steering.reference_scores
    finalists = list(steering.references[: len(known.losses)])
    losses, per_expert = known.losses, known.per_expert
    if len(outcome.archive_genomes):
        best = make_candidates(steering.space, outcome.archive_genomes[:1], outcome.mean_genome)[:1]
        scores = steering.searched.score(stack_coefficients(best))
        finalists += best
        losses = np.concatenate([losses, scores.losses])
        per_expert = np.concatenate([per_expert, scores.per_expert])
    judgement = judge_finalists(finalists, losses, per_expert, steering.space)
    _record_judgement(judgement, "searched", trace)
    return judgement


def _record_judgement(judgement: Judgement, prompts: str, trace: TraceWriter) -> None:
    trace.event(
        "finalists",
        prompts=prompts,
        names=[finalist.name for finalist in judgement.finalists],
        losses=judgement.losses,
        per_expert=judgement.per_expert,
        agreement=[judgement.agreements.get(index) for index in range(len(judgement.finalists))],
        verdicts=judgement.verdicts,
        winner=judgement.winner.name,
    )
