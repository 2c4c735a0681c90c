"""Options of the commands that hold a finished run to account, and those that commands share.

Knows argparse; not what a command does.
"""

import argparse
from pathlib import Path

from search.bundle import QUERIES_AHEAD


def add_verify_options(command: argparse.ArgumentParser) -> None:
    """Take a run's folder, and how much of it is done again."""
    command.add_argument("folder", type=Path, metavar="RUN", help="folder that holds trace.jsonl")
    command.add_argument("--refine", action="store_true", help="take the winner's gradient steps again, too")


def add_submission_options(command: argparse.ArgumentParser) -> None:
    """Take the folder of a run and that of the submission."""
    command.add_argument("folder", type=Path, metavar="RUN", help="folder that llm_merging/main.py wrote")
    command.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR")
    add_queries_ahead(command)


def add_queries_ahead(command: argparse.ArgumentParser) -> None:
    """Take how many queries a bundle leaves time for."""
    command.add_argument(
        "--queries-ahead",
        type=int,
        default=QUERIES_AHEAD,
        metavar="N",
        help="queries that time is left for, answered one at a time after the merge; default: %(default)s",
    )
