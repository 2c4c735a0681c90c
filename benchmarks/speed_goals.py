"""Is a population as fast, as small and as exact as is wanted? What the speed benchmarks found, goal by goal.

`python -m benchmarks.speed_goals` reads the latest lines of bench_population_forward, bench_search_step and
bench_answers in benchmarks/results.jsonl and puts a table into docs/SCALING.md. Knows lines and limits;
measures nothing.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.command import run_and_report
from benchmarks.environment import RESULTS, ROOT
from benchmarks.markdown import table_head, table_line
from benchmarks.rows import Row, read_rows
from benchmarks.sections import replace_section
from search.errors import InputError

DOCUMENT, SECTION = ROOT / "docs/SCALING.md", "speed"
FORWARD, STEP, ANSWERS = "bench_population_forward", "bench_search_step", "bench_answers"
FEW, MANY = 0, 1
"""Places of 256 and of 3,456 tokens a candidate in a line's candidates."""
BATCH = 64
"""Answers at a time."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One limit on what one benchmark measures."""

    name: str
    benchmark: str
    measured: Callable[[Row], float]
    limit: float
    at_least: bool = True
    spec: str = ".2f"

    def line(self, row: Row) -> str:
        """Return the line of a table."""
        value = self.measured(row)
        met = value >= self.limit if self.at_least else value <= self.limit
        wanted = f"{'at least' if self.at_least else 'at most'} {self.limit:{self.spec}}"
        cells = [self.name, wanted, f"{value:{self.spec}}", "yes" if met else "**no**", f"`{self.benchmark}`"]
        return table_line(cells)


def _full(value: str) -> Callable[[Row], float]:
    """Return the least over pass sizes of a figure of full forward passes."""
    return lambda row: min(found[value] for found in row["full_forward"])


def _over(place: int, way: str) -> Callable[[Row], float]:
    return lambda row: float(row["candidates"][place]["population_over"][way])


def _at(*path: str) -> Callable[[Row], float]:
    def value(row: Any) -> float:
        for name in path:
            row = row[name]
        return float(row)

    return value


def _writing(row: Row) -> float:
    """Return the median of new tokens/s over a cache of fixed size, which writes answers on a GPU."""
    found = [r for r in row["writing"] if (r["cache"], r["batch"]) == ("fixed", BATCH)]
    return float(found[0]["new_tokens_per_s"][0])


def _seven_modules(row: Row) -> float:
    return 100 * max(found["seven_modules_overhead"] for found in row["full_forward"])


def _objective(row: Row) -> float:
    of_pass = row["objective"]["of_pass"]  # the first lines have it by itself alone, on an idle device
    return float(100 * of_pass.get("objective_behind_a_pass", of_pass["objective"]))


GOALS = (
    Goal("population's tokens/s over the compiled base's", FORWARD, _full("of_base"), 0.975, spec=".3f"),
    Goal("model FLOP/s over the matrix rate of the run", FORWARD, _full("of_matrix_rate"), 0.8, spec=".3f"),
    Goal("all seven modules at rank 16: overhead, %", FORWARD, _seven_modules, 20, False, ".1f"),
    Goal("candidates/s, 256 tokens, over PEFT linear", FORWARD, _over(FEW, "peft_linear"), 25, spec=".1f"),
    Goal("the same over LoraHub", FORWARD, _over(FEW, "lorahub"), 8, spec=".1f"),
    Goal("the same over a dense merge", FORWARD, _over(FEW, "dense"), 1.5),
    Goal("candidates/s, 3,456 tokens, over PEFT linear", FORWARD, _over(MANY, "peft_linear"), 5),
    Goal("the same over PEFT cat", FORWARD, _over(MANY, "peft_cat"), 10, spec=".1f"),
    Goal("the same over LoraHub", FORWARD, _over(MANY, "lorahub"), 2),
    Goal(
        "bfloat16 error over the base's own", FORWARD, _at("exactness", "error_over_base"), 1.05, False, ".3f"
    ),
    Goal("float32 against a dense merge", FORWARD, _at("exactness", "float32_error"), 1e-5, False, ".1e"),
    Goal(
        "objective, % of a forward pass",
        STEP,
        _objective,
        1,
        False,
    ),
    Goal("gradient of all coefficients, forward passes", STEP, _at("gradient", "forwards"), 2.3, False),
    Goal("its peak memory, GiB", STEP, _at("gradient", "peak_gib"), 46, False, ".1f"),
    Goal(f"new tokens/s, batch {BATCH}", ANSWERS, _writing, 2_000, spec=",.0f"),
    Goal("807 queries, seconds", ANSWERS, lambda row: float(row["file_s"][0]), 120, False, ".0f"),
)


def speed_text(rows: Sequence[Row]) -> str:
    """Return the table of goals and what else was measured; only of benchmarks that ran on a GPU."""
    latest: Mapping[str, Row] = {row["benchmark"]: row for row in rows if not row.get("tiny")}
    goals = [goal for goal in GOALS if goal.benchmark in latest]
    lines = table_head(["goal", "wanted", "measured", "met", "command"])
    lines += [goal.line(latest[goal.benchmark]) for goal in goals]
    used = [latest[name] for name in dict.fromkeys(goal.benchmark for goal in goals)]
    machines = "; ".join(dict.fromkeys(f"{row['device']} ({row['machine']})" for row in used))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in used))
    return "\n\n".join(["\n".join(lines), *_details(latest), f"Devices: {machines}. Commits: {commits}."])


def _details(latest: Mapping[str, Row]) -> list[str]:
    """Return sentences on what the goals are measured against."""
    found = []
    if FORWARD in latest:
        row = latest[FORWARD]
        found.append("Of two sizes of pass, the worse counts.")
        for full in row["full_forward"]:
            rates = ", ".join(f"{name} {rate:,}" for name, rate in full["tokens_per_s"].items())
            found.append(
                f"Tokens/s at {full['tokens']:,} tokens a pass: {rates}; a product of large matrices, timed "
                f"after them, runs at {full['matrix_tflops']:.0f} TFLOP/s, the population's MFU is "
                f"{full['mfu_of_989']:.3f} of 989."
            )
        for part in row["candidates"]:
            rates = ", ".join(f"{way} {rate:.2f}" for way, rate in part["candidates_per_s"].items())
            found.append(f"Candidates/s at {part['tokens_a_candidate']:,} tokens each: {rates}.")
        exactness = row["exactness"]
        low, high = exactness["error_over_base_spread"]
        found.append(
            f"The bfloat16 error is {low:.3f} to {high:.3f} of the base's own over five draws, uncompiled "
            f"{exactness['error_over_base_eager']:.3f}; it would be {exactness['floor_over_base']:.3f} with "
            "the touched layers computed in float32 and rounded once. "
            f"The float32 base differs from itself, a row at a time, by {exactness['float32_floor']:.1e} "
            "(relative root mean square of logits)."
        )
    if STEP in latest:
        rates = latest[STEP]["candidates"]["candidates_per_s"]
        text = ", ".join(f"{way} {rate:.2f}" for way, rate in rates.items())
        found.append(f"With packing, scored positions and the objective, candidates/s: {text}.")
    return found


def write_report() -> None:
    """Put the table into the document (InputError where nothing was measured)."""
    rows = [row for row in read_rows(RESULTS) if row["benchmark"] in (FORWARD, STEP, ANSWERS)]
    if not any(not row.get("tiny") for row in rows):
        raise InputError(f"{RESULTS}: no speed was measured. Run python -m benchmarks.{FORWARD} on a GPU.")
    replace_section(DOCUMENT, SECTION, speed_text(rows))
    print("report:", DOCUMENT)


def main() -> int:
    """Report; return 0, or 2 where there is nothing to report."""
    return run_and_report(lambda: 0, write_report, only_report=True)


if __name__ == "__main__":
    sys.exit(main())
