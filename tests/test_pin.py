"""Pinning: commits from the hub go into a configuration, and nothing else of it changes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from search.__main__ import main
from search.config import load_config
from search.errors import InputError
from search.pin import pin_config
from tests.hub_server import serve
from tests.test_layers import ROOT

BASE, ONE, TWO = "org/base", "org/one", "org/two"
LAYOUTS = {
    "short": "base: org/base # the base\nadapters:\n  - org/one # first\n  - org/two\n",
    "block": """# of mine
base:
  source: org/base # the base
  dtype: float32
adapters:
  - source: "org/one" # first
    revision: null # none yet
    about: "says é: one"
  - about: two
    source: org/two
    revision:
search: {time_box_s: 60} # a minute""",
    "flow": "{base: {source: org/base, revision: main}, adapters: "
    "[{source: org/one}, {revision: v1, source: org/two}]}",
    "json": json.dumps({"base": {"source": BASE}, "adapters": [{"source": ONE, "revision": "main"}, TWO]}),
    "last": "adapters: [org/one, org/two]\nbase:\n    source: org/base",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a base and two adapters, one of them at a branch of another commit too."""
    with serve() as served:
        for name in (BASE, ONE, TWO):
            served.add(name, ROOT / "data/zoo/base")
        served.repos[TWO].old = ("v1",)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield served


def save(text):
    path = Path("mine.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def filled(text, hub):
    """The document that is expected."""
    document = yaml.safe_load(text)
    document["base"] = document["base"] if isinstance(document["base"], dict) else {"source": BASE}
    document["adapters"] = [a if isinstance(a, dict) else {"source": a} for a in document["adapters"]]
    for entry in (document["base"], *document["adapters"]):
        was_old = entry.get("revision") == "v1"
        entry["revision"] = "v1" if was_old else hub.repos[entry["source"]].commit
    return document


@pytest.mark.parametrize("layout", LAYOUTS)
def test_commits_go_where_revisions_belong_and_all_else_stays(hub, layout):
    path = save(LAYOUTS[layout])
    pins = pin_config(path)
    assert [pin.source for pin in pins] == [BASE, ONE, TWO]
    assert path.read_text(encoding="utf-8") == LAYOUTS[layout]
    assert pin_config(path, write=True) == pins
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == filled(LAYOUTS[layout], hub)
    for comment in ("# of mine", "# the base", "# first", "# none yet", "# a minute"):
        assert text.count(comment) == LAYOUTS[layout].count(comment)
    config = load_config(path)
    assert [one.revision for one in (config.base, *config.adapters)] == [pin.commit for pin in pins]
    stamp = path.stat().st_mtime_ns
    assert {pin.revision for pin in pin_config(path, write=True)} == {pin.commit for pin in pins}
    assert path.stat().st_mtime_ns == stamp
    assert {r.kind for r in hub.requests} == {"info"}  # no file was fetched


def test_a_commit_of_digits_stays_a_text(hub):
    hub.repos[ONE].commit = "1" * 40
    pin_config(path := save(LAYOUTS["short"]), write=True)
    assert load_config(path).adapters[0].revision == "1" * 40


@pytest.mark.parametrize("entry", ["{<<: *a, name: b}", "\n      <<: *a\n      name: b"])
def test_an_entry_whose_source_comes_by_a_merge_key_gets_a_revision_of_its_own(hub, entry):
    path = save(f"base: org/base\nadapters:\n  - &a {{source: org/one}} # one\n  - {entry}\n")
    pin_config(path, write=True)
    assert [a.revision for a in load_config(path).adapters] == [hub.repos[ONE].commit] * 2
    assert path.read_text().count(hub.repos[ONE].commit) == 2


def test_folders_and_random_weights_are_left_alone(hub, tmp_path):
    (tmp_path / "mine").mkdir()
    text = "base: dummy:tiny\nadapters: [mine, org/one]\n"
    path = save(text)
    assert [pin.source for pin in pin_config(path, write=True)] == [ONE]
    assert path.read_text() == text.replace(
        "org/one", f"{{source: org/one, revision: {hub.repos[ONE].commit}}}"
    )


def test_what_the_hub_does_not_have_is_one_line_and_nothing_is_written(hub, monkeypatch, capsys):
    text = LAYOUTS["short"].replace("- org/two", "- {source: org/two, revision: v9}")
    path = save(text)
    assert main(["pin", str(path), "--write"]) == 2
    assert (
        "error: adapter 'two' (org/two) at revision 'v9': the hub has no such revision"
        in capsys.readouterr().err
    )
    assert path.read_text() == text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"base \(org/base\): commits are asked of the hub. Unset HF_HUB_OFF"
    ):
        pin_config(path)


def test_the_command_tells_each_commit_and_how_many_it_wrote(hub, capsys):
    path = save(LAYOUTS["flow"])
    assert main(["pin", str(path)]) == 0
    out, err = capsys.readouterr()
    commits = {name: repo.commit for name, repo in hub.repos.items()} | {TWO: "v1"}
    assert json.loads(out) == {"commits": commits, "written": 0}
    assert f"base (org/base): main is {commits[BASE]}\n" in err
    assert main(["pin", str(path), "--write"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 2


def test_without_a_network_one_line_says_so_at_once(hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("search.hub.time.sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    save(LAYOUTS["short"])
    assert main(["pin", "mine.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: .* \(org/\w+\): http://127\.0\.0\.1:9 is out of reach\. Connect\.", line)
