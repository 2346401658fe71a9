"""Whatever has become of the files of an interrupted calibration: a later try says so in a line, and makes its plan."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.threshold import ThresholdCalibration
from helpers import fast, toy_session

SMALL = {"prompts": 4, "steps": 8, "batch_size": 2}


def budget(work, target="reference"):
    return BudgetCalibration(toy_session(work, **SMALL), target).plans([3], "quick")[3]


def threshold(work):
    return ThresholdCalibration(toy_session(work, **SMALL)).plan(0.3, "quick")


def exact(work):
    return budget(work, "exact")


def other_arrays(path, change):
    """Write arrays as another program would."""
    arrays = {name: change(array) for name, array in load_file(path).items()} if path.suffix != ".json" else {}
    save_file(arrays, path)


def not_a_number(array):
    return np.full_like(array, np.nan) if array.dtype.kind == "f" and array.ndim else array


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "a bit": flipped,
    "JSON of another type": lambda path: path.write_text("[1, null]"),
    "deep JSON": lambda path: path.write_text("[" * 10_000),
    "another value": lambda path: path.write_text(json.dumps({"sha256": "0" * 64, "value": float("nan")})),
    "another shape": lambda path: other_arrays(path, lambda array: np.zeros((*array.shape, 2))),
    "not a number": lambda path: other_arrays(path, not_a_number),
}


@pytest.fixture(scope="module", params=fast([budget, threshold, exact], "budget", "threshold"))
def interrupted(request, tmp_path_factory):
    """How a plan is made, an undisturbed one, and the work of a calibration that was killed before it was saved."""
    work = tmp_path_factory.mktemp("work")
    return request.param, request.param(work), work


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(interrupted, damage, tmp_path, capsys):
    make, plan, work = interrupted
    files = sorted(path.relative_to(work) for path in work.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for number, name in enumerate(files):
        again = tmp_path / str(number)
        shutil.copytree(work, again)
        DAMAGES[damage](again / name)
        capsys.readouterr()
        assert make(again) == plan, name
        said = capsys.readouterr().err.splitlines()
        assert said == [f"{again / name} is damaged: what it held is made anew"]


def test_whole_files_are_used(interrupted, capsys):
    make, plan, work = interrupted
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    assert make(work) == plan and not capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before


def test_all_files_damaged_at_once(interrupted, tmp_path, capsys):
    make, plan, work = interrupted
    again = shutil.copytree(work, tmp_path / "again")
    for path in again.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"\0" * 100)
    assert make(again) == plan and "is damaged" in capsys.readouterr().err


def test_a_missing_file_is_made_anew(interrupted, tmp_path):
    make, plan, work = interrupted
    for number, name in enumerate(path.relative_to(work) for path in work.rglob("*.*") if path.is_file()):
        again = shutil.copytree(work, tmp_path / str(number))
        (again / name).unlink()
        assert make(again) == plan, name
