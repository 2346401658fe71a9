"""`ertacache comfyui install` and `remove`: idempotent, and nothing of others is touched."""

import json
import subprocess
import sys

import pytest

from ertacache.cli import main
from ertacache.cli.comfyui import install, remove
from helpers import refused


@pytest.fixture
def checkout(tmp_path):
    """What tells ComfyUI's folder, with another node in it."""
    for folder in ("comfy", "custom_nodes/other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "main.py").write_text("")
    (tmp_path / "custom_nodes/other/__init__.py").write_text("mine")
    return tmp_path


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_installs_and_removes_without_a_trace(checkout):
    before = files(checkout)
    folder = install(checkout)
    written = files(checkout)
    assert install(checkout) == folder and files(checkout) == written
    names = written.keys() - before.keys()
    assert {name.removeprefix("custom_nodes/ertacache/") for name in names} >= {
        "__init__.py",
        "installed.json",
        "example_workflows/text-to-image.json",
    }
    assert "from ertacache.comfyui.nodes import comfy_entrypoint" in (folder / "__init__.py").read_text()
    assert remove(checkout) == (folder, []) and files(checkout) == before and not folder.exists()
    with refused(folder, "nothing to remove"):
        remove(checkout)


def test_other_files_are_neither_written_over_nor_deleted(checkout):
    folder = install(checkout)
    (folder / "mine.py").write_text("mine")
    (folder / "example_workflows/text-to-image.json").write_text("{}")
    with refused("text-to-image.json", "was changed", "move it away"):
        install(checkout)
    _, left = remove(checkout)
    assert [path.name for path in left] == ["text-to-image.json", "mine.py"]
    with refused(folder, "not written by ertacache"):
        install(checkout)


@pytest.mark.parametrize("record", [None, "[]", "{", '{"/etc/hosts": "0"}', '{"../a": "0"}', '{"a": 0}'])
def test_a_folder_of_another_is_refused(checkout, record):
    folder = checkout / "custom_nodes/ertacache"
    folder.mkdir()
    (folder / "__init__.py").write_text("mine")
    if record is not None:
        (folder / "installed.json").write_text(record)
    for function in (install, remove):
        with refused(folder, "not written by ertacache"):
            function(checkout)
    assert (folder / "__init__.py").read_text() == "mine"


def test_files_of_an_earlier_release_go(checkout):
    folder = install(checkout)
    record = json.loads((folder / "installed.json").read_text())
    old = folder / "old.py"
    old.write_bytes((folder / "__init__.py").read_bytes())
    (folder / "installed.json").write_text(json.dumps(record | {"old.py": record["__init__.py"]}))
    install(checkout)
    assert not old.exists() and json.loads((folder / "installed.json").read_text()) == record


def test_wrong_paths_are_one_line(tmp_path, monkeypatch, capsys):
    for path, words in ((tmp_path / "none", "is no folder"), (tmp_path, "there is no custom_nodes")):
        monkeypatch.setattr(sys, "argv", ["ertacache", "comfyui", "install", str(path)])
        with pytest.raises(SystemExit) as stop:
            main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and words in error and error.count("\n") == 1


def test_the_command(checkout):
    words = [sys.executable, "-m", "ertacache", "comfyui"]
    run = lambda command: subprocess.run([*words, command, checkout], capture_output=True, text=True)  # noqa: E731
    assert "restart ComfyUI" in run("install").stdout and (checkout / "custom_nodes/ertacache").is_dir()
    assert run("remove").stdout.startswith("removed ") and run("remove").returncode == 2
