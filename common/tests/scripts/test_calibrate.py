"""scripts/calibrate.py: what it says, and what it refuses, before the first model call."""

import importlib.util
import sys

import pytest

from conftest import ROOT
from ertacache.calibration.from_folder import calibrate_budgets
from helpers import refused

WORDS = ["ERTACache4FLUX", "--steps", "6", "--device", "cpu"]


@pytest.fixture
def script(demo, monkeypatch):
    """The script as a module, with the demo loaded once and without calibrations."""
    spec = importlib.util.spec_from_file_location("calibrate_script", ROOT / "scripts" / "calibrate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module.folder_command, "open_pipeline", lambda *_: demo)
    for name in ("calibrate_thresholds", "calibrate_budgets"):
        monkeypatch.setattr(module, name, lambda *arguments: arguments[-1]() or [])  # the last one announces
    return module


def run(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *WORDS, *map(str, words)])
    script.main()


def test_each_plan_is_named_with_its_file_before_it_begins(script, monkeypatch, capsys, tmp_path):
    run(script, monkeypatch, "--speedups", "2,3,2.9", "--thresholds", "0.2", "--out", tmp_path)
    goes_on = "; Ctrl-C and the same command again go on"
    assert capsys.readouterr().err.splitlines() == [
        f"calibrating λ = 0.2 (normal) into {tmp_path}/demo-6-0.2.json{goes_on}",
        f"calibrating 3 of 6 steps (normal) into {tmp_path}/demo-6-budget-3.json{goes_on}",
        f"calibrating 2 of 6 steps (normal) into {tmp_path}/demo-6-budget-2.json{goes_on}",
    ]


def test_a_speedup_beyond_the_steps_is_refused_before_the_thresholds_are_calibrated(script, monkeypatch, tmp_path):
    script.calibrate_thresholds = lambda *_: pytest.fail("a calibration began")
    with refused("--speedups 5: at most 3 of 6 steps"):
        run(script, monkeypatch, "--speedups", "5", "--thresholds", "0.2", "--out", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare"], "unrecognized arguments: --compare"),
        (["--baseline"], "unrecognized arguments: --baseline"),
        (["--plan", "x.json"], "unrecognized arguments: --plan x.json"),
        (["--speedup", "3"], "unrecognized arguments: --speedup 3"),
        (["--threshold", "0.1"], "unrecognized arguments: --threshold 0.1"),
        (["--seed", "5"], "unrecognized arguments: --seed 5"),
        (["--repeats", "5"], "unrecognized arguments: --repeats 5"),
        (["--speedups", ","], "--speedups ',': give numbers, like 2,3"),
    ],
)
def test_flags_that_would_mean_nothing_are_refused(script, monkeypatch, words, message):
    with refused(message):
        run(script, monkeypatch, "--speedups", "2", *words)


@pytest.mark.parametrize("prompts", ["none.txt", "empty.txt"])
def test_nothing_is_announced_that_does_not_begin(script, monkeypatch, capsys, tmp_path, prompts):
    monkeypatch.setattr(script, "calibrate_budgets", calibrate_budgets)
    (tmp_path / "empty.txt").write_text("#")
    with refused(prompts):
        words = ["--speedups", "2", "--calibration-prompts", tmp_path / prompts, "--out", tmp_path / "new" / "plans"]
        run(script, monkeypatch, *words)
    assert capsys.readouterr().err == "" and not (tmp_path / "new").exists()
