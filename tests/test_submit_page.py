"""docs/SUBMIT.md: its commands are ones that there are, and what it points to is there."""

import re
import shlex

from llm_merging.main import parse_arguments
from search.__main__ import parse_command
from tests.test_layers import ROOT

PAGE = (ROOT / "docs/SUBMIT.md").read_text(encoding="utf-8")


def commands():
    block = re.search(r"```\n(.*?)```", PAGE, re.DOTALL)[1].strip().splitlines()
    return [*block, *re.findall(r"`(python [^`]+)`", PAGE)]


def test_the_way_from_a_clone_to_a_submission_is_five_commands():
    block = commands()[:5]
    assert [line.split(" -m ")[-1].split()[0] for line in block] == [
        "pip",
        "search",
        "python",
        "search",
        "search",
    ]


def test_every_command_parses():
    n_parsed = 0
    for command in commands():
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "search"]:
            named_alone = len(words) == 4  # in the text: `python -m search verify`
            parse_command([*words[3:], *(["RUN"] if named_alone else [])])
            n_parsed += 1
        elif words[:2] == ["python", "llm_merging/main.py"]:
            parse_arguments(words[2:])
            n_parsed += 1
    assert n_parsed >= 6


def test_files_that_it_names_are_there():
    named = set(re.findall(r"\]\(([\w./]+)\)", PAGE))
    assert {"METHOD.md", "SCALING.md"} <= named
    assert all((ROOT / "docs" / name).is_file() for name in named)
    for name in re.findall(r"`((?:configs|tests|llm_merging)/[\w/.-]+\.(?:yaml|py))`", PAGE):
        assert (ROOT / name).is_file() or name == "llm_merging/merging/MyMerge.py", name
