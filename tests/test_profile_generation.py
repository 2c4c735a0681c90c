"""The profile of a generation at toy size: the passes that are timed are the search's, and parts add up."""

import json

import pytest
import torch

from benchmarks import profile_generation
from benchmarks.bench_search_step import StepScene
from benchmarks.environment import ROOT
from benchmarks.profile_generation import main
from benchmarks.profile_kernels import group_kernels, group_of, profile_kernels
from benchmarks.profile_parts import GenerationParts, split_parts
from benchmarks.rows import read_rows
from benchmarks.speed_scene import Q_AND_V, TINY
from benchmarks.timing import time_interleaved
from search.passes import Passes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts():
    return GenerationParts(StepScene(TINY, CPU, compiled=False), n_candidates=3)


def test_its_batches_are_those_of_the_search(parts, monkeypatch):
    seen = []

    def spy(self, table, rows, tokens_per_forward=None):
        seen.append((table, list(rows)))
        return mixed(self, table, rows, tokens_per_forward)

    mixed = Passes.mixed
    monkeypatch.setattr(Passes, "mixed", spy)
    parts.scene.score_population()
    assert len(seen) == len(parts.batches) == 3  # 3 candidates x 6 prompts, 8 rows of 16 tokens a pass
    for (table, rows), batch in zip(seen, parts.batches, strict=True):
        assert rows == batch.prompts
        torch.testing.assert_close(table.float(), parts.scene.table[batch.candidates])
    assert parts.n_tokens == parts.n_padded_tokens == 3 * 6 * TINY.n_tokens


def test_compiled_passes_are_padded_and_scored_positions_are_not(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options, backend="eager"))
    parts = GenerationParts(StepScene(TINY, CPU, compiled=True), n_candidates=3)
    assert [batch.n_rows for batch in parts.batches] == [8, 8, 4]  # 18 rows: 2 are padded to half a pass
    assert parts.n_padded_tokens - parts.n_tokens == 2 * TINY.n_tokens
    assert parts.n_scored == 18 * (TINY.n_tokens // 2 - 1)
    for run in parts.ways().values():
        run()


def test_shares_add_up_to_the_generation_and_floors_are_two_flops_a_weight(parts):
    names = ["base_products", "output_product", "attention", "decoder", "base", "mixed"]
    ms = {
        name: float(1 + index**2) for index, name in enumerate([*names, "scored", "generation", "optimizer"])
    }
    found = split_parts(parts, ms, flops_per_s=1e9)
    assert found["wall_ms"] == pytest.approx(ms["generation"] + ms["optimizer"])
    model = parts.model
    n_layer = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    n_adapter = 0
    for name, layer in model.named_modules():
        if name.endswith(Q_AND_V):
            n_adapter += 8 * TINY.n_adapters * sum(layer.weight.shape)
    assert found["floors_ms"] == pytest.approx(
        {
            "base matrix products": 2 * parts.n_tokens * n_layer / 1e6,
            "output layer": 2 * parts.n_scored * model.lm_head.weight.numel() / 1e6,
            "adapters, each row's mixture": 2 * parts.n_tokens * n_adapter / 1e6,
        }
    )


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(...)", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2", "compiled elementwise"),
        ("triton_red_fused__log_softmax__to_copy_exp_mul_0", "softmax and logarithms"),
        ("void (anonymous namespace)::softmax_warp_forward<float>", "softmax and logarithms"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        (
            "void at::native::vectorized_elementwise_kernel<4, silu_kernel>",
            "elementwise and reductions",
        ),
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("unheard_of", "other"),
    ],
)
def test_a_kernel_is_known_by_its_name(name, group):
    assert group_of(name) == group


def test_kernels_are_summed_and_the_unknown_are_named():
    found = group_kernels([("gemm_a", 2.0), ("gemm_b", 1.0), ("strange", 0.5), ("Memset", 0.25)])
    assert found == {
        "ms": {"matrix products": 3.0, "copies": 0.25, "other": 0.5},
        "busy_ms": 3.75,
        "other": {"strange": 0.5},
    }


@pytest.mark.gpu
def test_a_gpus_kernels_are_counted_once():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def multiply():
        for _ in range(20):
            a @ a

    seconds = time_interleaved({"multiply": multiply}, device, repeats=5)
    found = profile_kernels(multiply, device)
    assert (
        {"matrix products"} <= found["ms"].keys() <= {"matrix products", "copies"}
    )  # a workspace is cleared
    assert found["busy_ms"] == pytest.approx(1000 * seconds["multiply"], rel=0.2)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The line of a tiny profile, as the command writes it."""
    out = tmp_path_factory.mktemp("profile") / "profile.jsonl"
    options = ["--tiny", "--device", "cpu", "--repeats", "1", "--candidates", "4"]
    assert main([*options, "--out", str(out)]) == 0
    return out


def test_the_command_records_a_line_whose_shares_are_the_whole(recorded):
    (row,) = read_rows(recorded)
    assert sum(row["shares_ms"].values()) == pytest.approx(row["wall_ms"], rel=1e-3)
    assert row["n_tokens"] == 4 * 6 * TINY.n_tokens
    assert row["kernels"]["ms"]["matrix products"] > 0
    assert {"commit", "machine", "versions"} <= row.keys()


def test_the_report_has_the_whole_and_what_is_above_the_floor(recorded, capsys):
    assert main(["--report", "--out", str(recorded)]) == 0
    text = capsys.readouterr().out
    assert "| **whole** |" in text
    assert "| **above the floor** |" in text
    assert "device waiting" not in text  # a CPU does not wait for itself


def test_the_report_goes_between_the_markers_and_a_toys_line_does_not(
    recorded, tmp_path, monkeypatch, capsys
):
    document, out = tmp_path / "SCALING.md", tmp_path / "profile.jsonl"
    document.write_text((ROOT / "docs/SCALING.md").read_text())
    monkeypatch.setattr(profile_generation, "DOCUMENT", document)
    monkeypatch.setattr(profile_generation, "OUT", out)
    (row,) = read_rows(recorded)
    out.write_text(json.dumps(row) + "\n")
    assert main(["--report", "--out", str(out)]) == 2
    assert "no profile, nothing to report" in capsys.readouterr().err
    out.write_text(json.dumps({**row, "tiny": False, "device": "card"}) + "\n")
    assert main(["--report", "--out", str(out)]) == 0
    text = document.read_text()
    section = text[text.index("<!-- profile:begin -->") : text.index("<!-- profile:end -->")]
    assert "Device: card" in section
    assert "| device waiting |" in section


def test_running_out_of_memory_is_recorded(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(profile_generation, "StepScene", fail)
    out = tmp_path / "profile.jsonl"
    assert main(["--tiny", "--device", "cpu", "--out", str(out)]) == 1
    assert read_rows(out)[0]["failure"] == "out of memory"
    assert "FAILED: out of memory" in capsys.readouterr().out
