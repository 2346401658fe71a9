"""What evaluation.py measures, on dx/ds = A x, and the scripts that print tables, on the demo."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from toy import Pipe, Program

from ertacache.budget import BudgetCalibration
from ertacache.evaluation import Evaluation
from ertacache.metrics import latent_psnr
from ertacache.peers import PEERS

ROOT = Path(__file__).resolve().parents[2]
A = np.array([[1.5, 2.0, 0.1], [-1.7, 0.3, 0.4], [0.2, -0.6, 0.9]])
SETTINGS = {"steps": 12}


class Pictures(Program):
    """Latents of 16 × 16 rows of three, shown as they are."""

    FOLDER = Path("toy")

    def __init__(self):
        super().__init__(rows=256)

    def decode(self, pipe, latents, inputs):
        return latents.reshape(-1, 16, 16, 3).numpy() / 20 + 0.5


@pytest.fixture
def evaluation():
    options = Namespace(batch_size=2, target="exact", model="toy")
    return Evaluation(Pictures(), Pipe(A), ["a", "b", "c"], range(3), SETTINGS, options, repeats=0)


def plan(tmp_path, target):
    options = {"settings": SETTINGS, "batch_size": 4, "work": tmp_path, "progress": False, "target": target}
    return BudgetCalibration(Pictures(), Pipe(A), list("defghijk"), range(10, 18), **options).plans([6])[6]


def test_both_distances_say_what_a_plan_aims_at(evaluation, tmp_path):
    uncached = evaluation.row("none")
    exact, reference = (evaluation.row("budget", plan(tmp_path, target)) for target in ("exact", "reference"))
    assert uncached["psnr"] is None and uncached["latent_psnr"] is None and uncached["nfe"] == 12
    assert reference["psnr"] > exact["psnr"] and reference["latent_psnr"] > exact["latent_psnr"]
    assert exact["exact_psnr"] > uncached["exact_psnr"] + 6 and exact["nfe"] == 6
    assert reference["exact_psnr"] == pytest.approx(uncached["exact_psnr"], abs=1)


def test_fewer_steps_on_a_shifted_grid(evaluation):
    native, same, other = (evaluation.row("fewer", settings={"steps": 6}, shift=s) for s in (None, 1.0, 3.0))
    assert native["latent_psnr"] == pytest.approx(same["latent_psnr"], abs=1e-3)  # the toy's own grid is uniform
    assert abs(native["latent_psnr"] - other["latent_psnr"]) > 1 and other["settings"]["shift"] == 3.0


def test_latent_psnr():
    reference = np.array([[0.0, 4.0], [0.0, 2.0]])
    assert latent_psnr(reference, reference + 0.4) == pytest.approx((20 + 20 * np.log10(5)) / 2)
    assert latent_psnr(reference, reference) is None


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / name), str(ROOT / "ERTACache4FLUX"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_table_of_the_demo(tmp_path):
    arguments = ["--methods", "fewer-steps,budget", "--speedups", "3", "--count", "2", "--latency-repeats", "1"]
    done = script("evaluate.py", *arguments, "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["nfe"] for row in rows] == [30, 10, 10] and rows[2]["psnr"] > rows[1]["psnr"] + 6
    assert done.stdout.count("\n| ") == 3 and "2 prompts" in done.stdout


def test_other_caches_are_swept_for_the_setting_nearest_to_a_speedup(tmp_path):
    arguments = ["--methods", "first-block", "--speedups", "2", "--count", "2", "--latency-repeats", "1"]
    done = script("evaluate.py", *arguments, "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    none, row = json.loads((tmp_path / "rows.json").read_text())
    assert row["method"].startswith("first-block (τ = ") and row["settings"]["value"] in PEERS["first-block"].values
    assert 1.5 < row["speedup_nfe"] < 2.7 and row["nfe"] == pytest.approx(30 / row["speedup_nfe"])
    assert 30 < row["psnr"] < 70 and none["nfe"] == 30


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("evaluate.py", "--methods magic --speedups 2", "--methods magic: choose from"),
        ("evaluate.py", "--methods budget", "give either --thresholds"),
        ("evaluate.py", "--methods budget --speedups 0.5", "a speed-up is a number of at least 1"),
        ("study.py", "transfer --sizes 48", "--sizes 48: write HEIGHTxWIDTH"),
        ("study.py", "prompts --counts two", "'two' is no list of numbers"),
        ("study.py", "prompts --model other/model", "use the demo"),
    ],
)
def test_what_cannot_be_measured(name, arguments, words):
    done = script(name, *arguments.split())
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
