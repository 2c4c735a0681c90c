"""A finished search looked at again: the same mean, best and winner, at its end and before."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay import BEST, CHOSEN, MEAN, Replay
from benchmarks.zoo.sets import write_config
from search.config import load_config
from search.run import run_search
from search.setup import load_setup
from search.trace import Trace

ROOT = Path(__file__).parents[1]
SETTINGS = (
    *("search.max_evaluations=24", "search.n_candidates=6", "search.race_keep=0.5", "search.n_finalists=3"),
    *("search.space.groups=layer", "search.stages=[{share: 1, groups: model}, {share: 1, groups: layer}]"),
    *(
        "search.gradient.inject_every=2",
        "search.gradient.refine_steps=2",
        "prompts.per_adapter=2",
        "prompts.unseen_per_adapter=1",
    ),
    *("prompts.max_new_tokens=12", "device=cpu"),
)
N_FIRST_STAGE = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two experts, two stages, a race and injected genomes: the trace, what was found, and its replay."""
    folder = tmp_path_factory.mktemp("replay")
    write_config(folder / "two.yaml", "two", generated=folder, template=ROOT / "configs/demo.yaml")
    config = load_config(folder / "two.yaml", SETTINGS)
    result = run_search(config, output=folder / "run")
    trace = Trace.load(folder / "run/trace.jsonl")
    return trace, result, Replay(load_setup(config), trace, folder)


def test_the_end_is_the_runs_own(finished):
    trace, result, replay = finished
    tables = replay.tables_after(len(trace.generations))
    np.testing.assert_array_equal(tables[MEAN], trace.last("search_ended")["mean"])
    np.testing.assert_array_equal(tables[CHOSEN], result.coefficients)


@pytest.mark.parametrize("n_generations", [1, N_FIRST_STAGE])
def test_before_the_end_nothing_later_counts(finished, n_generations):
    trace, _, replay = finished
    assert [generation.stage for generation in trace.generations] == [0, 0, 1, 1]
    past = trace.generations[:n_generations]
    scored = [
        (generation.losses[place], generation.genomes[place])
        for generation in past
        for place in generation.rungs[-1]["candidates"]
    ]
    _, genome = min(scored, key=lambda pair: pair[0])
    tables = replay.tables_after(n_generations)
    np.testing.assert_allclose(tables[BEST], np.broadcast_to(genome, tables[BEST].shape), rtol=1e-12)
    is_one_row = [len(np.unique(tables[MEAN][:, adapter])) == 1 for adapter in range(2)]
    assert all(is_one_row), "the first stage has one coefficient an adapter"


def test_a_later_stage_starts_from_the_one_before(finished):
    _, _, replay = finished
    first, later = (replay.tables_after(n)[MEAN] for n in (N_FIRST_STAGE, N_FIRST_STAGE + 1))
    assert np.ptp(later, axis=0).max() > 0
    assert np.abs(later - first).max() < 0.5
