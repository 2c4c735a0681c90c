"""Does the label-free loss rank merges as true accuracy does, and does a long search still find good ones?

`python -m benchmarks.fidelity --jobs 28 --parts rankings searches` measures merges of several distributions
on each variant of the zoo, by labels and by every objective on prompts of every source, and searches for
long; it appends lines of JSON to benchmarks/results/fidelity.jsonl. What is there already, of the same code
and settings, is not done again: after an interruption, or when --seconds are over, the same command goes on.
Then, or with --report from those lines alone, it writes tables and figures. Knows what is done in which
order, not how.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.command import run_and_report
from benchmarks.device_pool import DevicePool
from benchmarks.environment import ROOT, code_hash, describe_machine
from benchmarks.fidelity_collect import measure_batch
from benchmarks.fidelity_plan import Wanted
from benchmarks.fidelity_plots import draw_all
from benchmarks.fidelity_rows import StatisticsJob, make_rows
from benchmarks.fidelity_scene import SOURCES, PromptJob, Scene, write_scene_prompts
from benchmarks.fidelity_tables import TERMS, Lines
from benchmarks.goodhart_tables import fidelity_text, limits
from benchmarks.long_search import SearchJob, long_search, visited_merges
from benchmarks.plots import write_svg
from benchmarks.rows import Row, append_row, read_rows
from benchmarks.sections import replace_section
from benchmarks.zoo.sets import VARIANTS, write_config
from search.config import config_hash, load_config
from search.errors import InputError

OUT = ROOT / "benchmarks/results/fidelity.jsonl"
TEMPLATE = ROOT / "configs/demo.yaml"
DOCUMENT, SECTION, FIGURES = ROOT / "docs/METHOD.md", "fidelity", "figures"
PARTS = ("rankings", "searches")
EXAMPLES = {"cuda": 150, "cpu": 2}
"""Of each task, that accuracies are measured on."""


class Run:
    """One go at what is wanted and not there yet."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Write a configuration for each variant; read the lines that are there."""
        self._started_s, self._arguments = time.time(), arguments
        self._stop_at = self._started_s + arguments.seconds
        device, folder = arguments.device, arguments.arrays
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        n_examples = arguments.examples or EXAMPLES[device]
        self._scenes = [
            Scene(v, folder / f"{v}.yaml", folder, device, n_examples) for v in arguments.variants
        ]
        for scene in self._scenes:
            write_config(scene.config, scene.experts, generated=folder, template=TEMPLATE)
        self._wanted = Wanted(
            n_merges=arguments.merges,
            per_adapter=arguments.prompts,
            evaluations=arguments.evaluations,
            seeds=tuple(arguments.seeds),
        )
        self._device, self._rows, self._is_described = device, read_rows(arguments.out), False
        config = config_hash(load_config(TEMPLATE))
        self._same = {"code_sha256": code_hash()[:16], "config_sha256": config[:16]}

    def go(self) -> int:
        """Do it; return how many jobs failed."""
        with DevicePool(self._arguments.jobs, self._device) as pool:
            if "rankings" in self._arguments.parts:
                self._rank_merges(pool)
            if "searches" in self._arguments.parts:
                self._search(pool)
            return pool.n_failed

    def _rank_merges(self, pool: DevicePool) -> None:
        """Measure merges of the variants that have no lines yet, and append the lines."""
        scenes = [s for s in self._scenes if not all(self._is_done(self._ranking(s, x)) for x in SOURCES)]
        wanted = self._wanted
        self._write_prompts(
            pool,
            [job for s in scenes for job in (*wanted.ranking_prompts(s), *wanted.searched_prompts(s, [0]))],
        )
        searches = [job for scene in scenes for job in wanted.visiting(scene)]
        visited = dict(pool.run(visited_merges, searches, self._stop_at))
        self._tell(f"{len(visited)} short searches are done")
        seen = {
            scene: [visited[job] for job in searches if job.scene == scene and job in visited]
            for scene in scenes
        }
        batches = [batch for scene in scenes if seen[scene] for batch in wanted.batches(scene, seen[scene])]
        paths: dict[Scene, list[Path]] = {scene: [] for scene in scenes}
        for n_done, (batch, path) in enumerate(pool.run(measure_batch, batches, self._stop_at), start=1):
            paths[batch.scene].append(path)
            if n_done % 10 == 0 or n_done == len(batches):
                self._tell(f"{n_done} of {len(batches)} batches of merges are measured")
        self._append_rankings(pool, paths)

    def _append_rankings(self, pool: DevicePool, paths: Mapping[Scene, Sequence[Path]]) -> None:
        jobs = [
            StatisticsJob(scene, self._wanted.per_adapter, source, tuple(sorted(own)))
            for scene, own in paths.items()
            for source in SOURCES
            if own
        ]
        for job, rows in pool.run(make_rows, jobs):
            for row in rows:
                is_whole = row["n_merges"] >= self._wanted.n_merges
                self._append({**self._ranking(job.scene, job.source), **row, "is_whole": is_whole})
        self._tell(f"{len(jobs)} rankings are made")

    def _search(self, pool: DevicePool) -> None:
        """Do the long searches that are missing; append each as it ends."""
        wanted = self._wanted
        jobs = [
            SearchJob(scene, plan, wanted.search_prompts, self._stop_at)
            for plan in wanted.searches()
            for scene in self._scenes
        ]
        jobs = [job for job in jobs if not self._is_done(self._searched(job))]
        scenes = dict.fromkeys(job.scene for job in jobs)
        self._write_prompts(pool, [p for s in scenes for p in wanted.searched_prompts(s, wanted.seeds)])
        for n_done, (job, found) in enumerate(pool.run(long_search, jobs, self._stop_at), start=1):
            if found:
                self._append({**self._searched(job), **found})
                self._tell(f"{n_done} of {len(jobs)} searches: {format_search(job, found)}")

    def _write_prompts(self, pool: DevicePool, jobs: Sequence[PromptJob]) -> None:
        n_written = len(list(pool.run(write_scene_prompts, list(dict.fromkeys(jobs)), self._stop_at)))
        self._tell(f"{n_written} sets of prompts are there")

    def _identify(self, scene: Scene) -> Row:
        """Return what the lines of a variant start with."""
        measured = {"device": scene.device, "n_examples": scene.n_examples}
        return {"benchmark": "fidelity", "experts": scene.experts, **self._same, **measured}

    def _ranking(self, scene: Scene, source: str) -> Row:
        wanted = {"wanted": self._wanted.n_merges, "per_adapter": self._wanted.per_adapter}
        return {**self._identify(scene), "part": "ranking", "source": source, **wanted, "is_whole": True}

    def _searched(self, job: SearchJob) -> Row:
        plan = asdict(job.plan)
        return {**self._identify(job.scene), "part": "search", **plan, "n_prompts": job.n_prompts}

    def _is_done(self, identity: Row) -> bool:
        return any(row.items() >= identity.items() for row in self._rows if row.get("ended_by") != "seconds")

    def _append(self, row: Row) -> None:
        """Write a line, before the first one where and when this is."""
        if not self._is_described:
            self._is_described = True
            self._append(self._describe())
        append_row(self._arguments.out, row)

    def _describe(self) -> Row:
        is_cuda, jobs = self._device == "cuda", self._arguments.jobs
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if is_cuda else None
        return {
            "benchmark": "fidelity",
            "part": "environment",
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started_s)),
            "jobs": jobs,
            "device_name": gpus,
            **describe_machine(),
        }

    def _tell(self, text: str) -> None:
        print(f"{time.time() - self._started_s:6.0f} s  {text}", file=sys.stderr, flush=True)


def format_search(job: SearchJob, found: Row) -> str:
    """One line for people, shares in percent."""
    plan, curve = job.plan, found["curve"]
    weights = {name: getattr(plan, name) for name in TERMS}
    terms = "".join(f" {name} {weight:g}" for name, weight in weights.items() if weight)
    most, last = 100 * max(curve["held_in_N"]), {name: values[-1] for name, values in curve.items()}
    return (
        f"{job.scene.experts:9}{plan.objective}{terms}, {plan.space}, seed {plan.seed}: held-in {most:.1f}, "
        f"at the end {100 * last['held_in_N']:.1f}, held-out {100 * last['held_out']:.1f}, loss "
        f"{last['loss']:.4f}; {last['evaluations']:,} evaluations in {found['seconds']:.0f} s, ended by "
        f"{found['ended_by']}"
    )


def write_report(out: Path) -> None:
    """Make tables and figures of the recorded lines alone."""
    lines = Lines(read_rows(out))
    variants = lines.variants(VARIANTS)
    if not variants:
        raise InputError(f"{out}: nothing measured, nothing to report. Run without --report first.")
    for line in limits(lines, variants):
        print(line)
    is_own = out.resolve() == OUT
    folder = DOCUMENT.parent / FIGURES if is_own else out.parent
    for name, picture in draw_all(lines, variants).items():
        write_svg(picture, folder / f"{name}.svg")
    text = fidelity_text(lines, variants, FIGURES if is_own else ".")
    if is_own:
        replace_section(DOCUMENT, SECTION, text)
        print(f"report: {DOCUMENT}, {folder}")
    else:
        print(text, f"figures: {folder}", sep="\n\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--merges", type=int, default=600, help="of each variant (default %(default)s)")
    add("--prompts", type=int, default=32, help="an adapter, from each source (default %(default)s)")
    add("--examples", type=int, help="a task, for accuracies (default 150, on a CPU 2)")
    add("--parts", nargs="+", choices=PARTS, default=["rankings"], help="default %(default)s")
    add("--evaluations", type=int, default=10_000, help="of a long search (default %(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="of long searches")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--jobs", type=int, default=1, help="processes, over all GPUs (default: none but this one)")
    add("--seconds", type=float, default=float("inf"), help="after which nothing new is started")
    add("--out", type=Path, default=OUT, help="JSON lines (default %(default)s)")
    add("--arrays", type=Path, default=ROOT / "build/fidelity", help="folder of prompts and arrays")
    add("--report", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; return 0, 1 if a job failed, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    return run_and_report(
        lambda: Run(arguments).go(), lambda: write_report(arguments.out), only_report=arguments.report
    )


if __name__ == "__main__":
    sys.exit(main())
