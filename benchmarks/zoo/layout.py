"""Where a build keeps what, and how it runs.

Knows paths and settings, not what the stages do.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.zoo.sizes import JOINT, ExpertSpec, ZooSize


@dataclass(frozen=True, slots=True)
class Build:
    """One build of the zoo."""

    out: Path
    """Gets what is shipped as the zoo: base/, adapters/, scores.json and README.md."""
    work: Path
    """Gets what is not shipped: the joint LoRA, each model's scores and the build record."""
    queries: Path
    """Gets test.csv and test_targets.csv."""
    size: ZooSize
    seed: int
    device: str
    n_workers: int

    @property
    def base(self) -> Path:
        """The base model's folder."""
        return self.out / "base"

    @property
    def record(self) -> Path:
        """Seconds and machine of each stage."""
        return self.work / "record.json"

    def adapter(self, spec: ExpertSpec) -> Path:
        """The folder of an expert, or of the joint LoRA."""
        return (self.work if spec == JOINT else self.out / "adapters") / spec.task

    def measured(self, name: str, split: str) -> Path:
        """The file of one model's accuracies on one split."""
        suffix = "json" if split == "validation" else f"{split}.json"
        return self.work / "measured" / f"{name}.{suffix}"
