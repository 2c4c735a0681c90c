"""Small cases of the fidelity benchmark: the shipped zoo as a scene, and lines as if measured."""

from functools import cache
from itertools import product
from pathlib import Path

from benchmarks.fidelity_rows import COLUMNS, DEFAULT, WEIGHTS
from benchmarks.fidelity_scene import SOURCES, Scene
from benchmarks.fidelity_statistics import COMBINES, WHERE
from benchmarks.zoo.sets import write_config
from search.objective import OBJECTIVES

ROOT = Path(__file__).parents[1]
KINDS = ("visited", "uniform", "balanced")


@cache
def shipped_scene(parent: Path) -> Scene:
    """Return the variant as shipped, on one query a task; tests share it, in a folder of `parent`."""
    folder = parent / "fidelity"
    write_config(folder / "mixed.yaml", "mixed", generated=folder, template=ROOT / "configs/demo.yaml")
    return Scene("mixed", folder / "mixed.yaml", folder, "cpu", 1)


def ranking_rows(experts="mixed", rho=0.9, n_merges=600):
    """Return all lines of a variant's merges; every rank correlation is `rho`, its interval 0.05 wide."""
    rows = []
    for source in SOURCES:
        positions = ("answer", "all") if source in ("skeleton", "task") else ("all",)
        numbers = [rho, rho - 0.02, rho + 0.03] * len(WHERE)
        entries = [[*names, *numbers] for names in product(OBJECTIVES, COMBINES, positions)]
        curve = {
            "prompts": [1, 2, 4],
            "tokens": [400, 800, 1_600],
            **{name: [0.5, 0.7, rho] for name in WHERE},
        }
        shared = {"benchmark": "fidelity", "experts": experts, "source": source, "n_merges": n_merges}
        by_kind = {name: {kind: [rho, None] for kind in KINDS} for name in OBJECTIVES}
        ranking = {"columns": list(COLUMNS), "entries": entries, "by_kind": by_kind}
        rows += [
            {**shared, "part": "ranking", **ranking},
            {**shared, "part": "prompts_needed", "curve": curve},
        ]
    shared["source"] = "skeleton"
    curves = {term: {w: [rho] * len(WEIGHTS) for w in WHERE} for term in ("retention", "pull", "smooth")}
    check = {"prompts": 8, "n_pairs": 6_000, "holds": 0.9, "holds_within_error": 0.99, "worst_excess": 0.3}
    worst = {"worst_kind": "sparse", "worst_expert": "code"}
    own = {name: [0.0, 0.6] for name in ("loss", "held_in", "held_out")}
    return [
        *rows,
        {**shared, "part": "terms", "weights": list(WEIGHTS), "curves": curves},
        {**shared, "part": "bound", "checks": [{**check, **worst}]},
        {**shared, "part": "points", "points": dict.fromkeys(KINDS, own)},
    ]


def search_row(experts="mixed", objective=DEFAULT.name, space="layer", seed=0, **more):
    """Return the line of one search that climbs to 96 % and ends at 95 %."""
    terms = {"retention": 0.0, "pull": 0.0, "smooth": 0.0}
    curve = {
        "evaluations": [0, 160, 1_600, 10_000],
        "loss": [0.4, 0.3, 0.2, 0.1],
        "held_in_N": [0.5, 0.8, 0.96, 0.95],
        "worst_task": [0.0, 0.4, 0.8, 0.8],
        "held_out": [0.5, 0.6, 0.7, 0.65],
        "mean_abs": [0.3, 0.3, 0.3, 0.3],
    }
    plan = {"experts": experts, "objective": objective, "space": space, "seed": seed, "evaluations": 10_000}
    end = {"ended_by": "evaluations", "seconds": 100.0, "curve": curve}
    return {"benchmark": "fidelity", "part": "search", **plan, **terms, **end, **more}
