"""The tiny build of the zoo, for tests that need real files of the zoo's shape but not its skill."""

from pathlib import Path

from benchmarks.zoo.layout import Build
from benchmarks.zoo.sizes import TINY


def tiny_build(folder: Path, seed: int = 0) -> Build:
    """Lay out a tiny build on the CPU in `folder`; nothing is built yet."""
    return Build(
        out=folder / "zoo",
        work=folder / "work",
        queries=folder,
        size=TINY,
        seed=seed,
        device="cpu",
        n_workers=1,
    )
