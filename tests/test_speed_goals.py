"""The table of speed goals."""

import pytest

from benchmarks.speed_goals import ANSWERS, FORWARD, GOALS, STEP, speed_text


def forward_line(**changes):
    over = {"peft_linear": 5.0, "peft_cat": 9.9, "lorahub": 3.0, "dense": 1.6}
    rates = {"population": 12.0, "base": 12.1}
    part = {"candidates_per_s": rates, "population_over": over}
    passes = [
        {
            "tokens": tokens,
            "tokens_per_s": {"base": 100, "population": 98},
            **{"of_base": share, "of_matrix_rate": 0.81, "seven_modules_overhead": 0.3 - tokens / 1e5},
            **{"matrix_tflops": 740.0, "mfu_of_989": 0.6},
        }
        for tokens, share in ((8_192, 0.97), (16_384, 0.98))
    ]
    line = {
        **{"benchmark": FORWARD, "tiny": False, "device": "a GPU", "machine": "a host", "commit": "c0ffee"},
        "full_forward": passes,
        "candidates": [part | {"tokens_a_candidate": n} for n in (256, 3_456)],
        "exactness": {
            **{"error_over_base": 1.04, "error_over_base_spread": [1.03, 1.06], "floor_over_base": 1.035},
            "error_over_base_eager": 1.045,
            **{"float32_error": 2e-5, "float32_floor": 1.5e-5},
        },
    }
    return line | changes


def cells_of(text, start):
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_goal_says_what_was_wanted_what_was_measured_and_whether_it_is_met():
    text = speed_text([forward_line()])
    assert cells_of(text, "population's tokens/s")[1:4] == ["at least 0.975", "0.970", "**no**"]
    assert cells_of(text, "all seven modules")[1:4] == ["at most 20.0", "21.8", "**no**"]
    assert cells_of(text, "model FLOP/s")[1:4] == ["at least 0.800", "0.810", "yes"]
    assert cells_of(text, "the same over PEFT cat")[1:4] == ["at least 10.0", "9.9", "**no**"]
    assert cells_of(text, "float32 against")[1:4] == ["at most 1.0e-05", "2.0e-05", "**no**"]
    assert "a GPU (a host)" in text
    assert "c0ffee" in text
    assert "by 1.5e-05" in text
    assert "1.030 to 1.060 of the base's own" in text
    assert "uncompiled 1.045" in text
    assert "would be 1.035" in text


def test_the_latest_line_counts_a_toy_s_never_does_and_what_was_not_run_is_not_shown():
    old = forward_line(full_forward=forward_line()["full_forward"][1:], commit="old")
    text = speed_text([old, forward_line(), forward_line(tiny=True, commit="toy")])
    assert cells_of(text, "population's tokens/s")[2] == "0.970"
    assert "old" not in text
    assert "toy" not in text
    assert STEP not in text
    assert ANSWERS not in text


@pytest.mark.parametrize("value", [2_000, 1_999])
def test_answers_are_judged_by_the_cache_of_fixed_size(value):
    writing = [
        {"cache": "growing", "batch": 64, "new_tokens_per_s": [9_000, 1, 2]},
        {"cache": "fixed", "batch": 16, "new_tokens_per_s": [9_000, 1, 2]},
        {"cache": "fixed", "batch": 64, "new_tokens_per_s": [value, 1, 2]},
    ]
    about = {"device": "a GPU", "machine": "a host", "commit": "c0ffee"}
    text = speed_text([{"benchmark": ANSWERS, "writing": writing, "file_s": [60.4, 60, 61], **about}])
    assert cells_of(text, "new tokens/s")[2:4] == [f"{value:,}", "yes" if value == 2_000 else "**no**"]
    assert cells_of(text, "807 queries")[2:4] == ["60", "yes"]
    assert len(GOALS) == 16
