"""How does cost grow with adapters, total rank, population, layers, vocabulary, tokens?

`python -m benchmarks.bench_scaling --device cuda --compile --seconds 150` moves one thing at a time away from
a centre (benchmarks/scaling_points.py: Mistral-7B's layers, four of them, 27 adapters) and times at each
point the base's forward pass, a population's, the objective where it can change, and, for the sweep of the
population, a whole generation; eager, and compiled where asked for. Medians of interleaved, synchronised
repeats; random weights and tokens. A point that fails, by memory or otherwise, is recorded as failed. Each
point is a line of benchmarks/results/scaling.jsonl as soon as it is measured; what is there already, of the
same code and device, is not measured again, so that the same command goes on after its seconds are over.
`--report` writes tables and a figure of these lines into docs/SCALING.md; of another --out it prints the
tables and draws beside it. `--tiny` takes seconds on a CPU. Knows commands and lines; not models.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import exit_code
from benchmarks.device_options import parse_with_device
from benchmarks.environment import ROOT, code_hash, describe_machine
from benchmarks.rows import Row, append_row, measured, read_rows
from benchmarks.scaling_measure import Models, measure_point
from benchmarks.scaling_points import SWEEPS, Point, list_points

OUT = ROOT / "benchmarks/results/scaling.jsonl"
_KEY = ("sweep", "value", "tiny", "device", "asked_to_compile", "code_sha256")
"""What makes two lines the same measurement."""


def identify(point: Point, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a point's line starts with: what was measured, where, on which code."""
    device, sizes = torch.device(arguments.device), point.sizes
    return {
        "benchmark": "bench_scaling",
        "sweep": point.sweep,
        "value": point.value,
        "tiny": arguments.tiny,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "asked_to_compile": arguments.compile,
        "code_sha256": code_hash(),
        "n_adapters": sizes.n_adapters,
        "total_rank": sizes.n_adapters * point.rank,
        "n_layers": sizes.n_layers,
        "n_vocab": sizes.n_vocab,
        "d_model": sizes.d_model,
        "tokens_a_row": sizes.n_tokens,
        "tokens_per_forward": sizes.tokens_per_forward,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "n_candidates": point.n_candidates,
        "repeats": arguments.repeats,
    }


def run_missing(arguments: argparse.Namespace) -> int:
    """Measure the points that are not recorded yet, until the seconds are over; return how many failed."""
    started_s, device, machine = time.perf_counter(), torch.device(arguments.device), describe_machine()
    points = list_points(arguments.sweeps, tiny=arguments.tiny)
    done = {_key(row) for row in measured(read_rows(arguments.out))}
    missing = [point for point in points if _key(identify(point, arguments)) not in done]
    print(f"{len(missing)} of {len(points)} points to measure", file=sys.stderr)
    models, n_failed, last_s = Models(device), 0, 0.0
    for index, point in enumerate(missing):
        begun_s = time.perf_counter()
        if begun_s - started_s + last_s > arguments.seconds:
            print(f"out of time: {len(missing) - index} points left; the same command goes on")
            break
        found = measure_point(point, models, device, compiled=arguments.compile, repeats=arguments.repeats)
        last_s = time.perf_counter() - begun_s
        row = {**identify(point, arguments), **found, "spent_s": round(last_s, 2), **machine}
        append_row(arguments.out, row)
        print(format_row(row), flush=True)
        n_failed += "failure" in row
    return n_failed


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY)


def format_row(row: Row) -> str:
    """Return a line for people."""
    start = f"{row['sweep']:11}{row['value']:>8,}"
    if "failure" in row:
        return f"{start}  FAILED: {row['failure']}"
    shown = "  ".join(
        f"{name} {ms:.2f} ms" + (f" ({row['of_base'][name]:.3f})" if name in row["of_base"] else "")
        for name, ms in row["ms"].items()
    )
    return f"{start}  {shown}  [{row['spent_s']:.1f} s]"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_scaling", description=__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no point after these")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    return parse_with_device(parser, argv, repeats=7)


def run(arguments: argparse.Namespace) -> int:
    """Measure or report; return 1 if a point failed."""
    if arguments.report:  # imported here: a machine that measures may lack matplotlib
        from benchmarks.scaling_report import write_report

        write_report(arguments.out, into_document=arguments.out.resolve() == OUT)
        return 0
    return 1 if run_missing(arguments) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, 1 if a point failed, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
