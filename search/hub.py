"""Turn a folder, or a hub id and a revision, into a local folder and its commit; say in one line why not.

Knows the hub, its cache and its errors; not what the files hold. Nothing that is fetched is ever run.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from hashlib import sha1
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    tqdm,
)

from search.errors import InputError
from search.files import sha256_file
from search.hub_errors import (
    HTTP_ERRORS,
    ONLINE,
    error_line,
    explain,
    is_missing,
    is_offline,
    is_passing,
    retry_after_s,
    status_of,
)

_CHAT_FILES = ("chat_template.jinja", "chat_template.json")
TEXT_FILES = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer*.json", "*.model", "vocab.json", "vocab.txt", "merges.txt", *_CHAT_FILES),
)
"""A model's configuration and tokenizer; no code."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Before the second to the fifth try."""
LONGEST_WAIT_S = 300.0
"""What a Retry-After may ask for; the hub counts requests over five minutes."""

FETCHED_AT_ONCE = 4
"""Repositories; the files of each come in parallel too."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_IGNORED = ("*/*", "consolidated*")
_ERRORS: tuple[type[Exception], ...] = (*HTTP_ERRORS, OSError, ValueError, EntryNotFoundError, RuntimeError)
"""All that snapshot_download raises; RuntimeError is hf_xet's."""
_NO_ANSWER: tuple[type[Exception], ...] = (*HTTP_ERRORS, ConnectionError, TimeoutError)
_log = logging.getLogger(__name__)
T = TypeVar("T")


class MissingOnHubError(InputError):
    """The hub answers that it has no such repository, or no such revision of it."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Files at hand."""

    folder: Path
    commit: str | None
    """The hub's commit hash; None for a folder of one's own."""


def fetch(source: str, revision: str | None, patterns: Sequence[str], where: str) -> Fetched:
    """Return a folder as it is; of a hub id, fetch what matches `patterns`, or find it in the cache.

    Files are fetched in parallel and only those that the cache lacks; each is held against the hash that the
    hub gives for it. Endpoint, cache, token and offline mode are huggingface_hub's own (HF_ENDPOINT, HF_HOME,
    HF_TOKEN, HF_HUB_OFFLINE); without HF_TOKEN, HF_AUTH_TOKEN is used.

    Args:
        source: an existing folder, else a hub id.
        revision: branch, tag or commit on the hub.
        patterns: file names or globs, of the top folder only.
        where: what errors begin with.

    Raises:
        MissingOnHubError: if the hub has no such repository or revision.
        InputError: if there is no such folder, or the hub does not give it.
    """
    if Path(source).is_dir():
        return Fetched(Path(source), _commit_of(Path(source)))
    if not _HUB_ID.fullmatch(source):
        raise InputError(f"{where}: there is no such folder, and it is no hub id (org/name). Check `source`.")
    where = f"{where} at revision {revision!r}" if revision else where
    folder = _download(source, revision, patterns, where)
    if damaged := _find_damaged(folder, patterns):
        if is_offline():
            raise InputError(f"{where}: {damaged[0]} in the cache does not have its hash. {ONLINE}.")
        _log.warning("%s: %s does not have the hub's hash: fetched again", where, ", ".join(damaged))
        _download(source, folder.name, damaged, where, force=True)
        if damaged := _find_damaged(folder, patterns):
            _forget(folder, damaged)
            found = f"{damaged[0]} does not have the hub's hash, fetched again neither"
            raise InputError(f"{where}: {found}. Check the connection, a proxy or the disk, and start again.")
    return Fetched(folder, _commit_of(folder))


def hash_file(path: Path) -> str:
    """Return a file's SHA-256; one in the hub's cache is read once per process."""
    blob = _blob_of(path)
    if blob is None:
        return sha256_file(path)
    status = blob.stat()
    return _hash_blob(blob, status.st_size, status.st_mtime_ns)


def note_unpinned(found: Iterable[tuple[str, str | None, str | None]]) -> None:
    """Tell, once, what was not asked for by its commit: (what it is, revision asked for, commit) of each."""
    loose = [f"{what} is at {commit}" for what, revision, commit in found if commit and commit != revision]
    if loose:
        _tell_once(f"not pinned: {', '.join(loose)}. `python -m search pin CONFIG --write` does it")


@cache
def _tell_once(text: str) -> None:
    _log.info(text)


def resolve(source: str, revision: str | None, where: str) -> str:
    """Ask the hub for the commit that a branch or tag is at, or whether it has a commit; fetch no file.

    Raises:
        MissingOnHubError: if it has no such repository or revision.
        InputError: if it does not say.
    """
    if is_offline():
        raise InputError(f"{where}: commits are asked of the hub. Unset HF_HUB_OFFLINE.")
    where = f"{where} at revision {revision!r}" if revision else where

    def ask() -> Any:
        try:
            return HfApi(token=_kit_token()).model_info(source, revision=revision)
        except _NO_ANSWER as error:
            if status_of(error) is not None:
                raise
            raise LocalEntryNotFoundError(error_line(error)) from error  # as a download: asked no more

    try:
        return str(_patiently(ask, source, where).sha)
    except InputError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise InputError(f"{where}: {constants.ENDPOINT} is out of reach. Connect.") from error
        raise


def fetch_together(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run what asks the hub, a few at a time; return what each returns.

    After an error nothing more is begun; of several errors the first job's is raised.
    """
    pool = ThreadPoolExecutor(FETCHED_AT_ONCE)
    try:
        futures = [pool.submit(job) for job in jobs]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future in done:
                future.result()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def keep_download_bars() -> None:
    """Show how far downloads are where transformers' own bars are switched off, and the hub's with them."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        enable_progress_bars()


@contextmanager
def one_bar(n_repositories: int, of: str) -> Iterator[Callable[[], object]]:
    """Put one bar in place of the library's three for each repository; what is yielded moves it on by one.

    HF_HUB_DISABLE_PROGRESS_BARS, 0 or 1, is the user's word on the library's own.
    """
    is_said = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    if is_said or not n_repositories:
        yield lambda: None
        return
    with tqdm(total=n_repositories, desc=of, disable=None) as bar:  # type: ignore[no-untyped-call]
        disable_progress_bars()
        try:
            yield bar.update
        finally:
            enable_progress_bars()


def _download(
    source: str, revision: str | None, patterns: Sequence[str], where: str, force: bool = False
) -> Path:
    """Fetch; a connection that breaks is taken up where it broke.

    Only within one process: huggingface_hub 2.4 writes each download to a file of a name of its own, which no
    later process takes up, so what a kill leaves of one file is fetched anew. Whole files are kept.
    """
    fetch_files = partial(
        snapshot_download,
        source,
        revision=revision,
        allow_patterns=list(patterns),
        ignore_patterns=list(_IGNORED),
        force_download=force,
        token=_kit_token(),
    )
    return Path(_patiently(fetch_files, source, where))


def _patiently(ask: Callable[[], T], source: str, where: str) -> T:
    """Ask, and ask again while the hub is busy or the connection breaks."""
    for wait_s in (*WAITS_S, None):
        try:
            return ask()
        except _ERRORS as error:
            asked_s = retry_after_s(error)
            if wait_s is None or asked_s > LONGEST_WAIT_S or not is_passing(error):
                kind = MissingOnHubError if is_missing(error) else InputError
                raise kind(f"{where}: {explain(error, source)}.") from error
            status = status_of(error)
            found = f"the hub answers {status}" if status else error_line(error)
            _log.warning("%s: %s; again in %.0f s", where, found, max(wait_s, asked_s))
            time.sleep(max(wait_s, asked_s))
    raise AssertionError("unreachable")


def _kit_token() -> str | None:
    """Return the starter kit's token; None leaves the choice to huggingface_hub."""
    return None if os.environ.get("HF_TOKEN") else os.environ.get("HF_AUTH_TOKEN") or None


# ---- the cache: snapshots/COMMIT/NAME links to blobs/HASH


def _commit_of(folder: Path) -> str | None:
    return folder.name if folder.parent.name == "snapshots" else None


def _blob_of(path: Path) -> Path | None:
    """Return the blob that a snapshot's file links to; None outside the cache, or where it cannot link."""
    return path.parent / os.readlink(path) if path.is_symlink() else None


def _find_damaged(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return the fetched files whose content is not what their blob is named after.

    A blob is named after its SHA-256, or after its git hash; where a cache has no links, nothing is known.
    """
    names = sorted(p.name for p in folder.iterdir() if any(fnmatch(p.name, one) for one in patterns))
    return [name for name in names if not _is_whole(folder / name)]


def _is_whole(path: Path) -> bool:
    if not path.exists():  # a link to a blob that is gone
        return False
    expected = blob.name if (blob := _blob_of(path)) else ""
    if re.fullmatch("[0-9a-f]{64}", expected):
        return hash_file(path) == expected
    if re.fullmatch("[0-9a-f]{40}", expected):
        content = path.read_bytes()
        git = sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return git.hexdigest() == expected
    return True


def _forget(folder: Path, names: Sequence[str]) -> None:
    """Remove files from the cache, so that nobody takes them for whole."""
    for path in (folder / name for name in names):
        if blob := _blob_of(path):
            blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


@cache
def _hash_blob(path: Path, _n_bytes: int, _mtime_ns: int) -> str:
    return sha256_file(path)
