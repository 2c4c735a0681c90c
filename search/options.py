"""The commands of `python -m search`: their names, words of help, examples and options.

Knows argparse and which outputs can be written; not what a command does.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from search.bundle import QUERIES_AHEAD
from search.errors import InputError
from search.workspace import refuse_unwritable


class Command(NamedTuple):
    """A command, as its help shows it."""

    help: str
    example: str
    take: Callable[[argparse.ArgumentParser], None]
    """Adds its options."""


def add_config_options(command: argparse.ArgumentParser) -> None:
    """Take a configuration, and settings that replace its own."""
    command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    command.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="section.key=value",
        help="settings that replace the file's",
    )


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Take what is run, and where it is written."""
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="default: output/search/<name of the config>"
    )
    add_config_options(command)


def add_pin_options(command: argparse.ArgumentParser) -> None:
    """Take a configuration, and whether it is changed."""
    command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    command.add_argument("--write", action="store_true", help="put them into the file as each `revision:`")


def add_resume_options(command: argparse.ArgumentParser) -> None:
    """Take a run's folder."""
    command.add_argument("folder", type=Path, metavar="DIR", help="that holds trace.jsonl")


def add_trace_options(command: argparse.ArgumentParser) -> None:
    """Take traces, and what is made of them."""
    command.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    command.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE")


def add_bundle_options(command: argparse.ArgumentParser) -> None:
    """Take what is bundled."""
    default = Path("configs/mistral-7b.yaml")
    command.add_argument("config", type=Path, nargs="?", default=default, metavar="CONFIG", help=str(default))
    command.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE")
    command.add_argument("--prior", type=Path, metavar="FILE", help="of `priors`, known by adapters' names")
    _add_queries_ahead(command)


def add_merge_options(command: argparse.ArgumentParser) -> None:
    """Take what is merged, and into what."""
    command.add_argument("source", type=Path, metavar="TRACE|coefficients.json|DIR")
    command.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR")
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--rank", type=int, metavar="R", help="cut each module to R by SVD; the error is told")
    shape.add_argument("--dense", action="store_true", help="fold into the base: a whole model")
    command.add_argument("--dtype", default="auto", help="of the weights written; default: %(default)s")
    command.add_argument("--allow-pickle", action="store_true", help="read adapter_model.bin too")


def add_verify_options(command: argparse.ArgumentParser) -> None:
    """Take a run's folder, and how much of it is done again."""
    command.add_argument("folder", type=Path, metavar="RUN", help="folder that holds trace.jsonl")
    command.add_argument("--refine", action="store_true", help="take the winner's gradient steps again, too")


def add_submission_options(command: argparse.ArgumentParser) -> None:
    """Take the folder of a run and that of the submission."""
    command.add_argument("folder", type=Path, metavar="RUN", help="folder that llm_merging/main.py wrote")
    command.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR")
    _add_queries_ahead(command)


def _add_queries_ahead(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--queries-ahead",
        type=int,
        default=QUERIES_AHEAD,
        metavar="N",
        help="queries that time is left for, answered one at a time after the merge; default: %(default)s",
    )


def refuse_unfit_output(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments; an -o that the command reads, or that cannot be written, is an InputError."""
    output: Path | None = getattr(arguments, "output", None)
    if output is None:
        return arguments
    read = [getattr(arguments, name, None) for name in ("config", "prior", "source")]
    for path in [*read, *getattr(arguments, "traces", ())]:
        if path and output.is_file() and path.is_file() and output.samefile(path):
            raise InputError(f"-o {output}: it is read here, and would be replaced. Choose another file.")
    makes_folder = arguments.command in ("merge", "submission")
    if os.path.exists(output) and os.path.isdir(output) != makes_folder:
        found = "a file, expected a folder" if makes_folder else "a folder, expected a file"
        raise InputError(f"-o {output}: is {found}. Choose another -o.")
    refuse_unwritable(output if makes_folder else output.parent, "-o")
    return arguments


COMMANDS = {
    "run": Command(
        "search for coefficients and write the merged adapter; go on where the trace in DIR ends",
        "run configs/demo.yaml --set search.seed=1 search.time_box_s=600 --out output/seed1",
        add_run_options,
    ),
    "doctor": Command(
        "say what a run would do, what it costs here and what fits the time box; search nothing",
        "doctor configs/demo.yaml",
        add_config_options,
    ),
    "pin": Command(
        "ask the hub which commits a configuration's hub ids are at, and whether it has those that are given",
        "pin configs/mistral-7b.yaml --write",
        add_pin_options,
    ),
    "bundle": Command(
        "write a run as one Python file for the competition's kit",
        "bundle configs/mistral-7b.yaml -o MyMerge.py",
        add_bundle_options,
    ),
    "resume": Command(
        "go on with the run in DIR, with the configuration that it was begun with",
        "resume output/seed1",
        add_resume_options,
    ),
    "priors": Command(
        "learn a start and a spread for later searches from finished runs",
        "priors output/seed*/trace.jsonl -o configs/priors/mine.json",
        add_trace_options,
    ),
    "merge": Command(
        "merge by recorded coefficients: one exact adapter, one of a smaller rank, or a dense model",
        "merge output/seed1/coefficients.json -o merged --rank 64",
        add_merge_options,
    ),
    "report": Command(
        "draw what traces hold, as one self-contained HTML file",
        "report output/seed1/trace.jsonl -o report.html",
        add_trace_options,
    ),
    "verify": Command(
        "hold a finished run against its inputs: hashes, versions, the search replayed, the winner's loss",
        "verify output/my_merge",
        add_verify_options,
    ),
    "submission": Command(
        "make the folder to hand in: bundle, checked answers, trace, coefficients, and how each rule is kept",
        "submission output/my_merge -o submission",
        add_submission_options,
    ),
}
"""By name, in the order in which help lists them."""
