"""coefficients.json, written and read back, and the same merge read from a trace."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search.adapters import load_adapter
from search.errors import InputError
from search.files import write_json
from search.groups import group_modules
from search.merge import merge_adapters
from search.recorded import MergeRecord, coefficients_document, read_merge
from search.trace import TraceWriter
from tests.toys import BASE_NAME

COEFFICIENTS = np.array([[0.5, 0.25, 0.1], [1.0, -1.0, 0.125]])
BASE = {"id": "here/base", "revision": None, "sha256": "0" * 64}
OBJECTIVE = {"name": "entropy_excess", "combine": "mean", "loss": 0.25, "per_expert": [0.1, 0.2, 0.4]}
RECORD = MergeRecord(
    method="concord",
    base={**BASE, "name": BASE_NAME},
    objective=OBJECTIVE,
    provenance={"commit": None, "versions": {}, "seed": 0, "trace": "trace.jsonl"},
)


def modules_of(adapters):
    return {module for adapter in adapters for module in adapter.modules}


@pytest.fixture
def adapters(toy_adapters):
    return toy_adapters("llama")


@pytest.fixture
def written(adapters, tmp_path) -> Path:
    """A coefficients.json by layer."""
    groups = group_modules(modules_of(adapters), "layer")
    path = tmp_path / "coefficients.json"
    write_json(path, coefficients_document(adapters, COEFFICIENTS, groups, RECORD))
    return path


def write_trace(path: Path, adapters, *, groups, space: object, coefficients, compared: bool = True) -> Path:
    """A trace with all that a merge is read from, after an older comparison that another one replaced."""
    with TraceWriter(path) as trace:
        trace.header(
            {
                "config": {
                    "base": {"source": "here/base", "name": BASE_NAME},
                    "search": {"space": space},
                    "objective": {"name": "entropy_excess", "combine": "mean"},
                },
                "seed": 7,
                "base": BASE,
                "adapters": [
                    {"name": a.name, "id": a.source, "revision": None, "sha256": a.sha256} for a in adapters
                ],
                "groups": list(groups),
                "versions": {"concord": "0.1.0"},
                "commit": "c0ffee",
            }
        )
        for losses, winner, table in (
            ([0.5, 1.0], "old", np.zeros_like(coefficients)),
            ([1.0, 0.25], "mean", coefficients),
        ):
            if compared:
                trace.event(
                    "finalists",
                    names=["old", "mean"],
                    losses=losses,
                    per_expert=[[1.0, 1.0, 1.0], [0.1, np.nan, 0.4]],
                    winner=winner,
                    winner_coefficients=table,
                )
    return path


# ---- coefficients.json


def test_it_is_enough_to_redo_the_merge(adapters, written):
    document = json.loads(written.read_text())
    assert list(document) == [
        "schema",
        "method",
        "base",
        "adapters",
        "groups",
        "coefficients",
        "objective",
        "provenance",
    ]
    assert [entry["sha256"] for entry in document["adapters"]] == [adapter.sha256 for adapter in adapters]
    assert [entry["rank"] for entry in document["adapters"]] == [[2], [4], [1, 3, 6]]
    assert document["adapters"][0]["scaling"] == [4.0]
    source = read_merge(written)
    again = [load_adapter(a.id, name=a.name) for a in source.merge.adapters]
    groups = source.group(modules_of(again))
    redone = merge_adapters(again, source.merge.coefficients, groups, base_name=source.merge.base_name)
    expected = merge_adapters(
        adapters, COEFFICIENTS, group_modules(modules_of(adapters), "layer"), base_name=BASE_NAME
    )
    assert redone.config == expected.config
    assert all(torch.equal(redone.state_dict[key], expected.state_dict[key]) for key in expected.state_dict)


def test_a_folder_stands_for_its_coefficients_before_its_trace(adapters, written):
    write_trace(written.parent / "trace.jsonl", adapters, groups=[], space="layer", coefficients=COEFFICIENTS)
    assert read_merge(written.parent).path == written


@given(st.data())
def test_any_coefficients_come_back_to_the_last_bit(toy_adapters, tmp_path_factory, data):
    adapters = toy_adapters("llama")
    groups = group_modules(modules_of(adapters), "model")
    number = st.floats(allow_nan=False, allow_infinity=False)
    table = [data.draw(st.lists(number, min_size=3, max_size=3))]
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, coefficients_document(adapters, table, groups, RECORD))
    assert read_merge(path).merge.coefficients == table


def test_coefficients_of_another_shape_are_a_bug_that_is_told(adapters):
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(n_groups, n_adapters\) = \(1, 3\)"):
        coefficients_document(adapters, COEFFICIENTS, group_modules(modules_of(adapters), "model"), RECORD)


# ---- traces


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        ("layer", "layer"),
        ("model", "model"),
        ("layer", {"groups": "layer", "layers_per_block": 4}),
        ("part", {"groups": "part", "layers_per_block": 4}),
        ("module", {"groups": "layer", "layers_per_block": 4}),  # as fine as the finest stage
        ("block", {"groups": "block", "layers_per_block": 1}),
    ],
)
def test_a_trace_gives_the_groups_that_its_run_had(adapters, tmp_path, kind, space):
    groups = group_modules(modules_of(adapters), kind, 1)
    table = np.arange(3.0 * len(groups.names)).reshape(-1, 3)
    path = write_trace(
        tmp_path / "trace.jsonl", adapters, groups=groups.names, space=space, coefficients=table
    )
    source = read_merge(tmp_path)
    assert source.path == path
    assert source.group(modules_of(adapters)) == groups
    assert source.merge.coefficients == table.tolist()


def test_a_trace_gives_its_last_comparisons_winner_and_where_it_is_from(adapters, tmp_path):
    groups = group_modules(modules_of(adapters), "layer").names
    path = write_trace(
        tmp_path / "t.jsonl", adapters, groups=groups, space="layer", coefficients=COEFFICIENTS
    )
    merge = read_merge(path).merge
    assert merge.coefficients == COEFFICIENTS.tolist()
    assert (merge.base_name, merge.base.id, merge.base.sha256) == (BASE_NAME, "here/base", "0" * 64)
    assert [(a.name, a.id, a.sha256) for a in merge.adapters] == [
        (a.name, a.source, a.sha256) for a in adapters
    ]
    assert merge.objective == {**OBJECTIVE, "per_expert": [0.1, None, 0.4]}
    assert merge.provenance == {
        "commit": "c0ffee",
        "versions": {"concord": "0.1.0"},
        "seed": 7,
        "trace": "t.jsonl",
        "winner": "mean",
    }


def test_a_trace_whose_groups_are_of_other_adapters_is_refused(adapters, tmp_path):
    path = write_trace(
        tmp_path / "t.jsonl", adapters, groups=["layer.7", "x"], space="layer", coefficients=COEFFICIENTS
    )
    with pytest.raises(InputError, match=r"t\.jsonl: its groups \(layer\.7, \.\.\.\) are not those"):
        read_merge(path).group(modules_of(adapters))


def test_a_search_without_a_winner_is_refused_with_the_way_to_one(adapters, tmp_path):
    path = write_trace(
        tmp_path / "t.jsonl", adapters, groups=["x"], space="layer", coefficients=[[0.0]], compared=False
    )
    with pytest.raises(InputError, match=r"found no `finalists` event.*python -m search resume"):
        read_merge(path)


def test_the_winner_of_an_interrupted_search_stands_until_it_is_resumed(adapters, tmp_path):
    path = write_trace(
        tmp_path / "t.jsonl", adapters, groups=["a", "b"], space="layer", coefficients=COEFFICIENTS
    )
    with TraceWriter(path, n_kept_bytes=path.stat().st_size) as trace:
        trace.event("interrupt", phase="search")
    assert read_merge(path).merge.coefficients == COEFFICIENTS.tolist()
    with TraceWriter(path, n_kept_bytes=path.stat().st_size) as trace:
        trace.event("resumed")
    with pytest.raises(InputError, match=r"t\.jsonl: unfinished: .*python -m search resume") as refusal:
        read_merge(path)
    assert "\n" not in str(refusal.value)


def test_a_winner_that_is_not_finite_is_refused(adapters, tmp_path):
    table = COEFFICIENTS.copy()
    table[1, 2] = np.nan
    path = write_trace(tmp_path / "t.jsonl", adapters, groups=["a", "b"], space="layer", coefficients=table)
    with pytest.raises(InputError, match=r"t\.jsonl: coefficients\[1\]\[2\]: found None, expected: a valid"):
        read_merge(path)


def test_a_trace_that_lacks_a_field_is_refused_by_its_name(tmp_path):
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as trace:
        trace.header({"config": {"search": {"space": "layer"}}})
        trace.event("finalists", names=["mean"], winner="mean")
    with pytest.raises(InputError, match=r"lacks what a merge needs .*'objective'"):
        read_merge(path)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "found schema 2, this version reads up to 1; upgrade"),
        ({"schema": "1"}, r"schema: found '1', expected: a valid integer"),
        ({"base": None}, r"base: found None, expected: "),
        ({"base": {"revision": None}}, r"base\['id'\] is missing"),
        ({"adapters": []}, r"adapters: found \[\], expected: "),
        ({"adapters": [{"name": "a", "id": 3}]}, r"adapters\[0\]\['id'\]: found 3, expected: a valid string"),
        ({"groups": ["layer.0"]}, r"groups: found \['layer.0'\], expected: a valid dictionary"),
        ({"coefficients": [[0, "1", 2]] * 2}, r"coefficients\[0\]\[1\]: found '1', expected: a valid number"),
        (
            {"coefficients": [[0, float("nan"), 2]] * 2},
            r"coefficients\[0\]\[1\]: found nan, expected: a finite",
        ),
        (
            {"coefficients": [[0, 1, True]] * 2},
            r"coefficients\[0\]\[2\]: found True, expected: a valid number",
        ),
        ({"coefficients": [[0, 1, 2]]}, r"coefficients are 1 rows of \[3\] numbers, expected 2 rows"),
        ({"coefficients": [[0, 1, 2], [0]]}, r"2 rows of \[1, 3\] numbers, expected .* of 3 \(adapters\)"),
        ({"groups": {"a": ["m"], "b": ["m"]}}, "groups hold 'm' twice, expected once"),
    ],
)
def test_a_field_that_is_wrong_is_one_line_that_names_it(written, change, message):
    document = json.loads(written.read_text()) | change
    written.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message) as refusal:
        read_merge(written)
    assert str(refusal.value).startswith(f"{written}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "coefficients.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"coefficients\.json: (no JSON|found a list)"):
        read_merge(path)


def test_nothing_there_is_refused_with_what_is_wanted(tmp_path):
    with pytest.raises(InputError, match=r"holds neither coefficients\.json nor trace\.jsonl"):
        read_merge(tmp_path)
    with pytest.raises(InputError, match=r"gone: no such file\. Give one of these, or the folder of a run"):
        read_merge(tmp_path / "gone")


def test_a_module_in_no_group_is_refused_by_its_name(written):
    document = json.loads(written.read_text())
    document["groups"]["layer.0"].remove("model.layers.0.self_attn.q_proj")
    written.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"groups hold no 'model\.layers\.0\.self_attn\.q_proj'"):
        read_merge(written).group(["model.layers.0.self_attn.q_proj"])
