"""Whether prompts, what the experts say on them and the winner's loss come out again.

Knows setup, steering and the trace; not files of weights or answers, nor the search.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from search.checks import Check, compare, tell_differences
from search.errors import InputError
from search.finalists import BALANCED, PRIOR
from search.parts import identify_parts
from search.prompts import read_prompts
from search.provenance import library_versions
from search.recorded import TRACE_FILE
from search.resume import Record
from search.setup import Setup
from search.steering import Steering, WrittenPrompts
from search.trace import Trace, TraceWriter
from search.verify_record import RunRecord
from search.verify_search import Terms, check_search, is_near

TOLERANCE, NARROW_TOLERANCE = 1e-4, 0.01
"""Of losses where bits need not come out again; the latter where one side computes in 16 bits. On a CPU and
the embedded zoo other vector instructions moved a loss by 1e-6, float16 by 1e-5, bfloat16 by 2e-4."""
SUMS_TOLERANCE = 1e-6
"""Of a loss whose sums were taken in another order: one of the search's own, raced block by block."""
_COMPARED = {
    "signals": ("peak_kl_nats", "peak_kl_nats_unseen", "entropy_ratio", "weak", "low", "high"),
    "references": ("names", "losses", "per_expert", "base_per_expert"),
}
_COMPARED_NEARLY = {"references": ("names", "losses")}


def set_terms(header: Mapping[str, Any], setup: Setup) -> Terms:
    """Ask for every bit on the same kind of CPU with the same versions, in float32; else for digits."""
    now = {**identify_parts(setup.parts), "versions": library_versions()}
    other = [
        key for key in ("device", "device_name", "dtype", "cpu", "versions") if header.get(key) != now[key]
    ]
    where = f"{now['device']} {now['dtype']}"
    if not other and where == "cpu float32":
        return Terms(0.0, f"bit for bit, {where}")
    is_narrow = {header.get("dtype"), now["dtype"]} & {"bfloat16", "float16"}
    tolerance = NARROW_TOLERANCE if is_narrow else TOLERANCE
    return Terms(tolerance, f"within {tolerance:g}, {f'other {chr(32).join(other)}' if other else where}")


def check_scores(setup: Setup, record: RunRecord, *, refine: bool) -> Iterator[Check]:
    """Write the prompts again where bits repeat, ask the experts, replay the search and score the winner.

    Args:
        refine: take the recorded gradient steps again, too.
    """
    terms = set_terms(record.header, setup)
    if record.finalists is None:
        yield _check_unsearched(setup, record, terms)
        return
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        path = Path(folder) / TRACE_FILE
        with TraceWriter(path) as trace:
            trace.header({})
            try:
                prompts = WrittenPrompts(*read_prompts(record.trace.last("prompts") or {}, setup.parts.names))
            except (InputError, KeyError, ValueError) as error:
                yield Check("prompts", "differs", str(error))
                return
            if terms.is_exact:
                setup.write_prompts(trace, Record())
            yield _check_prompts(record.trace, Trace.load(path), terms)
            past = Record() if terms.is_exact else Record(record.trace)
            steering = setup.steer(prompts, trace, past)
            yield _check_steering(record, Trace.load(path), terms)
            yield from check_search(setup, steering, record, terms, trace, refine=refine)
    yield _check_loss(steering, record, terms)


def _check_unsearched(setup: Setup, record: RunRecord, terms: Terms) -> Check:
    balanced = np.broadcast_to(setup.balanced, setup.parts.shape)
    table = {BALANCED: balanced, PRIOR: setup.first.start}.get(record.merged["winner"])
    differs = table is None or not is_near(record.winner, table, terms)
    return tell_differences(
        "winner again", ["other coefficients"] if differs else [], record.merged["winner"]
    )


def _check_prompts(recorded: Trace, fresh: Trace, terms: Terms) -> Check:
    """Hold prompts, whose hash is the recorded one, against those written again, word for word."""
    before, now = recorded.last("prompts") or {}, fresh.last("prompts")
    n_prompts = len(before["searched"]) + len(before["unseen"])
    if now is None:
        return Check("prompts", "ok", f"{n_prompts}, by hash; not written again ({terms.why})")
    differences = []
    for part in ("searched", "unseen"):
        differences += compare(f"{part} prompts", len(before[part]), len(now[part]))
        for place, (one, other) in enumerate(zip(before[part], now[part], strict=False)):
            keys = [key for key in other if one.get(key) != other[key]]
            differences += [
                text for key in keys[:1] for text in compare(f"{part} {place}", one[key], other[key])
            ]
    return tell_differences("prompts", differences, f"{n_prompts} written again, the same")


def _check_steering(record: RunRecord, fresh: Trace, terms: Terms) -> Check:
    """Hold signals and references against the recorded ones."""
    differences = []
    for name, keys in (_COMPARED if terms.is_exact else _COMPARED_NEARLY).items():
        before, now = record.trace.last(name) or {}, fresh.last(name) or {}
        for key in keys:
            if not is_near(before.get(key), now[key], terms):
                differences += compare(key, before.get(key), now[key])
    names = (fresh.last("references") or {})["names"]
    return tell_differences("references", differences, f"{', '.join(names)}: {terms.why}")


def _check_loss(steering: Steering, record: RunRecord, terms: Terms) -> Check:
    """Score the winner on the prompts on which it won."""
    finalists = record.finalists or {}
    place, is_unseen = finalists["names"].index(finalists["winner"]), finalists["prompts"] == "unseen"
    evaluator = steering.unseen if is_unseen else steering.searched
    if not is_unseen and terms.tolerance < SUMS_TOLERANCE:
        terms = Terms(SUMS_TOLERANCE, f"within {SUMS_TOLERANCE:g}, summed in another order")
    scores = evaluator.score(record.winner[None])
    found = {"loss": float(scores.losses[0]), "per_expert": scores.per_expert[0].tolist()}
    recorded = {"loss": finalists["losses"][place], "per_expert": finalists["per_expert"][place]}
    if finalists["agreement"][place] is not None:
        recorded["agreement"] = finalists["agreement"][place]
        found["agreement"] = evaluator.agreement(record.winner).tolist()
    keys = recorded if terms.is_exact else ("loss",)
    wrong = [key for key in keys if not is_near(recorded[key], found[key], terms)]
    differences = [text for key in wrong for text in compare(key, recorded[key], found[key])]
    fine = (
        f"{found['loss']:.6g} on {finalists['prompts']} prompts, recorded {recorded['loss']:.6g}: {terms.why}"
    )
    return tell_differences("loss", differences, fine)
