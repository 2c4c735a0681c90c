"""What the hub's refusals and broken connections mean: whether they pass, and one line on what to do.

Knows the errors of huggingface_hub and of its HTTP client; fetches nothing.
"""

import errno
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

RETRIED = (429, 500, 502, 503, 504)
_ERROR = HfHubHTTPError.__bases__[0]
HTTP_ERRORS = [
    one for one in _ERROR.__mro__ if one.__module__.split(".")[0] == _ERROR.__module__.split(".")[0]
][-1:]
"""What the HTTP client raises for all that goes wrong: huggingface_hub had requests before 1.0, and httpx."""
ONLINE = "Unset HF_HUB_OFFLINE once to fetch it, or give a folder"
_KEPT = "whole files are kept"


def is_offline() -> bool:
    """Say whether huggingface_hub asks nobody."""
    return bool(constants.HF_HUB_OFFLINE)


def _response_of(error: BaseException | None) -> Any:
    """Return the hub's answer that an error comes from, if one does; its type is the HTTP client's own."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(error, "response", None)


def status_of(error: BaseException) -> int | None:
    """Return the status that the hub answered with; None where it did not answer."""
    return getattr(_response_of(error), "status_code", None)


def retry_after_s(error: BaseException) -> float:
    """Return what the hub asks to wait; 0 where it does not."""
    response = _response_of(error)
    text = "" if response is None else (response.headers.get("Retry-After") or "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def is_passing(error: BaseException) -> bool:
    """Whether it may go away by itself; a hub that is out of reach at the first request does not."""
    if (status := status_of(error)) is not None:
        return status in RETRIED
    broke_off = isinstance(error, (HTTP_ERRORS[0], ConnectionError, TimeoutError, RuntimeError))
    too_few_bytes = "Consistency check failed" in str(error)
    out_of_reach = isinstance(error, LocalEntryNotFoundError)  # to huggingface_hub 0.36 an HTTP error too
    return (broke_off or too_few_bytes) and not out_of_reach and not is_offline()


def is_missing(error: BaseException) -> bool:
    """Whether the hub says that it has no such repository or revision."""
    gone = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
    return gone and not isinstance(error, GatedRepoError)


def explain(error: Exception, source: str) -> str:
    """Say what was found, and the way out."""
    status = status_of(error)
    is_from_cache = isinstance(error, LocalEntryNotFoundError)  # to huggingface_hub 0.36 an answer too
    if status is not None or (isinstance(error, HfHubHTTPError) and not is_from_cache):
        return _explain_answer(error, status, f"{constants.ENDPOINT}/{source}")
    if is_offline():
        return f"no such folder, and not or not wholly in the cache {constants.HF_HUB_CACHE}. {ONLINE}"
    if isinstance(error, EntryNotFoundError) and not isinstance(error.__cause__, FileMetadataError):
        found = f"no such folder, not cached, and {constants.ENDPOINT} is out of reach"
        return f"{found}. Connect, or give a folder"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left for {constants.HF_HUB_CACHE}. Free some, or set HF_HOME to another disk"
    return f"download failed: {error_line(error)}. Check name and connection, and start again: {_KEPT}"


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
        asked = f", and asks to wait {wait:.0f} s" if (wait := retry_after_s(error)) else ""
        return f"the hub is busy ({status}){asked}. Start again later: {_KEPT}"
    return f"the hub refuses: {error_line(error)}. Check {page}"


def error_line(error: BaseException) -> str:
    """Return its first line, without the queries of addresses: they may be signed."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")
    return re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", line)
