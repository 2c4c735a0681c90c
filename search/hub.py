"""Turn a folder, or a hub id and a revision, into a local folder and its commit; say in one line why not.

Knows the hub, its cache and its errors; not what the files hold. Nothing that is fetched is ever run.
"""

import errno
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatch
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from search.errors import InputError
from search.files import sha256_file

_CHAT_FILES = ("chat_template.jinja", "chat_template.json")
TEXT_FILES = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer*.json", "*.model", "vocab.json", "vocab.txt", "merges.txt", *_CHAT_FILES),
)
"""A model's configuration and tokenizer; no code."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
RETRIED = (429, 500, 502, 503, 504)
WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Before the second to the fifth try."""
LONGEST_WAIT_S = 300.0
"""What a Retry-After may ask for; the hub counts requests over five minutes."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_IGNORED = ("*/*", "consolidated*")
_HTTP_ERRORS = HfHubHTTPError.__bases__
_ERRORS: tuple[type[Exception], ...] = (*_HTTP_ERRORS, OSError, ValueError, EntryNotFoundError, RuntimeError)
"""All that snapshot_download raises; RuntimeError is hf_xet's."""
_log = logging.getLogger(__name__)


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
        if _is_offline():
            raise InputError(f"{where}: {damaged[0]} in the cache does not have its hash. {_ONLINE}.")
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


def _download(
    source: str, revision: str | None, patterns: Sequence[str], where: str, force: bool = False
) -> Path:
    """Fetch, and try again while the hub is busy or the connection breaks."""
    for wait_s in (*WAITS_S, None):
        try:
            return Path(
                snapshot_download(
                    source,
                    revision=revision,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(_IGNORED),
                    force_download=force,
                    token=_kit_token(),
                )
            )
        except _ERRORS as error:
            asked_s = _retry_after_s(error)
            if wait_s is None or asked_s > LONGEST_WAIT_S or not _is_passing(error):
                kind = MissingOnHubError if _is_missing(error) else InputError
                raise kind(f"{where}: {_explain(error, source)}.") from error
            status = _status_of(error)
            found = f"the hub answers {status}" if status else _error_line(error)
            _log.warning("%s: %s; again in %.0f s", where, found, max(wait_s, asked_s))
            time.sleep(max(wait_s, asked_s))
    raise AssertionError("unreachable")


def _kit_token() -> str | None:
    """Return the starter kit's token; None leaves the choice to huggingface_hub."""
    return None if os.environ.get("HF_TOKEN") else os.environ.get("HF_AUTH_TOKEN") or None


# ---- what went wrong

_KEPT = "whole files are kept"
_ONLINE = "Unset HF_HUB_OFFLINE once to fetch it, or give a folder"


def _is_offline() -> bool:
    return bool(constants.HF_HUB_OFFLINE)


def _response_of(error: BaseException | None) -> Any:
    """Return the hub's answer that an error comes from, if one does; its type is the HTTP client's own."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(error, "response", None)


def _status_of(error: BaseException) -> int | None:
    return getattr(_response_of(error), "status_code", None)


def _retry_after_s(error: BaseException) -> float:
    """Return what the hub asks to wait; 0 where it does not."""
    response = _response_of(error)
    text = "" if response is None else (response.headers.get("Retry-After") or "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _is_passing(error: BaseException) -> bool:
    """Whether it may go away by itself; a hub that is out of reach at the first request does not."""
    if (status := _status_of(error)) is not None:
        return status in RETRIED
    broke_off = isinstance(error, (_HTTP_ERRORS[0], ConnectionError, TimeoutError, RuntimeError))
    too_few_bytes = "Consistency check failed" in str(error)
    return (broke_off or too_few_bytes) and not _is_offline()


def _is_missing(error: BaseException) -> bool:
    gone = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
    return gone and not isinstance(error, GatedRepoError)


def _explain(error: Exception, source: str) -> str:
    """Say what was found, and the way out."""
    status = _status_of(error)
    if status is not None or isinstance(error, HfHubHTTPError):
        return _explain_answer(error, status, f"{constants.ENDPOINT}/{source}")
    if _is_offline():
        return f"no such folder, and not or not wholly in the cache {constants.HF_HUB_CACHE}. {_ONLINE}"
    if isinstance(error, EntryNotFoundError) and not isinstance(error.__cause__, FileMetadataError):
        found = f"no such folder, not cached, and {constants.ENDPOINT} is out of reach"
        return f"{found}. Connect, or give a folder"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left for {constants.HF_HUB_CACHE}. Free some, or set HF_HOME to another disk"
    return f"download failed: {_error_line(error)}. Check name and connection, and start again: {_KEPT}"


def _explain_answer(error: Exception, status: int | None, page: str) -> str:
    login = "`hf auth login`, or set HF_TOKEN or HF_AUTH_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"the hub guards it ({status}): ask for access at {page}, then {login} to a token that has it"
    if isinstance(error, RepositoryNotFoundError):
        found = f"no such folder, and not on the hub: {page} ({status})"
        return f"{found}. Check its name; if it is private, {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no such revision. Give a branch, tag or commit that {page}/commits/main lists"
    if status in (401, 403):
        return f"the hub refuses the token ({status}). Make one that can read {page}, then {login}"
    if status in RETRIED:
        asked = f", and asks to wait {wait:.0f} s" if (wait := _retry_after_s(error)) else ""
        return f"the hub is busy ({status}){asked}. Start again later: {_KEPT}"
    return f"the hub refuses: {_error_line(error)}. Check {page}"


def _error_line(error: BaseException) -> str:
    """Return its first line, without the queries of addresses: they may be signed."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")
    return re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", line)


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
