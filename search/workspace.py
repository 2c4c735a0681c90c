"""The folder of a run: fit to be written to, held by one run at a time, cleared of what a killed one left.

Knows locks and names of temporary files; not what a run writes.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from search.errors import InputError


def refuse_unwritable(folder: Path, option: str) -> None:
    """Refuse (InputError) a folder, there or not, that cannot be written to; nothing is made.

    Args:
        option: of the command line, to choose another by.
    """
    try:
        there = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}. Choose another {option}.") from error


def refuse_input_folders(folders: Iterable[Path], sources: Iterable[str], option: str) -> None:
    """Refuse (InputError) to write into a folder that base or adapters are read from."""
    inputs = [Path(source) for source in sources if os.path.isdir(source)]
    for folder in folders:
        if folder.is_dir() and any(folder.samefile(one) for one in inputs):
            raise InputError(
                f"{folder}: the base or an adapter is read from there, and the run's files would be mixed "
                f"with its own. Choose another {option}."
            )


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
