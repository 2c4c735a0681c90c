"""A copy of the competition's kit with a bundle in it, run in a process of its own, for tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICK = (
    "device=cpu",
    *("prompts.per_adapter=2", "prompts.unseen_per_adapter=2", "prompts.max_new_tokens=8"),
    *("search.max_evaluations=24", "search.n_candidates=8", "search.n_finalists=3"),
    *("objective.weak_signal_nats=100", "search.gradient.refine_steps=2", "search.space=layer"),
)
"""All adapters are near the balanced merge: no single expert wins, something that was found does."""
QUERIES = (
    "id,input,eval_type,answer_choices\n1,Say it,generation,\n2,Which,multiple_choice,\"['a', 'b c']\"\n"
)
KEPT = "PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"
"""Of the environment; libraries that PYTHONPATH names are kept too, this checkout is not."""


def make_kit(folder, zoo, text, empty=None):
    """Copy the kit with the toy zoo's models in its constants and the bundle dropped in."""
    shutil.copytree(ROOT / "tests/kit", folder, ignore=shutil.ignore_patterns("__pycache__"))
    adapters = [[str(path), None] for path in sorted((zoo.parent / "adapters").iterdir())]
    models = {"base": [str(zoo.parent / "base"), None], "adapters": adapters, "empty": empty}
    (folder / "models.json").write_text(json.dumps(models))
    (folder / "llm_merging/merging/MyMerge.py").write_text(text)
    (folder / "data").mkdir()
    (folder / "data/test.csv").write_text(QUERIES)
    return folder


def run_in(kit, *arguments, python=sys.executable, device="cpu"):
    """Run a Python in the kit, where it sees a CUDA device only if asked to."""
    kept = {key: os.environ[key] for key in KEPT if key in os.environ}
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    inherited = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""
    paths = [path for path in inherited.split(os.pathsep) if path and Path(path).resolve() != ROOT]
    own = {"PYTHONPATH": os.pathsep.join([".", *paths]), "HF_AUTH_TOKEN": "none", "HF_HUB_OFFLINE": "1"}
    environment = {**kept, **hidden, **own, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [python, *arguments], cwd=kit, env=environment, capture_output=True, text=True, timeout=300
    )
