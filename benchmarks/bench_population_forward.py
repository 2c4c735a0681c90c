"""What does a population cost against the base's own forward pass, and against one merge after another?

`python -m benchmarks.bench_population_forward` builds Mistral-7B's architecture and 27 adapters with random
weights on the device, checks that all ways to run a mixture agree where they are the same function, and times
them in turn: tokens/s of a full forward pass, candidates/s at 256 and 3,456 tokens a candidate, all seven
linear modules at rank 16, and how exact each is in bfloat16 and float32. Rivals run one candidate at a time;
their forward passes are compiled where the model's modules stay the same. `--tiny` takes seconds on a CPU.
Prints the parts and appends one line of JSON to benchmarks/results.jsonl. Knows models and ways; not losses.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_options import parse_with_device
from benchmarks.environment import RESULTS, describe_machine
from benchmarks.speed_exactness import measure_exactness
from benchmarks.speed_rivals import DenseMerge, PeftWays
from benchmarks.speed_scene import (
    ALL_SEVEN,
    MISTRAL_7B,
    Q_AND_V,
    TINY,
    Sizes,
    build_model,
    build_stack,
    draw_coefficients,
)
from benchmarks.timing import matrix_rate, peak_gib, time_interleaved
from search.compiled import CompiledLayers, Compiler
from search.groups import Groups
from search.joined import join_inputs
from search.population import Mixtures
from search.stack import StackedFactors

NOMINAL_FLOPS = 989e12
"""bfloat16 matrix products of an H100 or H200 SXM, dense, from its data sheet."""


class ForwardScene:
    """A model, adapters on it, and forward passes over rows of random tokens."""

    def __init__(
        self, sizes: Sizes, device: torch.device, *, compiled: bool, model: Any = None, rank: int = 8
    ) -> None:
        """Build the model, unless one of these sizes is given, and the adapters on q_proj and v_proj."""
        self.sizes, self.device = sizes, device
        self.model = build_model(sizes, device) if model is None else model
        self.stacked, self.groups = build_stack(self.model, sizes, Q_AND_V, rank=rank)
        self._compiler = Compiler() if compiled else None
        self._layers = CompiledLayers(self.model, self._compiler) if self._compiler else None
        self._ids: dict[int, Tensor] = {}
        self._mixtures: dict[int, Mixtures] = {}
        self.mixtures(self.stacked, self.groups)

    @property
    def compiled(self) -> bool:
        """Whether compiling was asked for, and works here."""
        return self._compiler is not None and self._compiler.works

    def rows_of(self, n_tokens: int) -> int:
        """Return how many rows so many tokens are."""
        return max(1, n_tokens // self.sizes.n_tokens)

    def coefficients(self, n_rows: int) -> Tensor:
        """Return a mixture for each row, (n_rows, n_groups, n_adapters), on the CPU as a search has them."""
        return draw_coefficients(self.sizes, n_rows, len(self.groups.names))

    def active(self) -> AbstractContextManager[None]:
        """Compiled layers, where asked for."""
        return self._layers.active() if self._layers else nullcontext()

    @torch.no_grad()
    def forward(self, n_rows: int, *, eager: bool = False) -> Tensor:
        """Return logits (n_rows, n_tokens / 2, n_vocab) of the second half of each row of fixed tokens."""
        if n_rows not in self._ids:
            gen = torch.Generator().manual_seed(n_rows)
            shape = n_rows, self.sizes.n_tokens
            self._ids[n_rows] = torch.randint(3, self.sizes.n_vocab, shape, generator=gen).to(self.device)
        # by place, as a search asks for them: a number makes a view of it, which is multiplied row by row
        wanted = torch.arange(self.sizes.n_tokens // 2, self.sizes.n_tokens, device=self.device)
        with nullcontext() if eager else self.active():
            logits: Tensor = self.model(self._ids[n_rows], use_cache=False, logits_to_keep=wanted).logits
        return logits

    def mixtures(self, stacked: StackedFactors, groups: Groups) -> Mixtures:
        """Return the model's layers, wrapped once, factors joined where layers are compiled.

        That makes weights views: who times or compiles something else on the model calls this before.
        """
        key = id(stacked)
        if key not in self._mixtures:
            self._mixtures[key] = Mixtures(self.model, stacked, groups)
            if self._layers:
                self._mixtures[key].rewrap(join_inputs(self.model, stacked))
        return self._mixtures[key]

    def mixed(self, table: Tensor, stacked: StackedFactors, groups: Groups, *, eager: bool = False) -> Tensor:
        """As `forward`, under a mixture for each row."""
        with self.mixtures(stacked, groups).active(table):
            return self.forward(len(table), eager=eager)


def time_full_forward(
    scene: ForwardScene, seven: tuple[StackedFactors, Groups], n_tokens: int, repeats: int
) -> dict[str, Any]:
    """Compare the base with populations on q and v, and on all `seven` modules, in tokens/s.

    Passes are timed a few at once: one follows another, as in a search, while the host prepares the next.
    """
    n_rows, n_queued = scene.rows_of(n_tokens), max(2, 4 * scene.sizes.tokens_per_forward // n_tokens)
    table = scene.coefficients(n_rows)
    scene.mixtures(*seven)
    ways: dict[str, Callable[[], object]] = {
        "base": lambda: scene.forward(n_rows),
        "population": lambda: scene.mixed(table, scene.stacked, scene.groups),
        "population_seven_modules_r16": lambda: scene.mixed(table, *seven),
        "base_eager": lambda: scene.forward(n_rows, eager=True),
        "population_eager": lambda: scene.mixed(table, scene.stacked, scene.groups, eager=True),
    }
    queues = {name: lambda way=way: [way() for _ in range(n_queued)] for name, way in ways.items()}
    together = time_interleaved(queues, scene.device, repeats=repeats)
    seconds = {name: s / n_queued for name, s in together.items()}
    tokens = n_rows * scene.sizes.n_tokens
    flops = scene.sizes.flops_per_token() * tokens
    rate = matrix_rate(scene.device, scene.sizes.dtype, 8192 if scene.device.type == "cuda" else 256)
    return {
        "tokens": tokens,
        "passes_queued": n_queued,
        "tokens_per_s": {name: round(tokens / s) for name, s in seconds.items()},
        "of_base": round(seconds["base"] / seconds["population"], 4),
        "seven_modules_overhead": round(seconds["population_seven_modules_r16"] / seconds["base"] - 1, 4),
        "model_tflops": {name: round(flops / s / 1e12, 4) for name, s in seconds.items()},
        "mfu_of_989": round(flops / seconds["population"] / NOMINAL_FLOPS, 4),
        "matrix_tflops": round(rate / 1e12, 4),
        "of_matrix_rate": round(flops / seconds["population"] / rate, 4),
        "peak_gib": peak_gib(scene.device, ways["population"]),
    }


def check_ways(scene: ForwardScene, dense: DenseMerge, peft: PeftWays) -> dict[str, Any]:
    """Return how far each way is from the population, as a share of what the mixture changes (RMS).

    `agree` says whether those that are the same function differ by no more than their type's rounding.
    """
    n_rows = 4
    table = scene.coefficients(1).expand(n_rows, -1, -1)
    ours, base = scene.mixed(table, scene.stacked, scene.groups).float(), scene.forward(n_rows).float()
    effect = (ours - base).square().mean().sqrt()
    found: dict[str, Any] = {"effect": effect.item()}
    for way, merged in merged_ways(scene, dense, peft, table[0]).items():
        with merged():
            found[way] = ((scene.forward(n_rows).float() - ours).square().mean().sqrt() / effect).item()
    limit = 0.01 if scene.sizes.dtype == torch.float32 else 0.5  # bfloat16 rounds W + dW by a tenth of dW
    agree = all(found[way] <= limit for way in ("dense", "peft_cat"))
    return {"agree": agree, **{way: round(value, 6) for way, value in found.items()}}


def merged_ways(
    scene: ForwardScene, dense: DenseMerge, peft: PeftWays, mixture: Tensor
) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Return each rival's context for one mixture (n_groups, n_adapters), the same in all groups."""
    weights, there = mixture[0].tolist(), mixture.to(scene.device)
    return {
        "dense": lambda: dense.merged(there),
        "lorahub": lambda: peft.lorahub(weights),
        "peft_linear": lambda: peft.weighted(weights, "linear"),
        "peft_cat": lambda: peft.weighted(weights, "cat"),
    }


def time_candidates(
    scene: ForwardScene, dense: DenseMerge, peft: PeftWays, n_tokens: int, repeats: int
) -> dict[str, Any]:
    """Compare candidates/s at so many tokens a candidate: packed rows, or one merge after another."""
    own_rows = scene.rows_of(n_tokens)
    per_pass = scene.rows_of(scene.sizes.tokens_per_forward)
    n_candidates = max(1, 3 * per_pass // own_rows)
    table = scene.coefficients(n_candidates).repeat_interleave(own_rows, dim=0)
    packs = list(table.split(per_pass))
    packs[-1] = torch.nn.functional.pad(packs[-1], (0, 0, 0, 0, 0, per_pass - len(packs[-1])))  # one shape
    per_call: dict[str, float] = {"population": n_candidates}
    ways: dict[str, Callable[[], object]] = {
        "population": lambda: [scene.mixed(pack, scene.stacked, scene.groups) for pack in packs],
        "base": lambda: scene.forward(own_rows),
    }
    for way, merged in merged_ways(scene, dense, peft, table[0]).items():

        def run(
            merged: Callable[[], AbstractContextManager[None]] = merged, eager: bool = way != "dense"
        ) -> None:
            with merged():
                scene.forward(own_rows, eager=eager)

        ways[way] = run
    seconds = time_interleaved(ways, scene.device, repeats=repeats)
    rates = {way: per_call.get(way, 1) / s for way, s in seconds.items()}
    return {
        "tokens_a_candidate": own_rows * scene.sizes.n_tokens,
        "candidates_per_s": {way: round(rate, 4) for way, rate in rates.items()},
        "population_over": {way: round(rates["population"] / rate, 3) for way, rate in rates.items()},
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all parts, the timed ones before the float32 copies that exactness takes."""
    sizes, device = TINY if arguments.tiny else MISTRAL_7B, torch.device(arguments.device)
    scene = ForwardScene(sizes, device, compiled=arguments.compile)
    dense, peft = DenseMerge(scene.model, scene.stacked, scene.groups), PeftWays(scene.model, scene.stacked)
    agreement = check_ways(scene, dense, peft)
    repeats = arguments.repeats
    factors = (1, 2) if not arguments.tiny else (1,)
    seven = build_stack(scene.model, sizes, ALL_SEVEN, rank=16)
    full = [time_full_forward(scene, seven, factor * sizes.tokens_per_forward, repeats) for factor in factors]
    candidates = [
        time_candidates(scene, dense, peft, n_tokens, repeats)
        for n_tokens in ((32, 96) if arguments.tiny else (256, 3456))
    ]
    del dense, peft
    case = scene.stacked, scene.groups
    exactness = measure_exactness(scene.model, *case, sizes, scene.mixtures(*case), scene.active)
    return {
        "compiled": scene.compiled,
        "distance_from_population": agreement,
        "full_forward": full,
        "candidates": candidates,
        "exactness": exactness,
    }


def parse(name: str, about: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options that both benchmarks of speed have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--no-record", action="store_true", help="print only")
    return parse_with_device(parser, argv, repeats=9)


def record(name: str, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print all parts, and the line of JSON that is appended to the results."""
    for part, values in found.items():
        for value in values if isinstance(values, list) else [values]:
            print(f"{part:24} {value}")
    device = torch.device(arguments.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    line = {"benchmark": name, "tiny": arguments.tiny, "device": card}
    line |= {**describe_machine(), "repeats": arguments.repeats, **found}
    print(json.dumps(line))
    if not arguments.no_record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run(
    name: str,
    description: str | None,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    compared: str,
    argv: Sequence[str] | None,
) -> int:
    """Parse, measure, print, record; 1 if ways that are the same function differ, as part `compared` says."""
    arguments = parse(name, description, argv)
    found = measure(arguments)
    record(name, arguments, found)
    return 0 if found[compared]["agree"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, record; 1 if ways that are the same function differ."""
    return run("bench_population_forward", __doc__, measure, "distance_from_population", argv)


if __name__ == "__main__":
    raise SystemExit(main())
