"""What a bundle has in place of what it leaves out: a literal for a configuration, a trace that may fail."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from search.config import SearchConfig
from search.errors import InputError
from search.loop import Progress
from search.planning import list_spaces
from search.settings import SearchSettings
from search.stand_ins import LenientTrace, PrintedProgress, Settings, start_in_kit

PRIOR = {"names": ["b", "x"], "groups": ["g"], "start": [[0.7, 9.0]], "spread": [[0.1, 9.0]], "sha256": "0"}


def test_settings_plan_the_stages_that_the_configuration_plans():
    stages = [{"share": 1, "genome": "adapter"}, {"share": 2, "groups": "layer"}]
    config = SearchSettings.model_validate({"stages": stages, "space": {"top_k": 3}})
    literal = Settings(config.model_dump(mode="json"))
    for (ours, share), (theirs, their_share) in zip(list_spaces(literal), list_spaces(config), strict=True):
        assert share == their_share
        assert ours.model_dump(mode="json") == theirs.model_dump(mode="json")
    with pytest.raises(AttributeError):
        _ = literal.nothing


def test_a_trace_that_cannot_be_written_is_given_up(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    trace = LenientTrace(tmp_path / "file" / "trace.jsonl")
    trace.header({"seed": 0})
    trace.event("merged", losses=np.array([np.nan]))
    assert "going on" in caplog.text
    trace = LenientTrace(tmp_path / "new" / "trace.jsonl")
    trace.event("merged", losses=np.array([np.nan]))
    assert json.loads((tmp_path / "new/trace.jsonl").read_text())["losses"] == [None]


def test_progress_is_a_line_a_tenth(caplog):
    caplog.set_level(logging.INFO)
    line = PrintedProgress(100)
    for evaluations in range(1, 101):
        line.show(Progress(1, evaluations, 0.5, 9.0))
    assert len(caplog.records) == 10


def kit_config(prior, sign="signed"):
    search = SearchConfig.model_fields["search"].default.model_dump(mode="json")
    search["space"]["sign"] = sign
    return Settings({"search": search, "bundled_prior": prior})


def test_a_bundled_prior_is_known_by_names():
    parts = SimpleNamespace(names=("a", "b"), groups=SimpleNamespace(names=("g",)), shape=(1, 2))
    balanced = np.array([0.5, 0.25])
    first, prior = start_in_kit(kit_config(PRIOR), parts, balanced)
    np.testing.assert_array_equal(first.start, [[0.5, 0.7]])
    np.testing.assert_array_equal(first.spread, [[0.25, 0.1]])
    assert first.missing == ("a",)
    assert prior == {"source": "bundled", "sha256": "0"}
    first, prior = start_in_kit(kit_config(None), parts, balanced)
    np.testing.assert_array_equal(first.start, [[0.5, 0.25]])
    assert prior is None
    with pytest.raises(InputError, match="other groups"):
        start_in_kit(kit_config({**PRIOR, "groups": ["h"]}), parts, balanced)
