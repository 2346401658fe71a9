"""Files that are written whole or not at all, and folders that failed work leaves no trace of."""

import os
from pathlib import Path

import pytest

from ertacache import UserError
from ertacache.utils.files import path_of, writable, writable_files, write_atomically
from helpers import refused


def checked(path):
    with writable_files(path):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("write", [checked, lambda path: write_atomically(path, b"{}")])
def test_a_device_a_pipe_and_a_folder_stay_what_they_are(write, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    devices = ((tmp_path / "pipe", "a device or a pipe"), (Path(os.devnull), "a device or"), (tmp_path, "a folder"))
    for path, what in devices:
        with refused(str(path), what, "name a file"):
            write(path)
    assert not (tmp_path / "pipe").is_file() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_of_work_that_fails_no_empty_folder_is_left(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("mine", "mine/a/b", "new", "new/a/b"):
        with pytest.raises(KeyboardInterrupt), writable(tmp_path / folder) as made:
            assert made.is_dir()
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with writable_files(tmp_path / "new" / "x.json", None, tmp_path / "other" / "y.json"):
        write_atomically(tmp_path / "new" / "x.json", b"{}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "new", "x.json"]
    (tmp_path / "file").write_text("")
    with refused("cannot write to", "file/a/b"), writable(tmp_path / "file" / "a" / "b"):
        pytest.fail("it is not writable")


@pytest.mark.parametrize("value", [5, None, "", b"x", ["a"]])
def test_what_is_no_path_is_refused_with_its_value(value):
    with refused(f"path = {value!r}: give a path", error=UserError):
        path_of(value, "path")
