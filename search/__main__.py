"""The command `python -m search`, and what each of its subcommands does.

Knows arguments, exit codes (0 done, 1 failed, 2 bad input, 130 interrupted) and what is printed: one line of
JSON on stdout at the end, everything else on stderr.
"""

import argparse
import json
import logging
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging as transformers_logging

from search.bundle import write_bundle
from search.config import SearchConfig, load_config, rebuild_config
from search.diagnosis_text import describe_diagnosis, diagnosis_document
from search.doctor import examine
from search.errors import InputError
from search.export import export_merge
from search.files import atomic_write
from search.handing_in import hand_in
from search.hub import keep_download_bars
from search.options import COMMANDS, refuse_unfit_output
from search.pin import pin_config
from search.prior_learning import learn_prior
from search.priors import save_prior
from search.recorded import TRACE_FILE
from search.report import write_report
from search.run import run_search
from search.timebox import seconds_of_process
from search.trace import Trace
from search.verify import conclude, verify_run

Outcome = tuple[dict[str, Any], int]
"""What the JSON line says, and the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, and turn bad input and Ctrl-C into one line and an exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    quiet_other_libraries()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is half-written goes
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        arguments = parse_command(argv)
        document, code = DONE_BY[arguments.command](arguments)
    except InputError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(document))
    return int(code)


def quiet_other_libraries() -> None:
    """Keep stderr for what a user can act on."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    keep_download_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; mistakes are an InputError."""

    class RefusingParser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            order = " (--set takes all words after it: put CONFIG first)" if "CONFIG" in message else ""
            raise InputError(f"{message}{order}. See --help.")

    parser = RefusingParser(
        prog="python -m search",
        description="Merge LoRA experts of one base model without data.",
        epilog="Each command ends with one line of JSON on stdout. COMMAND --help has an example.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        about = command.help[0].upper() + command.help[1:] + "."
        example = f"example: python -m search {command.example}"
        command.take(commands.add_parser(name, help=command.help, description=about, epilog=example))
    return refuse_unfit_output(parser.parse_args(argv))


def verify_command(arguments: argparse.Namespace) -> Outcome:
    """Verify a run, a line a check."""
    checks = []
    for check in verify_run(arguments.folder, refine=arguments.refine):
        checks.append(check)
        print(check, file=sys.stderr, flush=True)
    document = conclude(arguments.folder, checks)
    return document, 0 if document["ok"] else 1


def submission_command(arguments: argparse.Namespace) -> Outcome:
    """Write a submission's folder."""
    return hand_in(arguments.folder, arguments.output, queries_ahead=arguments.queries_ahead), 0


def run_command(arguments: argparse.Namespace) -> Outcome:
    """Run one search, or go on with it."""
    config = load_config(arguments.config, arguments.overrides)
    return _search(config, arguments.out or Path("output/search") / arguments.config.stem)


def pin_command(arguments: argparse.Namespace) -> Outcome:
    """Print commits, and write them."""
    pins = pin_config(arguments.config, write=arguments.write)
    for pin in pins:
        print(f"{pin.what} ({pin.source}): {pin.revision or 'main'} is {pin.commit}", file=sys.stderr)
    loose = sum(pin.revision != pin.commit for pin in pins)
    return {
        "commits": {pin.source: pin.commit for pin in pins},
        "written": loose if arguments.write else 0,
    }, 0


def bundle_command(arguments: argparse.Namespace) -> Outcome:
    """Write a submission."""
    text = write_bundle(load_config(arguments.config), arguments.prior, arguments.queries_ahead)
    with atomic_write(arguments.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return {"output": str(arguments.output), "lines": len(text.splitlines())}, 0


def resume_command(arguments: argparse.Namespace) -> Outcome:
    """Go on with the run of a folder."""
    path = arguments.folder / TRACE_FILE
    header = Trace.load(path).header
    config = rebuild_config(header.get("config"), str(path), header.get("folder"))
    return _search(config, arguments.folder)


def _search(config: SearchConfig, output: Path) -> Outcome:
    result = run_search(config, output=output, reserve_s=seconds_of_process(), resume=True)
    with suppress(OSError):  # whoever read it may be gone; the run is done
        print(result.report, file=sys.stderr, flush=True)
    document = {
        "output": str(output),
        "winner": result.winner,
        "loss": result.loss if math.isfinite(result.loss) else None,  # NaN is no JSON
        "evaluations": result.evaluations,
        "ended_by": result.ended_by,
    }
    return document, 130 if result.interrupted else 0


def doctor_command(arguments: argparse.Namespace) -> Outcome:
    """Examine what a run would do."""
    diagnosis = examine(load_config(arguments.config, arguments.overrides), reserve_s=seconds_of_process())
    print(describe_diagnosis(diagnosis), file=sys.stderr)
    return diagnosis_document(diagnosis), 0


def priors_command(arguments: argparse.Namespace) -> Outcome:
    """Learn a prior."""
    prior = learn_prior(arguments.traces)
    save_prior(prior, arguments.output)
    return {
        "output": str(arguments.output),
        "runs": len(prior.runs),
        "adapters": len(prior.names),
        "groups": len(prior.groups),
    }, 0


def merge_command(arguments: argparse.Namespace) -> Outcome:
    """Write a merge in the form asked for."""
    result = export_merge(
        arguments.source,
        arguments.output,
        rank=arguments.rank,
        dense=arguments.dense,
        allow_pickle=arguments.allow_pickle,
        dtype=arguments.dtype,
    )
    return asdict(result), 0


def report_command(arguments: argparse.Namespace) -> Outcome:
    """Write a report."""
    write_report(arguments.traces, arguments.output)
    return {"output": str(arguments.output), "traces": [str(path) for path in arguments.traces]}, 0


DONE_BY: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "run": run_command,
    "doctor": doctor_command,
    "pin": pin_command,
    "bundle": bundle_command,
    "resume": resume_command,
    "priors": priors_command,
    "merge": merge_command,
    "report": report_command,
    "verify": verify_command,
    "submission": submission_command,
}
"""Of `COMMANDS`, by name."""

if __name__ == "__main__":
    sys.exit(main())
