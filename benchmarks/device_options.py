"""The options of benchmarks that time one device: which, how large a model, compiled or not, how often.

Knows the command line; not what is timed.
"""

import argparse
from collections.abc import Sequence

import torch

TINY_REPEATS = 2


def parse_with_device(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, repeats: int
) -> argparse.Namespace:
    """Add `tiny`, `device`, `compile` and `repeats`, and parse; compiled on CUDA unless told otherwise."""
    parser.add_argument("--tiny", action="store_true", help="a toy model: to see that all runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--repeats", type=int, help=f"of each way (default {repeats}, tiny {min(repeats, TINY_REPEATS)})"
    )
    arguments = parser.parse_args(argv)
    if arguments.compile is None:
        arguments.compile = arguments.device.startswith("cuda")
    arguments.repeats = arguments.repeats or (min(repeats, TINY_REPEATS) if arguments.tiny else repeats)
    return arguments
