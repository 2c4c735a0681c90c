"""Sections that scripts write into documents: what is between markers, and nothing else."""

import pytest

from benchmarks.sections import replace_section
from search.errors import InputError

DOCUMENT = (
    "# Title\nwords\n<!-- one:begin -->\nold\n<!-- one:end -->\n<!-- two:begin -->\n<!-- two:end -->\nend\n"
)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.md"
    path.write_text(DOCUMENT)
    return path


def test_a_section_is_replaced_and_the_rest_stays(document):
    replace_section(document, "one", "\nnew\n| table |\n")
    assert document.read_text() == DOCUMENT.replace("old\n", "\nnew\n| table |\n\n")


def test_replacing_twice_is_replacing_once(document):
    replace_section(document, "two", "text")
    once = document.read_text()
    replace_section(document, "two", "text")
    assert document.read_text() == once


@pytest.mark.parametrize(
    "broken",
    [
        DOCUMENT.replace("<!-- one:end -->\n", ""),
        DOCUMENT + "<!-- one:begin -->\n",
        "<!-- one:end -->\n<!-- one:begin -->\n",
    ],
)
def test_missing_repeated_or_swapped_markers_are_refused(document, broken):
    document.write_text(broken)
    with pytest.raises(InputError, match=r"document\.md: expected the lines '<!-- one:begin -->'"):
        replace_section(document, "one", "text")
    assert document.read_text() == broken
