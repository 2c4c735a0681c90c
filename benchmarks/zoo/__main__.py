"""Rebuild the embedded zoo: `python -m benchmarks.zoo [--tiny] [--out DIR]`.

Minutes on one CUDA GPU, seconds on a CPU with --tiny; an interrupted build goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.zoo.build import build_zoo
from benchmarks.zoo.layout import Build
from benchmarks.zoo.sizes import SHIPPED, TINY


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("data/zoo"), help="gets base/, adapters/, scores.json, README.md"
    )
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="gets what is not shipped")
    parser.add_argument(
        "--queries", type=Path, default=Path("data"), help="gets test.csv and test_targets.csv"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy of the same shape, for tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="experts trained at a time")
    args = parser.parse_args(argv)
    if args.tiny:
        torch.set_num_threads(1)  # its matrices are too small to share
    build = Build(
        out=args.out,
        work=args.work,
        queries=args.queries,
        size=TINY if args.tiny else SHIPPED,
        seed=args.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        n_workers=args.workers,
    )
    build_zoo(build)


if __name__ == "__main__":
    main()
