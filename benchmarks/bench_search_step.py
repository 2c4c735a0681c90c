"""What does a search pay for a scored candidate, for the objective and for a gradient?

`python -m benchmarks.bench_search_step` builds the model and adapters of `bench_population_forward`, two
prompts of random tokens an adapter, and scores candidates as a search does: packed rows, scored positions
alone, losses. Timed in turn with it are the base's bare forward pass and one candidate after another by a
dense merge, LoraHub's sums and PEFT, each with the same objective, whose sums are checked equal where the
function is the same. Then the objective by itself, what the experts' signals take, and the gradient of all
coefficients in forward passes and GiB. `--tiny` takes seconds on a CPU. Prints the parts and appends one
line of JSON to benchmarks/results.jsonl.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_population_forward import ForwardScene, merged_ways, run
from benchmarks.speed_rivals import DenseMerge, PeftWays
from benchmarks.speed_scene import MISTRAL_7B, TINY, Sizes, draw_prompts
from benchmarks.timing import peak_gib, time_interleaved
from search.evaluate import PopulationEvaluator, Scoring
from search.experts import TokenBudget, expert_signals, scored_logits
from search.objective import sum_by_index
from search.passes import Passes

OBJECTIVE = "entropy_excess"
PROMPTS_PER_ADAPTER = 2


class StepScene:
    """A search's evaluator on a scene's model, and the rivals on the same prompts."""

    def __init__(self, sizes: Sizes, device: torch.device, *, compiled: bool) -> None:
        """Write prompts, take signals, score the base."""
        self.forward = ForwardScene(sizes, device, compiled=compiled)
        model, stacked, groups = self.forward.model, self.forward.stacked, self.forward.groups
        self.prompts = draw_prompts(sizes, PROMPTS_PER_ADAPTER * sizes.n_adapters)
        budget = TokenBudget(sizes.tokens_per_forward)
        case = model, stacked, groups, self.prompts
        self.signals = expert_signals(*case, budget)
        scoring = Scoring(objective=OBJECTIVE, compiled=compiled, tokens_per_forward=sizes.tokens_per_forward)
        self.evaluator = PopulationEvaluator(*case, self.signals, scoring, budget)
        self.evaluator._folds = False  # what is measured here is the population, on a CPU too
        self.passes = Passes(*case, self.signals, compiled=compiled)
        self.rows = list(range(self.prompts.n_prompts))
        self.table = self.forward.coefficients(3 * sizes.tokens_per_forward // self.prompts.n_tokens + 1)

    @property
    def rows_per_pass(self) -> int:
        """Rows of one full forward pass."""
        return self.forward.rows_of(self.forward.sizes.tokens_per_forward)

    @torch.no_grad()
    def score_merged(self, merged: Callable[[], AbstractContextManager[None]], *, eager: bool) -> Tensor:
        """Return the objective's sum on each expert's prompts (n_experts,) for one merge by another way."""
        with merged():
            if eager:
                logits = scored_logits(self.forward.model, self.prompts, self.rows)
            else:
                with self.forward.active():
                    logits = scored_logits(self.forward.model, self.prompts, self.rows)
        sums = self.passes.sums(OBJECTIVE, logits, self.rows)
        return sum_by_index(sums, torch.from_numpy(self.prompts.expert), self.prompts.n_experts)

    def score_population(self) -> Tensor:
        """Return the sums of the table's candidates, (n_candidates, n_experts)."""
        scored = self.evaluator.score_blocks(self.table.numpy(), range(self.evaluator.n_blocks))
        return torch.from_numpy(scored.sums)


def check_and_time_candidates(
    scene: StepScene, dense: DenseMerge, peft: PeftWays, repeats: int
) -> dict[str, Any]:
    """Compare scored candidates/s, and the sums that the ways arrive at for the first candidate."""
    forward = scene.forward
    rivals = merged_ways(forward, dense, peft, scene.table[0])
    ways: dict[str, Callable[[], object]] = {
        "population": scene.score_population,
        "base_forward_alone": lambda: forward.forward(len(scene.rows)),
    }
    ours = scene.score_population()[0]
    distance = {}
    for way, merged in rivals.items():

        def run(
            merged: Callable[[], AbstractContextManager[None]] = merged, eager: bool = way != "dense"
        ) -> Tensor:
            return scene.score_merged(merged, eager=eager)

        distance[way] = round(((run() - ours).abs().sum() / ours.abs().sum()).item(), 6)
        ways[way] = run
    seconds = time_interleaved(ways, forward.device, repeats=repeats)
    rates = {way: (len(scene.table) if way == "population" else 1) / s for way, s in seconds.items()}
    limit = 0.001 if forward.sizes.dtype == torch.float32 else 0.1
    return {
        "agree": all(distance[way] <= limit for way in ("dense", "peft_cat")),
        "distance_from_population": distance,
        "n_candidates": len(scene.table),
        "tokens_a_candidate": scene.prompts.n_tokens,
        "candidates_per_s": {way: round(rate, 4) for way, rate in rates.items()},
        "population_over": {way: round(rates["population"] / rate, 3) for way, rate in rates.items()},
    }


@torch.no_grad()
def time_objective(scene: StepScene, repeats: int) -> dict[str, Any]:
    """Compare the objective on one full pass's positions with that pass, and its memory."""
    n_rows, device = scene.rows_per_pass, scene.forward.device
    rows = [row % len(scene.rows) for row in range(n_rows)]
    table = scene.forward.coefficients(n_rows)
    logits = scene.passes.mixed(table, rows)
    eager = Passes(
        scene.forward.model, scene.forward.stacked, scene.forward.groups, scene.prompts, scene.signals
    )
    ways: dict[str, Callable[[], object]] = {
        "pass": lambda: scene.passes.mixed(table, rows),
        "objective": lambda: scene.passes.sums(OBJECTIVE, logits, rows),
        "objective_eager": lambda: eager.sums(OBJECTIVE, logits, rows),
        "pass_and_objective": lambda: scene.passes.sums(OBJECTIVE, scene.passes.mixed(table, rows), rows),
    }
    fused, plain = (own.sums(OBJECTIVE, logits, rows) for own in (scene.passes, eager))
    seconds = time_interleaved(ways, device, repeats=repeats)
    of_pass = {way: round(s / seconds["pass"], 5) for way, s in seconds.items() if way != "pass"}
    return {
        "n_positions": len(logits),
        "of_pass": of_pass | {"objective_behind_a_pass": round(of_pass["pass_and_objective"] - 1, 5)},
        "fused_from_eager": ((fused - plain).abs().max() / plain.abs().max()).item(),
        "peak_gib": peak_gib(device, ways["objective"]),
        "peak_gib_eager": peak_gib(device, ways["objective_eager"]),
    }


def measure_signals(scene: StepScene) -> dict[str, Any]:
    """Say what the experts' signals take, and how far the kept ones are from float32's, in nats."""
    logits = scene.signals.logits
    expert = scene.prompts.expert
    one_hot = torch.zeros(len(scene.rows), *scene.table.shape[1:])
    one_hot[scene.rows, :, expert] = 1
    with torch.no_grad():
        eager = Passes(
            scene.forward.model, scene.forward.stacked, scene.forward.groups, scene.prompts, scene.signals
        )
        again = eager.sums(OBJECTIVE, eager.mixed(one_hot, scene.rows), scene.rows)
    return {
        "dtype": str(logits.dtype).removeprefix("torch."),
        "gib": round(logits.nbytes / 2**30, 4),
        "gib_in_float32": round(logits.numel() * 4 / 2**30, 4),
        "expert_from_itself_nats": (again.sum() / len(logits)).item(),
    }


def time_gradient(scene: StepScene, repeats: int) -> dict[str, Any]:
    """Compare the gradient of all coefficients on all prompts with a forward pass over the same tokens."""
    mixture = scene.table[0].double().numpy()
    table, device = scene.table[:1].expand(len(scene.rows), -1, -1), scene.forward.device
    ways: dict[str, Callable[[], object]] = {
        "pass": lambda: scene.passes.mixed(table, scene.rows),
        "gradient": lambda: scene.evaluator.gradient(mixture),
    }
    with torch.no_grad():
        seconds = time_interleaved(ways, device, repeats=repeats)
    gradient = scene.evaluator.gradient(mixture).gradient
    return {
        "n_coefficients": gradient.size,
        "finite": bool(np.isfinite(gradient).all()),
        "forwards": round(seconds["gradient"] / seconds["pass"], 4),
        "seconds": round(seconds["gradient"], 5),
        "peak_gib": peak_gib(device, ways["gradient"]),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all parts."""
    sizes, device = TINY if arguments.tiny else MISTRAL_7B, torch.device(arguments.device)
    scene = StepScene(sizes, device, compiled=arguments.compile)
    forward = scene.forward
    dense, peft = (
        DenseMerge(forward.model, forward.stacked, forward.groups),
        PeftWays(forward.model, forward.stacked),
    )
    return {
        "candidates": check_and_time_candidates(scene, dense, peft, arguments.repeats),
        "objective": time_objective(scene, arguments.repeats),
        "signals": measure_signals(scene),
        "gradient": time_gradient(scene, arguments.repeats),
        "compiled": forward.compiled,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, record; 1 if ways that are the same function differ."""
    return run("bench_search_step", __doc__, measure, "candidates", argv)


if __name__ == "__main__":
    raise SystemExit(main())
