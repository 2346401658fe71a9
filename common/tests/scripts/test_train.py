"""Training a demo from nothing: every stage runs, resumes, and saves a pipeline that its model folder can load."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT

SHORT = {
    "ERTACache4FLUX": ["latents=64", "distilled=2"],
    "ERTACache4Wan2.1": ["latents=8", "batch=2"],
    "ERTACache4CogVideoX-2B": ["latents=8", "batch=2"],
    "ERTACache4OpenSora1.2": ["latents=8", "batch=2"],
}


def train(folder, *flags):
    command = [sys.executable, str(ROOT / "scripts" / "train" / "train_demo.py"), folder, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("folder", SHORT)
def test_all_stages_run_and_a_second_run_resumes(folder, tmp_path):
    flags = [
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "demo",
        "--accuracy-prompts",
        2,
        "--device",
        "cpu",
        "--set",
    ]
    flags += ["--set", "vae=2", "text=2", "transformer=2", *SHORT[folder]]
    done = train(folder, *flags)
    assert done.returncode == 0, done.stderr
    assert "vae 2/2" in done.stdout and "text 2/2" in done.stdout and "transformer 2/2" in done.stdout
    assert 0 <= json.loads(done.stdout.splitlines()[-1])["all"] <= 1
    assert (tmp_path / "demo" / "model_index.json").exists()
    again = train(folder, *flags, "vae=3")
    assert again.returncode == 0, again.stderr
    assert "vae 3/3" in again.stdout and "vae 2/" not in again.stdout and "transformer" not in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ERTACache4Nothing"], "there is a recipe for ERTACache4FLUX"),
        (["ERTACache4FLUX", "--set", "vae=many"], "--set vae=many: give NAME=NUMBER with a name of vae"),
        (["ERTACache4Wan2.1", "--set", "distilled=3"], "--set distilled=3"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    done = train(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
