"""A user's own objective by its name, and every way in which that goes wrong."""

import sys

import pytest
import torch

from search.errors import InputError
from search.objective import OBJECTIVES, disagreement
from search.plugin import load_objective


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Write a module into a working directory of its own; what is imported is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write(source, name="my_objectives"):
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")

    yield write
    for name in set(sys.modules) - known:
        if name.startswith("my_"):
            del sys.modules[name]


def refusal(name):
    with pytest.raises(InputError) as caught:
        load_objective(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"objective.name: {name!r}")
    assert "`package.module:function`, a function of (merged_logp, expert_logp, next_tokens)" in message
    assert ", ".join(OBJECTIVES) in message
    return message


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shipped_objectives_pass_through(name):
    assert load_objective(name) == name


def test_a_function_in_the_working_directory_is_found_and_can_be_scored_with(write_module):
    write_module("def gap(merged, expert, tokens):\n    return (merged - expert).abs().sum(-1)\n")
    gap = load_objective("my_objectives:gap")
    merged, expert = torch.rand(2, 5, 7)
    values = disagreement(gap, merged, expert, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(values, (merged - expert).abs().sum(-1))


def test_a_function_in_a_package_may_import_its_neighbours_when_it_is_called(write_module):
    write_module("SCALE = 3\n", "my_package.scales")
    write_module(
        "def scaled(m, e, t):\n    from my_package.scales import SCALE\n    return SCALE * m.sum(-1)\n",
        "my_package.own",
    )
    scaled = load_objective("my_package.own:scaled")
    assert scaled(torch.ones(2, 4), None, None).tolist() == [12, 12]


@pytest.mark.parametrize(
    "name", ["entropy_exces", "", "a:", ":b", "a.b", "a:b:c", "a/b.py:f", ".a:b", "a b:c"]
)
def test_a_name_of_neither_form_is_refused(name):
    assert "is unknown; expected one of" in refusal(name)


def test_a_module_that_is_not_there_is_refused_with_where_it_was_looked_for(write_module, tmp_path):
    message = refusal("my_missing.module:gap")
    assert f"importing my_missing.module from {tmp_path} or the installed packages" in message
    assert "ModuleNotFoundError: No module named 'my_missing'" in message


def test_a_module_that_breaks_is_refused_with_its_own_error(write_module):
    write_module("raise RuntimeError('needs a\\nlicence')\n")
    assert "gave RuntimeError: needs a licence" in refusal("my_objectives:gap")
    write_module("def gap(:\n", "my_other")
    assert "gave SyntaxError" in refusal("my_other:gap")


def test_a_function_that_is_not_there_is_refused(write_module):
    write_module("gap = 3\n")
    assert "found nothing of that name in my_objectives" in refusal("my_objectives:gop")
    assert "found int gap in my_objectives" in refusal("my_objectives:gap")
