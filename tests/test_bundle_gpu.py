"""The kit's own command with a bundle, on a device: it ends as the unbundled run does, and answers."""

import csv
import json

import numpy as np
import pytest

from search.bundle import write_bundle
from search.config import load_config
from search.run import run_search
from search.trace import Trace
from tests.bundling import QUICK, make_kit, run_in
from tests.test_merges import save_toy_zoo

SETTINGS = (*QUICK, "search.compile=false")
"""A bundle compiles nothing."""
DEVICES = [
    pytest.param("cpu", 0.0, marks=pytest.mark.slow),
    pytest.param("cuda", 1e-3, marks=pytest.mark.gpu),
]


def assert_all_close(ours, theirs, atol):
    """Compare all that two traces have of the search: prompts, losses, genomes, finalists and winner."""
    for part in ("searched", "unseen"):
        assert [prompt["text"] for prompt in ours.last("prompts")[part]] == [
            prompt["text"] for prompt in theirs.last("prompts")[part]
        ]
    assert len(ours.generations) == len(theirs.generations) == 3
    pairs = [
        (getattr(one, name), getattr(other, name))
        for one, other in zip(ours.generations, theirs.generations, strict=True)
        for name in ("genomes", "losses", "per_expert")
    ]
    for event, names in {"references": ["losses"], "search": ["start"], "refined": ["losses"]}.items():
        pairs += [(ours.last(event)[name], theirs.last(event)[name]) for name in names]
    one, other = ours.last("finalists"), theirs.last("finalists")
    assert (one["names"], one["winner"]) == (other["names"], other["winner"])
    pairs += [(one[name], other[name]) for name in ("losses", "winner_coefficients")]
    for mine, expected in pairs:
        np.testing.assert_allclose(np.array(mine), np.array(expected), rtol=0, atol=atol)


@pytest.mark.parametrize(("device", "atol"), DEVICES)
def test_the_kits_main_finds_what_the_unbundled_run_finds_on_a_device(device, atol, tmp_path):
    zoo = save_toy_zoo(tmp_path / "zoo")
    config = load_config(zoo, [*SETTINGS, f"device={device}"])
    kit = make_kit(tmp_path / "kit", zoo, write_bundle(config, queries_ahead=2))
    done = run_in(kit, "llm_merging/main.py", device=device)
    assert done.returncode == 0, done.stderr
    with (kit / "output/test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2"]
    assert all(row["prediction"] for row in rows)
    run_search(config, output=tmp_path / "out")
    ours, theirs = Trace.load(kit / "output/my_merge/trace.jsonl"), Trace.load(tmp_path / "out/trace.jsonl")
    assert ours.header["device"] == device
    assert ours.header["dtype"] == theirs.header["dtype"]
    assert_all_close(ours, theirs, atol)
    result = json.loads((tmp_path / "out/coefficients.json").read_text())["coefficients"]
    np.testing.assert_allclose(ours.last("finalists")["winner_coefficients"], result, rtol=0, atol=atol)
