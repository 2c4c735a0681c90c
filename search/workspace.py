"""The folder of a run: held by one run at a time, and cleared of what a killed one left half-written.

Knows locks and names of temporary files; not what a run writes.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from search.errors import InputError


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, if it is there, against other runs, and remove what a killed one left half-written.

    Where the file system has no locks, the folder is not held.

    Raises:
        InputError: if another run holds it.
    """
    if not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"{folder}: another run is writing there. Wait for it, or choose another folder."
        ) from error
    except OSError:
        pass  # no locks here
    try:
        _clear(folder)
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Remove temporary files and folders of runs that are over."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
