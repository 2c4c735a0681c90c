"""Find the folders and files that a configuration names.

Knows paths and what a hub id looks like; not what lies there.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationInfo

from search.errors import InputError

DUMMY = "dummy:"
"""What a source of random weights, which lie nowhere, starts with (search/dummy.py)."""


def locate_source(source: str, roots: Sequence[Path] = (Path(),)) -> str:
    """Return the first existing folder `root / source`, or the source itself where it can only be a hub id.

    Raises:
        InputError: when it is neither; a name such as "data/zo" beside a folder "data" is a mistyped path.
    """
    if source.startswith(DUMMY):
        return source
    written = Path(os.path.expanduser(source))
    for root in roots:
        if source.strip() and os.path.isdir(root / written):
            return str(root / written)
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", source)
    if is_hub_id and not any(os.path.isdir(root / written.parts[0]) for root in roots):
        return source
    looked_in = ", ".join(dict.fromkeys(str(root.absolute()) for root in roots))
    raise InputError(
        f"no folder {source!r} in {looked_in}; expected an existing folder or a hub id (org/name)"
    )


def locate_file(written: str, roots: Sequence[Path]) -> str:
    """Return the first existing file `root / written`.

    Raises:
        InputError: when there is none.
    """
    for root in roots:
        path = root / os.path.expanduser(written)
        if os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
            return str(path)
    looked_in = ", ".join(dict.fromkeys(str(root.absolute()) for root in roots))
    raise InputError(f"no file {written!r} in {looked_in}; make one with `python -m search priors`")


def search_roots(info: ValidationInfo) -> Sequence[Path]:
    """Folders that relative paths start from; the working directory alone outside `load_config`."""
    return info.context["roots"] if info.context else (Path(),)
