"""Files take their places whole or not at all, and errors of the disk name them."""

import errno
import os
import threading
import time

import pytest

from dfkd_jax.runtime import files
from tests.helpers.disks import tree


def test_files_that_belong_together_take_their_places_together(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    with pytest.raises(RuntimeError), files.replacing_together(tmp_path) as new:
        (new / "a").write_text("new")
        raise RuntimeError
    assert tree(tmp_path) == {tmp_path / "a": b"old", tmp_path / "b": b"old"}
    with files.replacing_together(tmp_path) as new:
        (new / "a").write_text("new")
        (new / "c").write_text("new")
    assert tree(tmp_path) == {
        **{tmp_path / name: b"new" for name in ("a", "c")},
        tmp_path / "b": b"old",
    }


def test_folders_that_are_missing_are_made_and_removed_with_what_failed(tmp_path):
    (tmp_path / "there").mkdir()
    path = tmp_path / "there" / "a" / "b" / "file"
    for attempt in (files.replacing, files.temporary_folder, files.replacing_together):
        with pytest.raises(RuntimeError), attempt(path):
            raise RuntimeError
        assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_a_writer_that_goes_on_after_it_failed_leaves_nothing(tmp_path):
    def go_on(folder):
        time.sleep(0.05)
        (folder / "weights").mkdir(parents=True)

    with pytest.raises(RuntimeError), files.temporary_folder(tmp_path / "teacher") as new:
        thread = threading.Thread(target=go_on, args=(new,))
        thread.start()
        raise RuntimeError
    thread.join()
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_disk_names_the_file(tmp_path):
    """Of a full disk it names nothing by itself."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for attempt in (files.replacing, files.replacing_together, files.temporary_folder):
        with pytest.raises(files.CannotWrite) as caught, attempt(tmp_path / "a"):
            raise full
        assert str(caught.value) == f"{tmp_path}/a cannot be written: No space left on device"
        assert caught.value.errno == errno.ENOSPC
    with pytest.raises(files.CannotWrite) as caught:
        with files.replacing_together(tmp_path / "a") as new, files.replacing(new / "b"):
            raise full
    assert str(caught.value).startswith(f"{tmp_path}/a/b cannot be written")
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_not_of_the_disk_is_as_it_was(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.replacing(tmp_path / "a"):
        open(tmp_path / "elsewhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(files.CannotWrite) as caught, files.replacing(tmp_path / "folder"):
        pass
    assert str(caught.value) == f"{tmp_path}/folder cannot be written: Is a directory"
