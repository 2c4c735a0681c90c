"""A run's folder: one run at a time, and nothing half-written from the one before."""

import multiprocessing

import pytest

from search.errors import InputError
from search.workspace import hold_folder, refuse_input_folders, refuse_unwritable


def hold(folder, is_held, may_end):
    with hold_folder(folder):
        is_held.set()
        may_end.wait(20)


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("fork")  # which imports nothing anew
    is_held, may_end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, is_held, may_end))
    process.start()
    assert is_held.wait(60)
    (tmp_path / ".adapter.1.partial").mkdir()
    with pytest.raises(InputError, match="another run is writing there"), hold_folder(tmp_path):
        pass
    assert (tmp_path / ".adapter.1.partial").exists(), "the other run's files were touched"
    may_end.set()
    process.join()
    with hold_folder(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_only_half_written_files_are_removed(tmp_path):
    for name in (".rehearsal-x.partial", ".adapter.77.partial"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for name in (".coefficients.json.77.partial", "trace.jsonl", ".notes", "thesis.partial"):
        (tmp_path / name).write_text("x")
    with hold_folder(tmp_path):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".notes", "thesis.partial", "trace.jsonl"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with hold_folder(tmp_path / "new"):
        assert not (tmp_path / "new").exists()


def test_what_cannot_be_written_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/deep/out"):
        with pytest.raises(InputError, match=r"cannot write to .*: Not a directory\. Choose another --out\."):
            refuse_unwritable(tmp_path / name, "--out")
    refuse_unwritable(tmp_path, "--out")
    refuse_unwritable(tmp_path / "deep/out", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_read_from_is_refused_by_any_of_its_names(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(InputError, match=r"link: the base or an adapter is read from there"):
        refuse_input_folders([tmp_path / "link"], ["org/hub-id", str(tmp_path / "base")], "--out")
    refuse_input_folders([tmp_path, tmp_path / "base/deep"], ["org/hub-id", str(tmp_path / "base")], "--out")
