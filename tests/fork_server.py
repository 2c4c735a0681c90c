"""Runs the command line in forks of one process that has loaded all libraries: a kill then costs no import.

`python -m tests.fork_server BASE` reads a JSON line {"argv": [...], "log": FILE} or {"wait": PID} at a time,
and answers with the process id or with the exit status.
"""

import json
import os
import sys

import torch

from search.__main__ import main
from search.base import load_base


def run(argv: list[str], log: str) -> int:
    """Fork a process that runs the command; its output goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    code = 1
    try:
        code = main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    load_base(sys.argv[1], device="cpu")  # imports what its architecture needs
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = run(request["argv"], request["log"])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
