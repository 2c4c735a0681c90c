"""A bundle's trace: the report draws from it what it draws from a whole run's; nobody verifies it."""

from types import SimpleNamespace

import pandas as pd
import pytest
from peft import PeftConfig, load_peft_weights

from search.__main__ import main
from search.base import load_base
from search.config import load_config
from search.finding import state_finding
from search.run import run_search
from search.submission import run_in_kit
from search.tables import run_table, time_table
from search.trace import Trace
from tests.bundling import QUICK
from tests.test_figures import ALL_FIGURES
from tests.test_merges import save_toy_zoo
from tests.test_tables import ALL_TABLES

SETTINGS = (*QUICK, "search.race_keep=0.5")
NOT_WRITTEN = {"elapsed_s", "seconds", "share", "peak_bytes", "spread", "generations"}
"""What the clock says, and what a bundle does not keep."""


def load_as_the_kit(config):
    """Return what a submission takes from the kit's base class, with all models loaded."""
    base, sources = load_base(config.base.source, device="cpu"), [one.source for one in config.adapters]
    return SimpleNamespace(
        name="my_merge",
        device="cpu",
        base_model=base.model,
        base_model_name=base.source,
        tokenizer=base.tokenizer,
        input_tokenizer=base.tokenizer,
        list_models=[(source, None) for source in sources],
        loaded_models={source: load_peft_weights(source, device="cpu") for source in sources},
        loaded_configs={source: PeftConfig.from_pretrained(source) for source in sources},
        generate=lambda batch: None,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run's folder in the kit, and a whole run's."""
    folder = tmp_path_factory.mktemp("runs")
    config = load_config(save_toy_zoo(folder / "zoo"), SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bundled = config.model_dump(mode="json") | {"queries_ahead": 2, "bundled_prior": None}
        run_in_kit(bundled, {}, load_as_the_kit(config), {"version": "0", "commit": "0"})
    run_search(config, output=folder / "whole")
    return folder / "output/my_merge", folder / "whole"


@pytest.fixture(scope="module")
def traces(folders):
    return [Trace.load(folder / "trace.jsonl") for folder in folders]


@pytest.mark.parametrize("table", [table for table in ALL_TABLES if table is not time_table])
def test_its_tables_are_those_of_a_whole_run(table, traces):
    ours, theirs = (table(trace).drop(columns=NOT_WRITTEN, errors="ignore").sort_index() for trace in traces)
    assert len(ours)
    pd.testing.assert_frame_equal(ours, theirs)


def test_its_end_and_its_seconds_are_told(traces):
    assert run_table(traces[0])["ended_by"].tolist() == ["evaluations"]
    assert "not ended" not in " ".join(state_finding({"kit": traces[0]}).paragraphs)
    assert time_table(traces[0])["seconds"].sum() > 0


@pytest.mark.parametrize("draw", ALL_FIGURES, ids=lambda draw: draw.__name__)
def test_every_figure_is_drawn_of_it(draw, traces, recwarn):
    assert draw({"kit": traces[0], "whole": traces[1]}).alt
    assert not [str(warning.message) for warning in recwarn]


def test_its_folder_is_refused_by_verify_in_one_line(folders, capsys):
    for folder in (folders[0], folders[0].parent, folders[0].parents[1]):
        assert main(["verify", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert "bundle" in line if folder == folders[0] else "holds no trace.jsonl" in line
