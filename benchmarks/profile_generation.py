"""Where does each millisecond of one generation go, and how far is that from its matrix products alone?

`python -m benchmarks.profile_generation --device cuda --compile` builds Mistral-7B's architecture and 27
adapters with random weights, and times one generation, 16 candidates on 54 prompts of 64 tokens, as the
search scores it; beside it, in turn, the same passes with parts taken away, and its matrix products and
attention by themselves. Differences say what each part takes; the floor is what the matrix products would
take at the rate of a large product, measured in the same run. Then a profiler sums the device's kernels by
name over one more generation, and what the wall has more than they have is the device waiting. Prints a table
and appends a line to benchmarks/results/profile.jsonl. `--report` writes the last line's tables into
docs/SCALING.md; of another --out it prints them. `--tiny` takes seconds on a CPU.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_search_step import StepScene
from benchmarks.command import exit_code
from benchmarks.device_options import parse_with_device
from benchmarks.environment import ROOT, describe_machine
from benchmarks.markdown import NOTHING, table_head, table_line
from benchmarks.profile_kernels import profile_kernels
from benchmarks.profile_parts import GenerationParts, split_parts
from benchmarks.rows import Row, append_row, measured, read_rows
from benchmarks.sections import replace_section
from benchmarks.speed_scene import MISTRAL_7B, TINY
from benchmarks.timing import matrix_rate, peak_gib, time_interleaved
from search.errors import InputError

OUT = ROOT / "benchmarks/results/profile.jsonl"
DOCUMENT, SECTION = ROOT / "docs/SCALING.md", "profile"
N_CANDIDATES = 16


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all ways, split the generation into parts, and profile it."""
    sizes, device = TINY if arguments.tiny else MISTRAL_7B, torch.device(arguments.device)
    scene = StepScene(sizes, device, compiled=arguments.compile)
    parts = GenerationParts(scene, arguments.candidates)
    seconds = time_interleaved(parts.ways(), device, repeats=arguments.repeats, warm_ups=1)
    rate = matrix_rate(device, sizes.dtype, 8192 if device.type == "cuda" else 256)
    ms = {name: 1000 * s for name, s in seconds.items()}
    split = split_parts(parts, ms, rate)
    kernels = profile_kernels(scene.score_population, device)
    return {
        "compiled": scene.forward.compiled,
        "n_candidates": arguments.candidates,
        "n_passes": len(parts.batches),
        "n_tokens": parts.n_tokens,
        "n_padded_tokens": parts.n_padded_tokens,
        "n_scored": parts.n_scored,
        "n_layers": sizes.n_layers,
        "n_adapters": sizes.n_adapters,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "matrix_tflops": round(rate / 1e12, 4),
        "peak_gib": peak_gib(device, scene.score_population),
        "timed_ms": {name: round(value, 4) for name, value in ms.items()},
        **{kind: _rounded(value) for kind, value in split.items()},
        "kernels": kernels,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: round(own, 4) for name, own in value.items()}
    return round(value, 4)


def run_and_record(arguments: argparse.Namespace) -> int:
    """Measure, print, append a line; 1 if memory ran out or the device failed, which is recorded too."""
    device = torch.device(arguments.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    row: dict[str, Any] = {"benchmark": "profile_generation", "tiny": arguments.tiny, "device": card}
    row |= {**describe_machine(), "asked_to_compile": arguments.compile, "repeats": arguments.repeats}
    try:
        row |= measure(arguments)
    except torch.OutOfMemoryError:
        row["failure"] = "out of memory"
    except Exception as error:  # noqa: BLE001 (a device's and a compiler's errors share no class)
        row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    print(f"FAILED: {row['failure']}" if "failure" in row else profile_text(row))
    append_row(arguments.out, row)
    print(json.dumps(row))
    return 1 if "failure" in row else 0


def profile_text(row: Row) -> str:
    """Return a line on what was run, the table of parts, and that of kernels."""
    lines = [_what(row), "", *_parts_table(row), "", *_kernels_text(row)]
    return "\n".join(lines)


def _what(row: Row) -> str:
    how = "compiled" if row["compiled"] else "eager"
    return (
        f"Device: {row['device']} ({row['machine']}), torch {row['versions']['torch']}, {row['dtype']}, "
        f"{how}. Commit: {row['commit']}. One generation: {row['n_candidates']} candidates, "
        f"{row['n_tokens']:,} tokens in {row['n_passes']} passes ({row['n_padded_tokens']:,} with padding), "
        f"{row['n_scored']:,} scored positions, {row['n_layers']} layers, {row['n_adapters']} adapters. "
        f"Medians of {row['repeats']} interleaved repeats; a product of large matrices runs at "
        f"{row['matrix_tflops']:,.4g} TFLOP/s, which the floor is of."
    )


def _parts_table(row: Row) -> list[str]:
    """Return the generation's parts, the whole, and its floor."""
    wall, floors = row["wall_ms"], row["floors_ms"]
    lines = table_head(["part of a generation", "ms", "share (%)", "floor (ms)"])
    for name, ms in row["shares_ms"].items():
        floor = f"{floors[name]:,.2f}" if name in floors else NOTHING
        lines.append(table_line([name, f"{ms:,.2f}", f"{100 * ms / wall:.1f}", floor]))
    total = sum(floors.values())
    lines.append(table_line(["**whole**", f"{wall:,.2f}", "100.0", f"{total:,.2f}"]))
    above = wall - total
    lines.append(table_line(["**above the floor**", f"{above:,.2f}", f"{100 * above / wall:.1f}", NOTHING]))
    return lines


def _kernels_text(row: Row) -> list[str]:
    """Return the device's time by the names of what it ran, and how long it waited."""
    kernels = row["kernels"]
    if "failure" in kernels:
        return [f"No kernels by name: {kernels['failure']}."]
    wall = row["timed_ms"]["generation"]
    lines = table_head(["kernels, by name", "ms", "share (%)"])
    waiting = {"device waiting": wall - kernels["busy_ms"]} if row["device"] != "cpu" else {}
    for name, ms in {**kernels["ms"], **waiting}.items():
        lines.append(table_line([name, f"{ms:,.2f}", f"{100 * ms / wall:.1f}"]))
    if kernels["other"]:
        lines += ["", "Most of `other`: " + ", ".join(f"`{name}`" for name in kernels["other"]) + "."]
    return lines


def write_report(out: Path) -> None:
    """Put the last line that worked into the document; print it, where it is not the document's own.

    Raises:
        InputError: if there is none; a toy's is nothing to the document.
    """
    is_document = out.resolve() == OUT
    rows = [row for row in measured(read_rows(out)) if not (is_document and row["tiny"])]
    if not rows:
        raise InputError(f"{out}: no profile, nothing to report. Run without --report first.")
    if is_document:
        replace_section(DOCUMENT, SECTION, profile_text(rows[-1]))
        print("report:", DOCUMENT)
    else:
        print(profile_text(rows[-1]))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_generation", description=__doc__)
    parser.add_argument("--candidates", type=int, default=N_CANDIDATES, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    return parse_with_device(parser, argv, repeats=3)


def run(arguments: argparse.Namespace) -> int:
    """Measure or report; return 1 if measuring failed."""
    if arguments.report:
        write_report(arguments.out)
        return 0
    return run_and_record(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, 1 if measuring failed, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
