"""Training a demo from nothing: every stage runs, resumes, and saves a pipeline that its model folder can load."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from ertacache import UserError
from ertacache.demos.emoji import all_emoji
from recipes import emoji_pictures

SHORT = {
    "ERTACache4FLUX": ["latents=2", "distilled=2"],
    "ERTACache4Wan2.1": ["latents=8", "batch=2"],
    "ERTACache4CogVideoX-2B": ["latents=8", "batch=2"],
    "ERTACache4OpenSora1.2": ["latents=8", "batch=2"],
}


def train(folder, *flags):
    command = [sys.executable, str(ROOT / "scripts" / "train" / "train_demo.py"), folder, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def put_pictures(folder):
    """Stand-ins for the training pictures of the FLUX demo, so that none are fetched: patches of random colours."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for emoji in all_emoji():
        colours = rng.integers(0, 256, (4, 4, 4), dtype=np.uint8)
        Image.fromarray(colours).resize((64, 64)).save(folder / f"{emoji.file}.png")


@pytest.mark.slow
@pytest.mark.parametrize("folder", SHORT)
def test_all_stages_run_and_a_second_run_resumes(folder, tmp_path):
    put_pictures(tmp_path / "work" / "emoji")
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
    accuracy = json.loads(done.stdout.splitlines()[-1])
    assert accuracy and all(0 <= share <= 1 for share in accuracy.values())
    assert (tmp_path / "demo" / "model_index.json").exists()
    if folder not in ("ERTACache4FLUX", "ERTACache4Wan2.1"):  # one of the images', one of the videos' recipes
        return
    again = train(folder, *flags, "vae=3")
    assert again.returncode == 0, again.stderr
    assert "vae 3/3" in again.stdout and "vae 2/" not in again.stdout and "transformer" not in again.stdout


@pytest.mark.parametrize(("npm", "words"), [("exit 1", "npm cannot fetch"), ("touch it.tgz", "than expected")])
def test_pictures_that_cannot_be_had_are_one_line_and_leave_nothing(npm, words, tmp_path, monkeypatch):
    (tmp_path / "npm").write_text(f"#!/bin/sh\n{npm}\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=words) as caught:
        emoji_pictures.fetch(tmp_path / "emoji")
    assert str(tmp_path / "emoji") in str(caught.value) and not (tmp_path / "emoji").exists()
