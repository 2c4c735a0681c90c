"""A finished search looked at again: the same mean, best and winner, at its end and before."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay import BEST, CHOSEN, MEAN, Replay, Stop, count_gradients, stop_by
from benchmarks.zoo.sets import write_config
from search.config import load_config
from search.run import run_search
from search.setup import load_setup
from search.trace import Trace
from tests.traces import make_event, make_header, tiny_generations

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


@pytest.fixture
def tiny():
    """Three generations of three candidates, 100 tokens each; the search begins at second 2."""
    return Trace(make_header("ab", ["layer.0"]), tiny_generations(), [make_event("search", elapsed_s=2.0)])


def test_a_stop_is_the_last_generation_before_it_and_nothing_beyond_the_end(tiny):
    ends = [Stop(n, 0).clocks(tiny) for n in (1, 2, 3)]
    assert [end["n_tokens"] for end in ends] == [100, 200, 300]
    assert [end["evaluations"] for end in ends] == [g.evaluations for g in tiny.generations]
    assert ends[0]["seconds"] == tiny.generations[0].elapsed_s - 2
    found = [stop_by(tiny, "n_tokens", at) for at in (99, 100, 150, 200, 300, 301)]
    assert [stop and stop.n_generations for stop in found] == [None, 1, 1, 2, 3, None]
    assert stop_by(tiny, "seconds", ends[1]["seconds"] + 0.1) == Stop(2, 0)


def test_refining_takes_from_the_search_but_at_most_half(tiny):
    tiny.events.append(make_event("refined", seconds=5.0, n_tokens=50, losses=[0.5, 0.4, 0.3, 0.2, 0.1]))
    assert Stop(1, 2).clocks(tiny)["n_tokens"] == 120
    assert stop_by(tiny, "n_tokens", 160) == Stop(1, 5)  # 60 kept back, of which 50 are used
    assert stop_by(tiny, "n_tokens", 159) is None
    assert stop_by(tiny, "evaluations", tiny.generations[1].evaluations) == Stop(2, 5)
    tiny.events[-1] |= {"n_tokens": 1000}
    assert stop_by(tiny, "n_tokens", 420) == Stop(2, 1)  # half is kept back: room for one of 200


def test_the_end_is_the_runs_own(finished):
    trace, result, replay = finished
    tables = replay.tables_at(Stop(len(trace.generations), count_gradients(trace)))
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
    tables = replay.tables_at(Stop(n_generations, 0))
    np.testing.assert_allclose(tables[BEST], np.broadcast_to(genome, tables[BEST].shape), rtol=1e-12)
    is_one_row = [len(np.unique(tables[MEAN][:, adapter])) == 1 for adapter in range(2)]
    assert all(is_one_row), "the first stage has one coefficient an adapter"


def test_a_later_stage_starts_from_the_one_before(finished):
    _, _, replay = finished
    first, later = (replay.tables_at(Stop(n, 0))[MEAN] for n in (N_FIRST_STAGE, N_FIRST_STAGE + 1))
    assert np.ptp(later, axis=0).max() > 0
    assert np.abs(later - first).max() < 0.5
