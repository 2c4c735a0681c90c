"""The search step's benchmark at toy size: every way arrives at the same sums, and a line is recorded."""

import json

import pytest
import torch

from benchmarks import bench_population_forward, bench_search_step
from benchmarks.bench_search_step import PROMPTS_PER_ADAPTER, StepScene
from benchmarks.speed_rivals import DenseMerge
from benchmarks.speed_scene import TINY


@pytest.fixture(scope="module")
def scene():
    return StepScene(TINY, torch.device("cpu"), compiled=False)


def test_a_dense_merge_has_the_sums_of_the_populations_first_candidate(scene):
    dense = DenseMerge(scene.forward.model, scene.forward.stacked, scene.forward.groups)
    sums = scene.score_population()
    for candidate in (0, -1):
        found = scene.score_merged(lambda c=candidate: dense.merged(scene.table[c]), eager=True)
        torch.testing.assert_close(found, sums[candidate], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(sums[0], sums[-1], rtol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_runs_tiny_and_records_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_population_forward, "RESULTS", tmp_path / "results.jsonl")
    assert bench_search_step.main(["--tiny", "--device", "cpu", "--repeats", "1"]) == 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert found["candidates"]["tokens_a_candidate"] == PROMPTS_PER_ADAPTER * TINY.n_adapters * TINY.n_tokens
    assert found["candidates"]["distance_from_population"]["peft_cat"] < 1e-3
    assert found["objective"]["fused_from_eager"] < 1e-6
    assert found["signals"]["expert_from_itself_nats"] < 1e-6
    assert found["gradient"]["n_coefficients"] == TINY.n_layers * TINY.n_adapters
    assert found["gradient"]["finite"]
