"""Turn a trace into tables: what was scored, what it cost, what was found, what tells candidates apart.

Knows the trace's schema (docs/TRACE.md) and pandas; not figures or files. A trace that ended early gives the
rows that it has. Losses on searched and on unseen prompts never share a column without saying which.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.trace import Generation, Trace


def tabulate(table: Callable[[Trace], pd.DataFrame], traces: Mapping[str, Trace]) -> pd.DataFrame:
    """Stack one table of several runs, the first level of the index being the run's label."""
    return pd.concat({label: table(trace) for label, trace in traces.items()}, names=["run"])


def run_table(trace: Trace) -> pd.DataFrame:
    """Return one row on the whole run.

    Columns: `base`, `adapters` and `groups` (counts), `objective`, `seed`, `device`; `generations`,
    `evaluations` (candidates), `n_tokens` (tokens), `elapsed_s` (seconds), `ended_by`; `winner`, its `loss`
    and the `prompts` that it is on. None or NaN where the run did not come so far.
    """
    header, finalists = trace.header, ending_event(trace, "finalists")
    settings = header.get("config", {}).get("objective", {})
    objective = header.get("objective") or settings.get("name")
    row = {
        "base": header.get("base", {}).get("id"),
        "adapters": len(expert_names(trace)),
        "groups": len(header.get("groups", [])),
        "objective": ", ".join(str(part) for part in (objective, settings.get("combine")) if part),
        "seed": header.get("seed"),
        "device": header.get("device_name") or header.get("device"),
        "generations": len(trace.generations),
        "evaluations": trace.generations[-1].evaluations if trace.generations else 0,
        "n_tokens": sum(generation.n_tokens for generation in trace.generations),
        "elapsed_s": elapsed_s(trace),
        "ended_by": (ending_event(trace, "search_ended") | ending_event(trace, "merged")).get("ended_by"),
        "winner": finalists.get("winner"),
        "loss": finalist_table(trace)["loss"].get(finalists.get("winner"), np.nan),
        "prompts": finalists.get("prompts"),
    }
    return pd.DataFrame([row])


def candidate_table(trace: Trace) -> pd.DataFrame:
    """Return a row for each candidate and rung of the race that it was in.

    Columns: `generation`, `stage`, `candidate` (in the order asked), `rung` (from 0), `prompts` (scored on by
    then), `on_all` (the last rung: all searched prompts), `loss` (on these prompts; NaN where not finite),
    `elapsed_s` (seconds) and `n_tokens` (tokens of all generations so far), both at the generation's end.
    """
    columns = [
        "generation",
        "stage",
        "candidate",
        "rung",
        "prompts",
        "on_all",
        "loss",
        "elapsed_s",
        "n_tokens",
    ]
    n_tokens = np.cumsum([generation.n_tokens for generation in trace.generations])
    rows = [
        (
            g.index,
            g.stage,
            candidate,
            rung,
            entry["prompts"],
            rung == len(g.rungs) - 1,
            loss,
            g.elapsed_s,
            total,
        )
        for g, total in zip(trace.generations, n_tokens.tolist(), strict=True)
        for rung, entry in enumerate(g.rungs)
        for candidate, loss in zip(entry["candidates"], _rung_losses(g, entry), strict=True)
    ]
    return pd.DataFrame(rows, columns=columns).astype({"loss": float, "on_all": bool})


def generation_table(trace: Trace) -> pd.DataFrame:
    """Return a row for each generation, by its index.

    Columns: `stage`, `evaluations` (candidates so far), `n_tokens` (tokens so far), `elapsed_s` (seconds of
    the time box), `seconds` (of this generation), `on_all` (candidates scored on all prompts), `loss`
    (their smallest), `best_loss` (smallest so far, over stages too) and `peak_bytes` (bytes). Candidates
    that were dropped by the race have no say in the losses.
    """
    candidates = candidate_table(trace)
    complete = candidates[candidates["on_all"]].groupby("generation")["loss"]
    rows = [
        (g.index, g.stage, g.evaluations, g.n_tokens, g.elapsed_s, g.seconds, g.peak_bytes)
        for g in trace.generations
    ]
    names = ["generation", "stage", "evaluations", "n_tokens", "elapsed_s", "seconds", "peak_bytes"]
    table = pd.DataFrame(rows, columns=names).astype({"elapsed_s": float, "seconds": float})
    table = table.set_index("generation").assign(n_tokens=table["n_tokens"].cumsum().to_numpy())
    table["on_all"] = complete.size().reindex(table.index, fill_value=0)
    table["loss"] = complete.min().reindex(table.index)
    table["best_loss"] = table["loss"].cummin().ffill()
    return table


def reference_table(trace: Trace) -> pd.DataFrame:
    """Return the losses on the searched prompts of what needs no search: base, uniform, balanced, prior.

    Column: `loss`. Empty where the run was ended before they were scored.
    """
    event = trace.last("references") or {"names": [], "losses": []}
    names = pd.Index(event["names"], name="name")
    return pd.DataFrame({"loss": _floats(event["losses"])}, index=names)


def finalist_table(trace: Trace) -> pd.DataFrame:
    """Return the last comparison, by the finalist's name, smallest loss first.

    Columns: `kind` ("reference", "expert" or "candidate"), `loss` on `prompts` ("unseen" or "searched"),
    `worst` (the largest disagreement with one expert over the base's), `agreement` (share of prompts with
    the expert's own answer, mean over experts; NaN where nobody asked) and `verdict`. Empty where the run
    did not come so far.
    """
    event = ending_event(trace, "finalists") or {
        "names": [],
        "losses": [],
        "per_expert": [],
        "verdicts": [],
        "agreement": [],
    }
    agreements = [
        np.nan if shares is None else float(np.mean(_floats(shares))) for shares in event["agreement"]
    ]
    worst = [float(np.max(_floats(row), initial=-np.inf)) for row in event["per_expert"]]
    table = pd.DataFrame(
        {
            "kind": [_kind_of_finalist(name) for name in event["names"]],
            "loss": _floats(event["losses"]),
            "prompts": event.get("prompts"),
            "worst": np.array(worst, dtype=float),
            "agreement": np.array(agreements, dtype=float),
            "verdict": event["verdicts"],
        },
        index=pd.Index(event["names"], name="name"),
    )
    return table.sort_values("loss", kind="stable")


def expert_table(trace: Trace) -> pd.DataFrame:
    """Return each expert's disagreement over the base's, before and after: 0 is the expert, 1 the base.

    Index: the expert. Columns: those that are known of `base`, `uniform`, `balanced`, `prior` and `winner`
    (`best so far` where there are no finalists), all on the same `prompts` ("unseen" or "searched");
    `peak_kl_nats` (nats, how much the expert's prompts tell it from the base) and `weak` (whether that is
    too little to search by).
    """
    experts = expert_names(trace)
    event = ending_event(trace, "finalists") or trace.last("references") or {"names": [], "per_expert": []}
    rows = dict(zip(event["names"], event["per_expert"], strict=True))
    shown = {name: rows[name] for name in ("base", "uniform", "balanced", "prior") if name in rows}
    if winner := event.get("winner"):
        shown["winner"] = rows[winner]
    elif (best := best_candidate(trace)) is not None:
        shown["best so far"] = best[0].per_expert[best[1]]
    table = pd.DataFrame(
        {name: _floats(row) for name, row in shown.items()},
        index=pd.Index(experts, name="expert"),
    )
    table["prompts"] = event.get("prompts", "searched")
    signals = trace.last("signals") or {}
    table["peak_kl_nats"] = _floats(signals.get("peak_kl_nats", [np.nan] * len(experts)))
    table["weak"] = [name in signals.get("weak", ()) for name in experts]
    return table


def coefficient_table(trace: Trace) -> pd.DataFrame:
    """Return coefficients at the beginning and at the end, a column for each adapter.

    Index: (`point`, `group`). The points that are known of `prior` (`start` where the run had none: the first
    coefficients) and `winner` (`mean` where there is none: the centre of the search's last distribution).
    """
    search, ended = trace.last("search") or {}, ending_event(trace, "search_ended")
    winner = ending_event(trace, "finalists").get("winner_coefficients")
    points = {
        "prior" if search.get("prior") else "start": search.get("start"),
        "mean" if winner is None else "winner": ended.get("mean") if winner is None else winner,
    }
    groups, names = trace.header.get("groups", []), expert_names(trace)
    tables = {
        point: pd.DataFrame(
            _floats(rows).reshape(len(groups), len(names)),
            index=pd.Index(groups),
            columns=names,
        )
        for point, rows in points.items()
        if rows is not None
    }
    if not tables:
        empty = pd.MultiIndex.from_arrays([[], []], names=["point", "group"])
        return pd.DataFrame(index=empty, columns=names, dtype=float)
    return pd.concat(tables, names=["point", "group"])


def time_table(trace: Trace) -> pd.DataFrame:
    """Return where the wall time went, by phase, in the order of the run.

    Columns: `seconds` and `share` (of the run so far). `load and the rest` is what no other phase accounts
    for: loading, the rehearsal of the merge, telling the optimiser and writing the trace. Gradient steps that
    were injected into the population count for their stage; the trace does not tell them apart.
    """
    phases = {name: (trace.last(name) or {}).get("seconds") for name in ("prompts", "signals", "references")}
    for stage in sorted({generation.stage for generation in trace.generations}):
        phases[stage_title(trace, stage)] = sum(g.seconds for g in trace.generations if g.stage == stage)
    for name, phase in (("refined", "gradient steps"), ("finalists", "finalists"), ("merged", "merge")):
        phases[phase] = ending_event(trace, name).get("seconds")
    known = {phase: seconds for phase, seconds in phases.items() if seconds is not None}
    known["load and the rest"] = max(elapsed_s(trace) - sum(known.values()), 0.0)
    table = pd.DataFrame({"seconds": known}, dtype=float).rename_axis("phase")
    return table.assign(share=table["seconds"] / max(table["seconds"].sum(), 1e-9))


def prompt_table(trace: Trace) -> pd.DataFrame:
    """Return which searched prompts separate candidates most, largest spread first, by the prompt's number.

    Columns: `expert` that answered it, `spread` (standard deviation over candidates of its mean
    disagreement, in the objective's unit, averaged over generations; NaN where never two were scored on
    it), `generations` (that know it), `n_scored` (tokens that count) and `text`. In a race a prompt of the
    first block has the spread of all candidates, one of later blocks that of those still in the race.
    """
    prompts = (trace.last("prompts") or {}).get("searched", [])
    spreads = pd.DataFrame([g.prompt_spread for g in trace.generations if len(g.prompt_spread)], dtype=float)
    index = pd.RangeIndex(len(prompts) or spreads.shape[1], name="prompt")
    columns = {
        "expert": [prompt["expert"] for prompt in prompts] or "unknown",
        "spread": spreads.mean().reindex(index).astype(float),
        "generations": spreads.count().reindex(index, fill_value=0),
        "n_scored": [len(prompt["scored"]) for prompt in prompts] or None,
        "text": [prompt["text"] for prompt in prompts] or None,
    }
    return pd.DataFrame(columns, index=index).sort_values("spread", ascending=False, kind="stable")


def ending_event(trace: Trace, name: str) -> dict[str, Any]:
    """Return the event of the run's end that stands (`Trace.ending`), empty where there is none."""
    return trace.ending(name) or {}


def expert_names(trace: Trace) -> list[str]:
    """Return the adapters' names (n_adapters)."""
    return [adapter["name"] for adapter in trace.header.get("adapters", [])]


def stage_title(trace: Trace, stage: int) -> str:
    """Say which stage it is and what one coefficient of it covers, as far as the trace tells."""
    events = [event for event in trace.events if event["event"] == "stage" and event["index"] == stage]
    space = events[-1].get("space", {}) if events else {}
    kind = "" if space.get("genome", "full") == "full" else f"{space['genome']} "
    return f"stage {stage}, {kind}per {space['groups']}" if space else f"stage {stage}"


def best_candidate(trace: Trace) -> tuple[Generation, int] | None:
    """Return generation and number of the smallest loss on all prompts, None without a finite one."""
    candidates = candidate_table(trace)
    losses = candidates.loc[candidates["on_all"], "loss"].dropna()
    if losses.empty:
        return None
    best = candidates.loc[losses.idxmin()]
    return trace.generations[int(best["generation"])], int(best["candidate"])


def elapsed_s(trace: Trace) -> float:
    """Return the seconds of the time box that had gone at the last clock in the trace."""
    clocks = [event["elapsed_s"] for event in trace.events if "elapsed_s" in event]
    clocks += [generation.elapsed_s for generation in trace.generations[-1:]]
    return max(clocks, default=0.0)


def _rung_losses(generation: Generation, rung: Mapping[str, Any]) -> list[float]:
    """Return a rung's losses; a trace without them has one rung, whose losses are the generation's."""
    losses = _floats(rung["losses"]) if "losses" in rung else generation.losses[rung["candidates"]]
    return [float(loss) for loss in losses]


def _kind_of_finalist(name: str) -> str:
    if name in ("base", "uniform", "balanced", "prior"):
        return "reference"
    return "expert" if name.startswith("expert ") else "candidate"


def _floats(values: Any) -> NDArray[np.float64]:
    """Return an array with NaN for null, as events come from the file unconverted."""
    return np.array(values, dtype=np.float64)
