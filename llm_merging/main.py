"""Merge the experts, then answer the queries: `python llm_merging/main.py`.

Knows the command line, the order of the steps and the exit codes (0 done, 2 bad input, 130 interrupted). What
can be refused is refused before the merge starts.
"""
# ruff: noqa: E402  the clock starts, and the repository is put on the path, before the slow imports

import argparse
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

IMPORTED_S = time.monotonic()
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds of imports ends without a traceback
warnings.filterwarnings(
    "ignore", message="Could not import matplotlib"
)  # cma, of plots that nobody asked for
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers.utils import logging as transformers_logging

from llm_merging.answered import Account, record_answers
from llm_merging.data import Query, read_queries
from llm_merging.deadline import UNKNOWN, AnswerRates, Deadline
from llm_merging.evaluation import (
    answer_queries,
    estimate_seconds,
    measure_rates,
    write_predictions,
)
from llm_merging.merging import METHODS, Merges
from llm_merging.merging.Merges import REPOSITORY, choose_config
from llm_merging.sizing import check_sizes, size_queries
from search.config import SearchConfig, load_config
from search.delivery import ADAPTER_FOLDER
from search.errors import InputError
from search.hub import keep_download_bars
from search.timebox import LONGEST_START_S, PROCESS_END_S, seconds_of_process
from search.workspace import refuse_input_folders, refuse_unwritable

AGE_S = seconds_of_process() if __name__ == "__main__" else math.inf
STARTED_S = time.monotonic() - AGE_S if AGE_S < LONGEST_START_S else IMPORTED_S
"""When the process began, on time.monotonic's clock: starting Python is of the time box too."""
ANSWERS_SPARE_SHARE = 0.035
"""Of the time box, what answers leave for writing them, beside what the process takes to end."""

Datasets = dict[Path, list[Query]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and turn bad input and Ctrl-C into one line and an exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    quiet_libraries()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run(parse_arguments(argv))
    except InputError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def quiet_libraries() -> None:
    """Keep stderr for what a user can act on."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    keep_download_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")


def run(arguments: argparse.Namespace) -> int:
    """Check everything, merge, answer; return the exit code."""
    config = read_config(arguments)
    datasets = read_datasets(arguments.dataset_filepaths)
    check_output(arguments.output_folder, arguments.method, list(datasets), config.sources)
    method = METHODS[arguments.method](arguments.method, config)
    method.output = arguments.output_folder / arguments.method
    method.skip_first_choice_token = arguments.choice_scoring == "kit"
    check_context(method, datasets)
    method.check_adapters()
    answers = Answers(method, datasets)
    method.gone_s, method.measure_answers_s = seconds_gone, answers.measure

    method.merge()
    method.save_model(method.output)
    tell_merge(method)
    account = answers.write(arguments.output_folder, config.search.time_box_s)
    record_answers(method, account, seconds_gone())
    ended = f", search ended by {method.ended_by}" if method.ended_by else ""
    print(f"done in {seconds_gone():.0f} s{ended}")
    return 130 if method.ended_by == "interrupt" else 0


@dataclass(slots=True)
class Answers:
    """All queries, what answering them takes, and when they must be answered."""

    method: Merges
    datasets: Datasets
    rates: AnswerRates = UNKNOWN
    """As last measured."""

    def measure(self) -> float:
        """Measure what a token takes, on a few batches, and return the seconds of all answers."""
        self.rates = measure_rates(self.method, self._queries())
        return estimate_seconds(self.method, self._queries(), self.rates)

    def write(self, folder: Path, time_box_s: float) -> Account:
        """Answer the queries of all files together, within the time box, and write a file for each."""
        deadline, started_s = self._deadline(time_box_s), seconds_gone()
        predictions = answer_queries(self.method, self._queries(), deadline=deadline)
        seconds = seconds_gone() - started_s
        files = [(path, folder / path.name, len(queries)) for path, queries in self.datasets.items()]
        for path, queries in self.datasets.items():
            own, predictions = predictions[: len(queries)], predictions[len(queries) :]
            write_predictions(folder / path.name, queries, own)
            print(f"answered: {folder / path.name} ({len(queries)} rows)")
        print(f"answers took {seconds:.1f} s, of the time box are {time_box_s - seconds_gone():.1f} s left")
        if told := deadline.describe():
            print(told)
        return Account(files, deadline.n_shortened, deadline.n_guessed, seconds)

    def _queries(self) -> list[Query]:
        return [query for queries in self.datasets.values() for query in queries]

    def _deadline(self, time_box_s: float) -> Deadline:
        """Return when all answers must be there: never, where it is too late for that already."""
        end_s = (1 - ANSWERS_SPARE_SHARE) * time_box_s - PROCESS_END_S
        late_s = seconds_gone() - end_s
        if late_s >= 0:
            logging.getLogger(__name__).warning(
                "the time box of %g s was over before the first answer: all are given, late", time_box_s
            )
        left_s = (lambda: math.inf) if late_s >= 0 else lambda: end_s - seconds_gone()
        return Deadline(left_s, self.rates, self.method.max_gen_len)


def seconds_gone() -> float:
    """Seconds since the process began."""
    return time.monotonic() - STARTED_S


def tell_merge(method: Merges) -> None:
    """Print what was merged, and what Ctrl-C does from here on."""
    print(*filter(None, [method.report, f"merged: {method.output}"]), sep="\n", flush=True)
    if method.ended_by == "interrupt":
        again = "the best merge so far answers now; Ctrl-C again to stop without answers"
        print(f"interrupted: {again}", file=sys.stderr)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; mistakes are an InputError."""

    class OneLineParser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}. See --help.")

    parser = OneLineParser(description=__doc__.split(":")[0])
    parser.add_argument(
        "-m", "--method", choices=sorted(METHODS), default="my_merge", help="default: %(default)s"
    )
    parser.add_argument("--config", type=Path, help="YAML file; default: by the size of the CUDA device")
    parser.add_argument(
        "--dataset_filepaths", type=Path, nargs="+", metavar="CSV", help="default: data/test.csv"
    )
    parser.add_argument("--output_folder", type=Path, default=Path("output"), help="default: %(default)s")
    parser.add_argument("--time-box", type=float, metavar="SECONDS", help="from start to last answer")
    parser.add_argument("--seed", type=int, help="of the search")
    parser.add_argument(
        "--choice-scoring",
        choices=["full", "kit"],
        default="full",
        help="kit leaves out each choice's first token",
    )
    return parser.parse_args(argv)


def read_config(arguments: argparse.Namespace) -> SearchConfig:
    """Load the configuration asked for or this machine's default, and say which and why in one line."""
    default, reason = choose_config()
    path, reason = (arguments.config, "--config") if arguments.config else (default, reason)
    print(f"config: {path} ({reason}; choose another with --config FILE.yaml)", flush=True)
    asked = {"search.time_box_s": arguments.time_box, "search.seed": arguments.seed}
    return load_config(path, [f"{key}={value}" for key, value in asked.items() if value is not None])


def read_datasets(paths: Sequence[Path] | None) -> Datasets:
    """Read the query files, by default data/test.csv of the working directory, else of the repository."""
    default = Path("data/test.csv")
    paths = paths or [default if default.exists() else REPOSITORY / default]
    datasets: Datasets = {}
    for path in paths:
        twin = next((other for other in datasets if other.name == path.name), None)
        if twin is not None:
            raise InputError(
                f"{twin} and {path} would both be answered into {path.name}. Rename one of them."
            )
        datasets[path] = read_queries(path)
    return datasets


def check_output(folder: Path, method: str, dataset_paths: Sequence[Path], sources: Sequence[str]) -> None:
    """Refuse a folder that cannot be written, or where queries, base or adapters lie (InputError)."""
    for path in dataset_paths:
        target = folder / path.name
        if target.resolve() == path.resolve():
            raise InputError(
                f"the answers would replace the queries in {path}. Choose another --output_folder."
            )
        if target.is_dir() or path.name == method:
            raise InputError(
                f"cannot write {target}: a folder has that name. Choose another --output_folder."
            )
    needed = folder, folder / method
    for one in needed:
        refuse_unwritable(one, "--output_folder")
    refuse_input_folders((*needed, folder / method / ADAPTER_FOLDER), sources, "--output_folder")


def check_context(method: Merges, datasets: Datasets) -> None:
    """Refuse queries longer than the base can read, with its config and tokenizer alone (InputError)."""
    context = method.context()
    method._load_tokenizer()
    for path, queries in datasets.items():
        sized = size_queries(queries, method.input_tokenizer, method.target_tokenizer, method.max_gen_len)
        try:
            check_sizes(sized, context or sys.maxsize)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
