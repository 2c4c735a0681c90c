"""Limits on the quality benchmark: which side passes, and what is left out where nothing was run."""

from benchmarks.quality_limits import quality_limits
from tests.test_quality_tables import row


def judged(rows, variants=("mixed",), sets=("broken",)):
    return {
        limit.name: (round(limit.measured, 1), limit.passed) for limit in quality_limits(rows, variants, sets)
    }


def test_the_search_is_held_to_its_mean_its_worst_seed_and_the_best_of_the_others():
    rows = [
        row("my_merge", 0, held_in_N=0.94, worst_task=0.8, held_out=0.7),
        row("my_merge", 1, held_in_N=1.0, worst_task=0.92, held_out=0.8),
        row("ties", held_in_N=0.83, held_out=0.2),
        *(row("dare", seed, held_in_N=0.8 + 0.04 * seed, held_out=0.76) for seed in range(2)),
        row("task_arithmetic, best scale", held_in_N=0.86, held_out=0.74, labels=True),
        row("joint LoRA", held_in_N=1.0, held_out=1.0, labels=True),
        row("tsv_m, weights searched", held_in_N=1.0, held_out=0.9, no_option=True),
    ]
    assert judged(rows) == {
        "mixed: held-in N, mean": (97.0, True),
        "mixed: held-in N, every seed": (94.0, False),
        "mixed: worst task's N, mean": (86.0, True),
        "mixed: worst task's N, every seed": (80.0, False),
        "mixed: held-in N above the best data-free": (14.0, False),
        "mixed: held-in N above the best label-tuned": (11.0, True),
        "mixed: held-out above the best data-free": (-1.0, False),
        "mixed: held-out above label-tuned": (1.0, True),
    }


def test_a_margin_names_what_it_is_above():
    rows = [row("my_merge"), row("ties", held_in_N=0.3), row("cat", held_in_N=0.4)]
    (limit,) = [limit for limit in quality_limits(rows, ["mixed"], []) if "data-free" in limit.name][:1]
    assert limit.worst == "cat"
    assert limit.line.startswith("FAIL  mixed: held-in N above the best data-free")


def test_sets_are_judged_by_their_least_lucky_seed_and_the_heaviest_worthless_expert():
    found = {"worthless": ["c"], "mean_abs_coefficients": {"a": 1.0, "c": 0.2}}
    rows = [
        row("uniform_average", 0, "broken", held_in_N=0.5),
        row("my_merge", 0, "broken", held_in_N=0.49, **found),
        row(
            "my_merge",
            1,
            "broken",
            held_in_N=0.9,
            worthless=["c"],
            mean_abs_coefficients={"a": 1.0, "c": 0.0},
        ),
    ]
    assert judged(rows) == {
        "broken: above uniform, every seed": (-1.0, False),
        "broken: worthless weight, every seed": (20.0, False),
    }


def test_what_was_not_run_has_no_limit():
    assert judged([row("ties"), row("uniform_average", experts="broken")]) == {}
    assert len(judged([row("my_merge")])) == 4
