"""Traces built in memory for the tests of tables, figures and report: one that hands can check, and odd ones.

The tiny run has adapters "a" and "b", three groups and four searched prompts. Stage 0 has a coefficient for
each adapter and one generation, stage 1 has one for each adapter and group and two generations. Each
generation has three candidates, of which two go on from two prompts to all four.
"""

from typing import Any

import numpy as np

from search.trace import Generation, Trace

NAMES = "a", "b"
GROUPS = "layer.0", "layer.1", "layer.2"


def tiny_trace() -> Trace:
    """The whole run, ended by its evaluation limit after 30 seconds."""
    return Trace(make_header(NAMES, GROUPS), tiny_generations(), [*beginning(NAMES, GROUPS), *tiny_end()])


def make_header(names: Any, groups: Any) -> dict[str, Any]:
    """A header as a run writes it, less what the tables do not read."""
    return {
        "kind": "header",
        "config": {"objective": {"name": "entropy_excess", "combine": "mean_sqrt"}},
        "objective": "entropy_excess",
        "seed": 7,
        "base": {"id": "toy"},
        "adapters": [{"name": name} for name in names],
        "groups": list(groups),
        "device": "cpu",
        "device_name": None,
    }


def make_event(name: str, **content: Any) -> dict[str, Any]:
    """An event as `Trace.load` gives it."""
    return {"kind": "event", "event": name, **content}


def beginning(names: Any, groups: Any) -> list[dict[str, Any]]:
    """Events before the first generation, and those of stages 0 and 1.

    Four prompts; the uniform merge is at 0.8, the balanced one at 0.7.
    """
    start = np.full((len(groups), len(names)), 0.3).tolist()
    prompts = [
        {
            "expert": names[number % len(names)],
            "text": f"prompt <{number}> at $5",
            "scored": list(range(number + 1)),
        }
        for number in range(4)
    ]
    return [
        make_event("prompts", searched=prompts, unseen=[], seconds=2.0),
        make_event("signals", peak_kl_nats=[1.5] * len(names), weak=[names[-1]], seconds=1.0),
        make_event(
            "references",
            names=["base", "uniform", "balanced"],
            losses=[1.0, 0.8, 0.7],
            per_expert=[[share] * len(names) for share in (1.0, 0.8, 0.7)],
            seconds=0.5,
        ),
        make_event("search", start=start, spread=start, prior=None),
        make_event("stage", index=0, space={"groups": "model", "genome": "full"}, n_params=len(names)),
        make_event("stage", index=1, space={"groups": "layer", "genome": "profile"}, n_params=6),
    ]


def tiny_generations() -> list[Generation]:
    """Three generations; the first candidate of the second could not be scored on all prompts."""
    return [
        make_generation(0, 0, [[0.0, 0.0], [3.0, 0.0], [0.0, 6.0]], [0.9, 0.5, 0.7], [0.6, 0.65]),
        make_generation(1, 1, np.arange(18.0).reshape(3, 6), [0.8, 0.3, 0.4], [None, 0.62]),
        make_generation(2, 1, np.ones((3, 6)), [0.8, 0.2, 0.4], [0.5, 0.55]),
    ]


def make_generation(index: int, stage: int, genomes: Any, early: Any, late: Any) -> Generation:
    """A race of three candidates, of which numbers 1 and 2 go on; 10 seconds and 100 tokens a generation."""
    losses = np.array([max(x for x in [*early, *late] if x is not None), *late], dtype=float)
    return Generation(
        index=index,
        stage=stage,
        genomes=np.array(genomes, dtype=float),
        losses=losses,
        per_expert=np.array([[0.9, 0.9], [0.1 + index, 0.2], [0.3, 0.4]]),
        evaluations=3 * (index + 1),
        n_tokens=100,
        elapsed_s=10.0 * (index + 1) - 3,
        seconds=5.0,
        rungs=[
            {"prompts": 2, "candidates": [0, 1, 2], "losses": early},
            {"prompts": 4, "candidates": [1, 2], "losses": late},
        ],
        prompt_spread=np.array([0.1 * index, 0.5, np.nan, 0.3 if index else np.nan]),
    )


def tiny_end() -> list[dict[str, Any]]:
    """Events after the last generation: "archive 1" wins on unseen prompts."""
    coefficients = np.arange(6.0).reshape(3, 2).tolist()
    return [
        make_event("search_ended", ended_by="evaluations", generations=3, mean=coefficients, elapsed_s=27.0),
        make_event(
            "finalists",
            prompts="unseen",
            names=["base", "uniform", "balanced", "expert a", "expert b", "archive 1", "mean"],
            losses=[1.0, 0.85, 0.8, 0.75, 0.7, 0.6, None],
            per_expert=[[1, 1], [0.5, 0.9], [0.4, 0.8], [0, 1.2], [1.1, 0], [0.6, 0.2], [None, 0.3]],
            agreement=[None, [0.5, 0.0], None, None, None, [1.0, 0.5], None],
            verdicts=[*["beaten"] * 5, "winner", "not finite"],
            winner="archive 1",
            winner_coefficients=coefficients,
            seconds=1.5,
        ),
        make_event("merged", winner="archive 1", ended_by="evaluations", elapsed_s=30.0, seconds=0.5),
    ]


def odd_traces() -> dict[str, Trace]:
    """Runs that lack something, or have much of it, by what is odd about them."""
    tiny = tiny_trace()
    header, generations, start = tiny.header, tiny.generations, beginning(NAMES, GROUPS)
    return {
        "whole": tiny,
        "only a header": Trace(header, [], []),
        "no generation": Trace(header, [], start),
        "one generation, unfinished": Trace(header, generations[:1], start),
        "resumed and unfinished": Trace(header, [*generations, make_plain(3, 6)], [*start, *tiny_end()]),
        "no race": Trace(header, [make_plain(index, 2) for index in range(2)], start),
        "no finite loss": Trace(header, [make_plain(0, 2, loss=np.nan)], start),
        "one adapter": Trace(
            make_header(["only"], GROUPS), [make_plain(0, 1, n_experts=1)], beginning(["only"], GROUPS)
        ),
        "wide": make_wide(27, 32),
        "$strange_name$": tiny,
    }


def make_plain(index: int, n_params: int, loss: float = 0.4, n_experts: int = 2) -> Generation:
    """A generation of four candidates without race and without spread of prompts."""
    return Generation(
        index=index,
        genomes=np.random.default_rng(index).normal(size=(4, n_params)),
        losses=np.full(4, loss),
        per_expert=np.full((4, n_experts), loss),
        evaluations=4 * (index + 1),
        n_tokens=50,
        elapsed_s=10.0 * (index + 1),
        seconds=4.0,
        stage=0 if n_params < 6 else 1,
    )


def make_wide(n_adapters: int, n_groups: int) -> Trace:
    """A finished run over many adapters and groups, with long names; older than the balanced merge."""
    names = [f"adapter_of_a_long_name_{number}" for number in range(n_adapters)]
    groups = [f"model.layers.{number}.self_attn" for number in range(n_groups)]
    table = np.random.default_rng(0).normal(size=(n_groups, n_adapters)).tolist()
    plain = make_plain(0, n_adapters * n_groups, n_experts=n_adapters)
    finalists = [*["base", "uniform"], *[f"expert {name}" for name in names], "mean"]
    end = make_event(
        "finalists",
        prompts="unseen",
        names=finalists,
        losses=np.linspace(1, 0.1, len(finalists)).tolist(),
        per_expert=np.ones((len(finalists), n_adapters)).tolist(),
        agreement=[None] * len(finalists),
        verdicts=["beaten"] * (len(finalists) - 1) + ["winner"],
        winner="mean",
        winner_coefficients=table,
    )
    return Trace(make_header(names, groups), [plain], [*beginning(names, groups), end])
