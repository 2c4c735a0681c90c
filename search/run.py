"""One run from configuration to merged adapter, in a folder that may hold the beginning of it.

Knows the folder, what an earlier run left there and when this one began; not the phases themselves.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from search.base import LoadedBase
from search.config import SearchConfig
from search.delivery import ADAPTER_FOLDER
from search.interruption import Interruption
from search.merge import refuse_strangers
from search.objective import Objective
from search.outcome import RunResult
from search.phases import Later, Phases, Shared
from search.progress import ProgressLine
from search.recorded import TRACE_FILE
from search.resume import Record, read_record, refuse_changes
from search.setup import load_setup
from search.timebox import PROCESS_END_S, SPARE_SHARE, TimeBox
from search.trace import TraceWriter
from search.workspace import hold_folder, refuse_input_folders, refuse_unwritable


def run_search(  # noqa: PLR0913 (a configuration, a folder, and what a caller may know better)
    config: SearchConfig,
    *,
    output: Path,
    base: LoadedBase | None = None,
    reserve_s: float = 0.0,
    measure_later_s: Callable[[], float] = lambda: 0.0,
    objective: Objective | None = None,
    resume: bool = False,
) -> RunResult:
    """Find coefficients within the time box, and write trace, adapter and coefficients to `output`.

    SIGINT or SIGTERM during search or finalists merges the best so far; before, it is a KeyboardInterrupt.

    Args:
        base: the configured base, if it is loaded already.
        reserve_s: seconds of the time box that are the caller's, gone or still needed.
        measure_later_s: measures, when asked, further seconds that the caller needs after the run.
        objective: a function of (merged_logp, expert_logp, next_tokens) in place of the configured one.
        resume: go on with the run whose trace is in `output`, if there is one; else it is replaced.

    Raises:
        InputError: for weights or settings that do not fit, a run in `output` that had others, an output
            that cannot be written, or a model that gives no usable numbers.
    """
    path = output / TRACE_FILE
    refuse_unwritable(output, "--out")
    refuse_input_folders((output, output / ADAPTER_FOLDER), config.sources, "--out")
    with ExitStack() as held:
        is_new = not output.is_dir()
        held.enter_context(hold_folder(output))
        refuse_strangers(output / ADAPTER_FOLDER)
        record = read_record(path) if resume else Record()
        box = TimeBox(config.search.time_box_s, started_s=time.monotonic() - record.elapsed_s)
        box.reserve("caller", reserve_s)
        box.reserve("spare", SPARE_SHARE * box.limit_s + PROCESS_END_S)
        interruption = held.enter_context(Interruption())
        line = held.enter_context(ProgressLine(config.search.max_evaluations))
        line.phase("timing what follows")
        asked_s = box.elapsed_s()
        box.reserve("later", measure_later_s())
        later = Later(measure_later_s, box.elapsed_s() - asked_s)
        line.phase("load")
        setup = load_setup(config, base, objective)
        header = setup.describe()
        refuse_changes(record, header, path)
        writer = TraceWriter(path, n_kept_bytes=record.n_bytes, kept_events=record.kept_events)
        trace = held.enter_context(writer)
        if is_new:
            held.enter_context(hold_folder(output))
        if record.trace is None:
            trace.header(header)
        else:
            trace.event("resumed", generations=len(record.trace.generations), elapsed_s=record.elapsed_s)
        shared = Shared(trace, box, line, interruption, record, later)
        return Phases(setup, shared).finish(output)
