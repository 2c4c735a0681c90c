"""Where a measurement was taken: the checkout, its code and libraries, the machine.

Knows files and /proc; not what is measured.
"""

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search.provenance import checkout_commit, cpu_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results.jsonl"
PACKAGES = ("torch", "transformers", "peft", "nevergrad", "cma", "numpy")
CODE_FOLDERS = ("llm_merging", "search")


def describe_machine(n_cores: int | None = None) -> dict[str, Any]:
    """Return commit, versions and machine; `n_cores` is how many of its cores a run was pinned to."""
    pinned = {} if n_cores is None else {"cores": n_cores}
    return {
        "commit": checkout_commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": f"{platform.machine()} {cpu_model()}, {os.cpu_count()} cores",
        **pinned,
    }


@cache
def code_hash(root: Path = ROOT) -> str:
    """Return the hex SHA-256 of what the main job runs: every Python file of llm_merging/ and search/.

    Unlike the commit it does not change with a word in a document, and it tells uncommitted code apart.
    """
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE_FOLDERS for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
