"""Versions and commits, in checkouts and out of them."""

import platform
import subprocess

import torch

from search import provenance
from search.provenance import LIBRARIES, checkout_commit, library_versions


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_checkout(folder):
    git(folder, "init", "-q")
    (folder / "file").write_text("one")
    git(folder, "add", "file")
    git(folder, "commit", "-qm", "one")
    return git(folder, "rev-parse", "HEAD")


def test_the_commit_is_the_checkouts_and_says_when_files_differ(tmp_path):
    commit = make_checkout(tmp_path)
    assert checkout_commit(tmp_path) == commit
    (tmp_path / "new").write_text("not tracked")
    assert checkout_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert checkout_commit(tmp_path) == f"{commit}-dirty"


def test_no_commit_is_no_failure(tmp_path, monkeypatch):
    assert checkout_commit(tmp_path) is None
    make_checkout(tmp_path)
    (tmp_path / "inner").mkdir()
    assert checkout_commit(tmp_path / "inner") is None  # installed inside somebody's repository
    (tmp_path / "inner/.git").write_text("broken")
    assert checkout_commit(tmp_path / "inner") is None
    monkeypatch.setenv("PATH", "")
    assert checkout_commit(tmp_path) is None


def test_versions_are_those_that_run(tmp_path, monkeypatch):
    versions = library_versions()
    assert versions.keys() == {"concord", "python", *LIBRARIES}
    assert set(LIBRARIES) == {"torch", "transformers", "nevergrad", "cma", "numpy"}
    assert all(versions.values())
    assert torch.__version__.startswith(versions["torch"])  # the wheel may leave out "+cu124"
    assert versions["python"] == platform.python_version()
    assert versions["concord"]
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    monkeypatch.setattr(provenance, "version", lambda name: f"{name} 7")
    assert library_versions()["concord"] == "concord-merge 7"
