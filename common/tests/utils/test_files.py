"""Files that are written whole or not at all."""

import os

import pytest

from ertacache.utils.files import check_file, write_atomically
from helpers import refused


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("write", [check_file, lambda path: write_atomically(path, b"{}")])
def test_a_device_a_pipe_and_a_folder_stay_what_they_are(write, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "a device or a pipe"), (os.devnull, "a device or"), (tmp_path, "a folder")):
        with refused(str(path), what, "name a file"):
            write(path)
    assert not (tmp_path / "pipe").is_file() and [p.name for p in tmp_path.iterdir()] == ["pipe"]
