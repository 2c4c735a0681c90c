"""The command: `python -m search run CONFIG [--set section.key=value ...] [--out DIR]`.

Knows arguments, exit codes (0 done, 2 bad input, 130 interrupted) and what is printed: one JSON line on
stdout at the end, everything else on stderr.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from search.config import load_config
from search.errors import InputError
from search.run import run_search


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, and turn bad input and Ctrl-C into one line and an exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        return run_command(parse_command(argv))
    except InputError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; mistakes are an InputError."""

    class RefusingParser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}. See --help.")

    parser = RefusingParser(prog="python -m search", description="Merge LoRA experts without data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="search for coefficients, and write the merged adapter")
    run.add_argument("config", type=Path, help="YAML file")
    run.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="section.key=value",
        help="settings that replace the file's",
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="default: output/search/<name of the config>")
    return parser.parse_args(argv)


def run_command(arguments: argparse.Namespace) -> int:
    """Run one search; return the exit code."""
    config = load_config(arguments.config, arguments.overrides)
    output = arguments.out or Path("output/search") / arguments.config.stem
    result = run_search(config, output=output, reserve_s=time.process_time(), resume=True)
    print(result.report, file=sys.stderr)
    outcome = {
        "output": str(output),
        "winner": result.winner,
        "loss": result.loss,
        "evaluations": result.evaluations,
        "ended_by": result.ended_by,
    }
    print(json.dumps(outcome))
    return 130 if result.ended_by == "interrupt" else 0


if __name__ == "__main__":
    sys.exit(main())
