"""Do jobs in processes of their own, spread over the GPUs, until time is up.

Knows processes, devices and the clock; not what a job does.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from textwrap import shorten
from types import TracebackType
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


class DevicePool:
    """Processes that stay, each on one GPU; with `n_jobs` 1 this process, as it is."""

    def __init__(self, n_jobs: int, device: str) -> None:
        """Start no process yet.

        Args:
            n_jobs: processes; more than GPUs share them in turn.
            device: "cuda" or "cpu".
        """
        self.n_failed = 0
        self._executor: ProcessPoolExecutor | None = None
        if n_jobs == 1:
            _settle(device)
            return
        context = get_context("spawn")
        self._executor = ProcessPoolExecutor(
            n_jobs, mp_context=context, initializer=_settle, initargs=(device, context.Value("i", 0))
        )

    def __enter__(self) -> "DevicePool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._executor is None:
            return
        if kind is not None:  # not waiting for jobs under way
            for process in active_children():
                process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def run(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], stop_at: float = float("inf")
    ) -> Iterator[tuple[Job, Result]]:
        """Yield jobs and their results as they are done; those that fail are told on stderr and counted.

        Args:
            function: of a module, so that another process finds it.
            jobs: started in their order.
            stop_at: seconds since the epoch from when on no further job is started.
        """
        if self._executor is None:
            for job in jobs:
                if time.time() >= stop_at:
                    return
                yield job, function(job)
            return
        futures = {self._executor.submit(function, job): job for job in jobs}
        for future in as_completed(futures):
            if time.time() >= stop_at:
                for other in futures:
                    other.cancel()
            if not future.cancelled() and not self._failed(future, futures[future]):
                yield futures[future], future.result()

    def _failed(self, future: Future[Result], job: object) -> bool:
        """Tell of a job that failed, and count it."""
        error = future.exception()
        if error is None:
            return False
        self.n_failed += 1
        print(
            f"FAILED: {shorten(str(job), 300)}\n{''.join(traceback.format_exception(error))}",
            file=sys.stderr,
            flush=True,
        )
        return True


def _settle(device: str, counter: Any = None) -> None:
    """Take one thread and the next GPU, on which float32 products may round their factors to TF32."""
    torch.set_num_threads(1)
    if device != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    if counter is not None:
        with counter.get_lock():
            index, counter.value = counter.value, counter.value + 1
        torch.cuda.set_device(index % torch.cuda.device_count())
