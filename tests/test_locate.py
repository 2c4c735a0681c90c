"""Finding what a configuration names: folders before hub ids, files, and one line where there is neither."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from search.errors import InputError
from search.locate import locate_file, locate_source, search_roots


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a folder `zoo/base` and a file `zoo/prior.json`."""
    (tmp_path / "zoo/base").mkdir(parents=True)
    (tmp_path / "zoo/prior.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_found_from_the_first_root_that_has_it(here):
    assert locate_source("zoo/base") == "zoo/base"
    roots = (here / "elsewhere", here, here / "zoo")
    assert locate_source("zoo/base", roots) == str(here / "zoo/base")
    assert locate_source("base", roots) == str(here / "zoo/base")
    assert locate_source(str(here / "zoo"), (here / "elsewhere",)) == str(here / "zoo")


def test_the_home_folder_may_be_written_with_a_tilde(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert locate_source("~/zoo/base") == str(here / "zoo/base")
    assert locate_file("~/zoo/prior.json", (Path(),)) == str(here / "zoo/prior.json")


@pytest.mark.parametrize("hub_id", ["mistralai/Mistral-7B-v0.1", "a/b", "0-hero/Matter_0.2", "org/_model"])
def test_what_can_only_be_a_hub_id_is_left_as_it_is(here, hub_id):
    assert locate_source(hub_id) == hub_id


def test_a_folder_goes_before_a_hub_id_of_the_same_name(here):
    (here / "org/model").mkdir(parents=True)
    assert locate_source("org/model", (here,)) == str(here / "org/model")


@pytest.mark.parametrize(
    "wrong",
    ["zoo/bas", "nowhere", "a/b/c", "./a", "~nobody-here/a", "", " ", "a/b c", "/no/such", "x" * 5000],
)
def test_a_mistyped_path_is_neither(here, wrong):
    with pytest.raises(InputError, match="no folder") as caught:
        locate_source(wrong)
    assert f"no folder {wrong!r} in {here}; expected an existing folder or a hub id" in str(caught.value)


def test_a_file_is_no_folder_and_a_folder_no_file(here):
    with pytest.raises(InputError, match=r"no folder 'zoo/prior\.json'"):
        locate_source("zoo/prior.json")
    with pytest.raises(InputError, match="no file 'zoo/base'"):
        locate_file("zoo/base", (here,))


def test_a_file_is_found_from_the_first_root_that_has_it(here):
    assert locate_file("prior.json", (here, here / "zoo")) == str(here / "zoo/prior.json")
    (here / "prior.json").write_text("{}")
    assert locate_file("prior.json", (here, here / "zoo")) == str(here / "prior.json")


def test_a_file_that_is_nowhere_is_named_with_where_it_was_looked_for(here):
    with pytest.raises(InputError) as caught:
        locate_file("none.json", (Path(), here, here / "zoo"))
    message = f"no file 'none.json' in {here}, {here / 'zoo'}; make one with `python -m search priors`"
    assert str(caught.value) == message


@pytest.mark.parametrize("wrong", ["", "zoo", "x" * 5000, "a\0b"])
def test_what_no_file_can_be_called_is_no_file(here, wrong):
    with pytest.raises(InputError, match="no file"):
        locate_file(wrong, (here,))


def test_outside_a_configuration_file_paths_start_from_the_working_directory(here):
    assert search_roots(SimpleNamespace(context=None)) == (Path(),)
    assert search_roots(SimpleNamespace(context={"roots": (here,)})) == (here,)
