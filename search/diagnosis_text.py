"""Show what a dry run found: aligned text for people, and a document for the last line on stdout.

Knows the facts and how to lay them out; not where they are from. Plain text, no tables of a library.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from search.diagnosis import GIB, BatchFacts, Diagnosis, MemoryPlan, advise
from search.summary import ENDINGS
from search.trust import SURE


def describe_diagnosis(found: Diagnosis) -> str:
    """Return all of it for people, without a last line end; what to change comes last."""
    advice = advise(found)
    parts = (
        _describe_parts(found),
        _show_adapters(found),
        _show_stages(found),
        _show_times(found),
        _show_memory(found.memory.plan),
        [f"the search: {_foretell(found)}"],
        [f"- {line}." for line in advice] or ["It fits; nothing to change."],
    )
    return "\n\n".join("\n".join(lines) for lines in parts)


def diagnosis_document(found: Diagnosis) -> dict[str, Any]:
    """Return all of it for machines: what `json.dumps` takes, numbers that are not finite as null."""
    document = {
        **asdict(found),
        "tokens_per_candidate": found.prompts.tokens_per_candidate,
        "search_s": found.times.search_s,
        "advice": advise(found),
    }
    finite: dict[str, Any] = _without_nan(document)
    return finite


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe_parts(found: Diagnosis) -> list[str]:
    base, prompts, memory = found.base, found.prompts, found.memory
    device = base.device_name or base.device
    at_peak = f"{memory.peak_bytes / 1e9:.1f} GB at peak with few prompts"
    rows = [
        ("base", f"{base.id}: {base.n_parameters / 1e6:,.1f} million parameters, {base.dtype} on {device}"),
        (
            "memory",
            f"{at_peak}, about {memory.expected_bytes / 1e9:.1f} GB with all, of "
            f"{memory.available_bytes / 1e9:.1f} GB",
        ),
        ("prior", _describe_known(found)),
        (
            "prompts",
            f"{prompts.searched} searched and {prompts.unseen} unseen, of each of the adapters",
        ),
        (
            "tokens",
            f"{prompts.tokens_per_prompt:.0f} a prompt, so {prompts.tokens_per_candidate:,.0f} a candidate",
        ),
    ]
    return _align(rows)


def _describe_known(found: Diagnosis) -> str:
    if found.prior is None:
        return "none"
    missing = ", ".join(found.prior.missing) or "none"
    n_known = len(found.adapters) - len(found.prior.missing)
    return f"{found.prior.source}: knows {n_known} of {len(found.adapters)} adapters; missing: {missing}"


def _show_adapters(found: Diagnosis) -> list[str]:
    rows = [("adapter", "rank", "scaling", "modules", "sha256", "skeletons", "peak KL", "entropy", "")]
    for adapter in found.adapters:
        rows.append(
            (
                adapter.name,
                _range(adapter.ranks),
                _range(adapter.scalings),
                str(adapter.n_modules),
                adapter.sha256[:8],
                "yes" if adapter.has_skeletons else "no",
                f"{adapter.peak_kl_nats:.2f}",
                f"{adapter.entropy_ratio:.2f}",
                f"weak: {adapter.weak_reason}" if adapter.is_weak else "",
            )
        )
    return [
        *_align(rows),
        *(f"left out, coefficient 0: {name}: {reason}" for name, reason in found.left_out.items()),
        f"peak KL: most that expert and base differ in nats, mean of {found.prompts.tried_searched} prompts; "
        f"weak below {found.weak_signal_nats:g}. entropy: the expert's over the base's; weak above {SURE:g}. "
        f"The run measures again, on {found.prompts.searched}.",
    ]


def _range(ends: tuple[float, float]) -> str:
    low, high = (f"{end:.3g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _show_stages(found: Diagnosis) -> list[str]:
    rows = [("stage", "groups", "genome", "parameters", "optimiser")]
    for index, stage in enumerate(found.stages):
        rows.append((str(index), stage.groups, stage.genome, str(stage.n_params), stage.optimizer))
    return [
        *_align(rows),
        f"{len(found.groups)} groups of modules by {len(found.adapters)} adapters: coefficients of one merge",
    ]


def _show_times(found: Diagnosis) -> list[str]:
    times, seconds = found.times, found.forecast.seconds
    raced = f"raced, {found.race_keep:g} go on" if found.race_keep else "not raced"
    phases = (
        ("before and after the run", times.caller_s, ""),
        ("load", times.load_s, "measured"),
        ("prompts", times.prompts_s, ""),
        ("signals", times.signals_s, ""),
        ("rehearsal", times.rehearsal_s, "measured"),
        ("search", seconds, f"of {max(0.0, times.search_s):.1f} s left for it"),
        ("finalists", times.finalists_s, "at most"),
        ("merge", times.merge_s, ""),
        ("all, of the time box", sum(_all_seconds(found)), f"of {times.time_box_s:g} s"),
    )
    shown = [(name, f"{spent:.1f}", note) for name, spent, note in phases if spent or name != phases[0][0]]
    steps = [
        ("one candidate", f"{found.candidate_s:.3g}", "alone, on all searched prompts"),
        ("one generation", f"{times.generation_s:.3g}", f"{found.plan.n_candidates} candidates, {raced}"),
    ]
    if found.gradient_s is not None:
        steps.append(("one gradient step", f"{found.gradient_s:.3g}", "on all searched prompts"))
    return _align([("phase", "seconds", "estimated, where not measured"), *shown, *steps])


def _show_memory(plan: MemoryPlan) -> list[str]:
    how = "measured" if plan.is_measured else "estimated from the model's shape"
    rows = [
        ("memory", "GiB", f"forwards are {how}"),
        ("base", *_in_gib(plan.base_bytes, "held throughout")),
        ("all adapters", *_in_gib(plan.adapters_bytes, "until the merge")),
        ("experts' signals", *_in_gib(plan.signals_bytes, "for all prompts, until the merge")),
        ("one batch of prompts", *_in_batch(plan.prompts)),
        ("one scoring forward", *_in_batch(plan.scoring)),
        *([("one gradient", *_in_batch(plan.gradient))] if plan.gradient else []),
        ("one batch of answers", *_in_batch(plan.answers)),
        ("one batch of choices", *_in_batch(plan.choices)),
        ("at most", *_in_gib(plan.needed_bytes, f"of {plan.usable_bytes / GIB:.1f} that can be used")),
    ]
    return _align(rows)


def _in_gib(n_bytes: int, note: str) -> tuple[str, str]:
    return f"{n_bytes / GIB:.3g}", note


def _in_batch(batch: BatchFacts) -> tuple[str, str]:
    return _in_gib(batch.n_bytes, f"{batch.tokens:,} tokens at a time")


def _all_seconds(found: Diagnosis) -> Sequence[float]:
    times = found.times
    before = (times.caller_s, times.load_s, times.prompts_s, times.signals_s, times.rehearsal_s)
    return (*before, found.forecast.seconds, times.finalists_s, times.merge_s)


def _foretell(found: Diagnosis) -> str:
    forecast = found.forecast
    ending = ENDINGS[forecast.ended_by]
    repeat = ": then it cannot be repeated exactly" if forecast.ended_by == "clock" else ""
    return (
        f"about {_count(forecast.generations)}, {forecast.evaluations} evaluations of at most "
        f"{found.plan.max_evaluations}, ended by {ending}{repeat}"
    )


def _count(n_generations: int) -> str:
    return "one generation" if n_generations == 1 else f"{n_generations} generations"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad every column but the last to its widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
