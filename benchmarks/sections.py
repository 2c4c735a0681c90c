"""Put what a script has written between markers in a document, and leave the rest of it alone.

Knows text, not what it says.
"""

from pathlib import Path

from search.errors import InputError
from search.files import atomic_write


def replace_section(path: Path, name: str, text: str) -> None:
    """Replace all between `<!-- name:begin -->` and `<!-- name:end -->`, each on a line of its own.

    Raises:
        InputError: if a marker is missing, is there twice, or the end comes first.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
    document = path.read_text(encoding="utf-8")
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise InputError(
            f"{path}: expected the lines {begin.strip()!r} and {end.strip()!r} once each, in this order. "
            "Put them where the text is to go."
        )
    before, _, rest = document.partition(begin)
    after = rest.partition(end)[2]
    with atomic_write(path) as partial:
        partial.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
