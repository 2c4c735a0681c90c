"""How cost grows, at toy size: one thing moves at a time, failures are lines, time ends it, and a report."""

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import bench_scaling, scaling_measure, scaling_report
from benchmarks.bench_population_forward import ForwardScene
from benchmarks.bench_scaling import main
from benchmarks.environment import ROOT
from benchmarks.rows import read_rows
from benchmarks.scaling_measure import Models, measure_point
from benchmarks.scaling_points import CENTRE, RANKS_OF, SWEEPS, TINY_CENTRE, list_points
from benchmarks.speed_scene import TINY

CPU = torch.device("cpu")
TINY_RUN = ["--tiny", "--device", "cpu", "--repeats", "1"]


def tiny_point(sweep):
    return list_points([sweep], tiny=True)[0]


# ---- which points


@pytest.mark.parametrize(
    ("sweep", "field"), [("adapters", "n_adapters"), ("tokens", "tokens_per_forward"), ("layers", "n_layers")]
)
def test_a_sweep_moves_one_thing_and_passes_through_the_centre(sweep, field):
    points = list_points([sweep], tiny=False)
    assert [getattr(point.sizes, field) for point in points] == list(SWEEPS[sweep])
    for point in points:
        assert asdict(point.sizes) | {field: None} == asdict(CENTRE) | {field: None}
        assert point.rank == 8
    assert CENTRE in [point.sizes for point in points]


def test_the_total_rank_is_what_its_sweep_says_whoever_has_it():
    points = list_points(["total_rank"], tiny=False)
    assert [point.sizes.n_adapters * point.rank for point in points] == list(SWEEPS["total_rank"])
    assert {point.sizes.n_adapters for point in points} == {RANKS_OF}


# ---- what a point costs


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The lines of two tiny sweeps, as the command writes them."""
    out = tmp_path_factory.mktemp("scaling") / "scaling.jsonl"
    assert main([*TINY_RUN, "--sweeps", "population", "tokens", "--out", str(out)]) == 0
    return out


def test_every_point_is_a_line_with_time_ratio_and_machine(recorded):
    rows = read_rows(recorded)
    assert [(row["sweep"], row["value"]) for row in rows] == [
        ("population", 1),
        ("population", 4),
        ("tokens", 32),
        ("tokens", 64),
    ]
    for row in rows:
        assert {"commit", "versions", "machine", "code_sha256", "spent_s"} <= row.keys()
        ms, how = row["ms"], "population_eager"
        assert row["of_base"][how] == pytest.approx(ms[how] / ms["base_eager"], rel=1e-3)
        assert row["tokens_per_s"][how] == pytest.approx(1000 * row["tokens"] / ms[how], rel=1e-3)
    assert [row["tokens"] for row in rows] == [48, 192, 32, 64]  # of a candidate: 3 prompts of 16 tokens
    assert "objective_eager" in rows[2]["ms"]
    assert rows[1]["candidates_per_s"] == pytest.approx(4000 / rows[1]["ms"]["population_eager"], rel=1e-3)


def test_the_same_command_measures_only_what_is_missing(recorded, capsys):
    before = recorded.read_text()
    assert main([*TINY_RUN, "--sweeps", "tokens", "--out", str(recorded)]) == 0
    assert "0 of 2 points to measure" in capsys.readouterr().err
    assert recorded.read_text() == before


def test_seconds_that_are_over_end_it_between_points(tmp_path, capsys):
    out = tmp_path / "scaling.jsonl"
    assert main([*TINY_RUN, "--seconds", "0", "--out", str(out)]) == 0
    assert "points left; the same command goes on" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("no room"), "out of memory"), (RuntimeError("bad\nthing"), "bad thing")],
)
def test_a_point_that_fails_is_a_line_and_the_sweep_goes_on(tmp_path, monkeypatch, error, expected):
    def fail_at_once(self, n_rows, **options):
        if n_rows * TINY.n_tokens == 32:
            raise error
        return forward(self, n_rows, **options)

    forward, out = ForwardScene.forward, tmp_path / "scaling.jsonl"
    monkeypatch.setattr(ForwardScene, "forward", fail_at_once)
    assert main([*TINY_RUN, "--sweeps", "tokens", "--out", str(out)]) == 1
    failed, other = read_rows(out)
    assert expected in failed["failure"]
    assert other["ms"]["population_eager"] > 0


def test_where_nothing_compiles_the_eager_ways_stand_alone(monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no compiler here")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=fail))
    for sweep in ("adapters", "population"):
        found = measure_point(tiny_point(sweep), Models(CPU), CPU, compiled=True, repeats=1)
        assert not found["compiled"]
        assert found["ms"].keys() == {"base_eager", "population_eager"}


def test_compiled_ways_are_timed_beside_the_eager_ones(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options, backend="eager"))
    found = measure_point(tiny_point("vocabulary"), Models(CPU), CPU, compiled=True, repeats=1)
    ways = {f"{what}_{how}" for what in ("base", "population", "objective") for how in ("eager", "compiled")}
    assert found["compiled"]
    assert found["ms"].keys() == ways


def test_a_model_is_built_once_for_points_that_share_it(monkeypatch):
    built = []
    monkeypatch.setattr(scaling_measure, "build_model", lambda sizes, device: built.append(sizes) or object())
    models = Models(CPU)
    for point in list_points(["adapters", "total_rank", "tokens", "population", "layers"], tiny=True):
        models.get(point.sizes)
    assert [sizes.n_layers for sizes in built] == [TINY_CENTRE.n_layers, 1, 2]


# ---- the report


def point_row(sweep="layers", value=2, ms=10.0, **changes):
    """A line as measuring writes it."""
    times = {"base_compiled": ms, "population_compiled": 1.1 * ms}
    return {
        **{"sweep": sweep, "value": value, "tiny": False, "device": "card", "machine": "box"},
        **{"versions": {"torch": "2"}, "dtype": "bfloat16", "tokens_a_row": 64, "commit": "c0ffee"},
        **{"repeats": 7, "asked_to_compile": True, "compiled": True, "ms": times},
        **{"of_base": {"population_compiled": 1.1}, "tokens_per_s": {"population_compiled": 5000}},
        **{"peak_gib": {"population_compiled": 3.25}, **changes},
    }


def test_a_table_has_ratios_slopes_and_failures():
    failed = {"sweep": "layers", "value": 8, "device": "card", "failure": "out of memory"}
    rows = [point_row(ms=10.0), point_row(value=4, ms=20.0), failed]
    text = scaling_report.scaling_text(rows, "figure.svg")
    assert "| 2 | 10.00 | 11.00 | 1.100 | - | 5,000 | 3.25 | - |" in text
    assert "| 4 | 20.00 | 22.00 | 1.100 | 1.00 | 5,000 | 3.25 | - |" in text
    assert "| 8 | - | - | - | - | - | - | out of memory |" in text
    assert "1 of 3 points failed." in text
    assert "eager (ms)" not in text


def test_a_point_counts_as_it_was_measured_last_on_the_last_device():
    rows = [point_row(device="old"), point_row(value=4, ms=1.0), point_row(value=4, ms=2.0), point_row()]
    found = scaling_report.latest_points(rows)
    assert [(row["value"], row["device"], row["ms"]["base_compiled"]) for row in found] == [
        (2, "card", 10.0),
        (4, "card", 2.0),
    ]


def test_a_figure_has_two_panels_a_sweep_with_points_where_they_belong():
    figure = scaling_report.draw_scaling([point_row(), point_row(value=4), point_row("adapters", 8)]).figure
    assert [ax.get_xlabel() for ax in figure.axes[::2]] == ["adapters, rank 8 each", "layers"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[2].lines}
    assert drawn == {
        "base, compiled": [[2.0, 10.0], [4.0, 10.0]],
        "population, compiled": [[2.0, 11.0], [4.0, 11.0]],
    }


def test_the_report_goes_between_the_markers_and_a_toys_lines_do_not(tmp_path, monkeypatch, capsys):
    document, out = tmp_path / "SCALING.md", tmp_path / "scaling.jsonl"
    document.write_text((ROOT / "docs/SCALING.md").read_text())
    monkeypatch.setattr(scaling_report, "DOCUMENT", document)
    monkeypatch.setattr(bench_scaling, "OUT", out)
    out.write_text(json.dumps(point_row(tiny=True)) + "\n")
    assert main(["--report", "--out", str(out)]) == 2
    assert "no point that was measured" in capsys.readouterr().err
    out.write_text(json.dumps(point_row()) + "\n")
    assert main(["--report", "--out", str(out)]) == 0
    text = document.read_text()
    assert "c0ffee" in text[text.index("<!-- scaling:begin -->") : text.index("<!-- scaling:end -->")]
    assert (tmp_path / "figures/scaling.svg").exists()


def test_the_report_of_other_lines_is_printed(recorded, capsys):
    assert main(["--report", "--out", str(recorded)]) == 0
    assert "candidates a generation" in capsys.readouterr().out
    assert recorded.with_suffix(".svg").exists()


def test_the_committed_document_has_a_place_for_every_section():
    text = (ROOT / "docs/SCALING.md").read_text()
    for name in ("speed", "profile", "scaling", "rehearsals"):
        assert text.index(f"<!-- {name}:begin -->\n") < text.index(f"<!-- {name}:end -->\n")
