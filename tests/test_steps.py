"""A search by hand: the README's example, what it records, and what it finds."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from search import Steps, Trace, load_config, run_search
from search.errors import InputError
from tests.test_layers import ROOT
from tests.test_merges import save_toy_zoo
from tests.test_run import QUICK


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(save_toy_zoo(tmp_path_factory.mktemp("zoo")), QUICK)


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(from pathlib.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "configs").mkdir()
    zoo = save_toy_zoo(tmp_path / "zoo")
    settings = (
        zoo.read_text() + "device: cpu\nprompts: {per_adapter: 2, unseen_per_adapter: 2, max_new_tokens: 8}\n"
    )
    (tmp_path / "configs/demo.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    trace = Trace.load(Path("output/steps/trace.jsonl"))
    assert len(trace.generations) == 3
    document = json.loads(Path("output/steps/coefficients.json").read_text())
    best = min(generation.losses.min() for generation in trace.generations)
    assert document["objective"]["loss"] == pytest.approx(best)


def test_steps_ask_and_score_as_a_run_does(config, tmp_path):
    run_search(config, output=tmp_path / "run")
    recorded = Trace.load(tmp_path / "run/trace.jsonl").generations
    with Steps(config, tmp_path / "steps") as steps:
        for generation in recorded[:3]:
            genomes = steps.ask()
            np.testing.assert_array_equal(genomes, generation.genomes)
            scores = steps.evaluate(genomes)
            np.testing.assert_array_equal(scores.losses, generation.losses)
            steps.tell(scores)


def test_any_genome_can_be_evaluated_and_any_merge_saved(config, tmp_path):
    with Steps(config, tmp_path) as steps:
        zero = np.zeros((1, steps.space.n_params))
        assert steps.evaluate(zero).losses == pytest.approx([1.0])
        with pytest.raises(ValueError, match="ask, evaluate and tell first"):
            steps.best()
        merged = steps.save(np.ones(steps.space.shape))
    assert merged.config["r"] > 1
    assert (tmp_path / "adapter/README.md").exists()


def test_a_function_of_ones_own_is_minimised(config, tmp_path):
    def constant(merged_logp, expert_logp, next_tokens):
        return merged_logp[..., 0] * 0 + 2.0

    with Steps(config, tmp_path, objective=constant) as steps:
        scores = steps.evaluate(steps.ask())
    np.testing.assert_allclose(scores.per_expert, 1.0)
    assert Trace.load(tmp_path / "trace.jsonl").header["objective"].endswith("constant")


def test_a_trace_that_is_there_is_not_replaced(config, tmp_path):
    (tmp_path / "trace.jsonl").write_text("precious")
    with pytest.raises(InputError, match="a search was run there"):
        Steps(config, tmp_path)
    assert (tmp_path / "trace.jsonl").read_text() == "precious"


def test_an_output_is_refused_before_anything_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr("search.steps.load_setup", lambda *_: pytest.fail("something was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/out: Not a directory"):
        Steps(config, tmp_path / "file/out")
    with pytest.raises(InputError, match="the base or an adapter is read from there"):
        Steps(config, Path(config.base.source))
