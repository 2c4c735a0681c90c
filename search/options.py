"""The options of those commands of `python -m search` that have several, or share them.

Knows argparse; not what a command does.
"""

import argparse
from pathlib import Path

from search.bundle import QUERIES_AHEAD
from search.errors import InputError


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


def refuse_replacing(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments; an -o that is a file which the command reads is an InputError."""
    read = [getattr(arguments, name, None) for name in ("config", "prior", "source")]
    for path in [*read, *getattr(arguments, "traces", ())]:
        output = getattr(arguments, "output", None)
        if output and path and output.is_file() and path.is_file() and output.samefile(path):
            raise InputError(f"-o {output}: it is read here, and would be replaced. Choose another file.")
    return arguments
