"""The census of diffusers' pipelines on a few of them; others on each day."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT


def census(*arguments):
    command = [sys.executable, ROOT / "scripts" / "bench" / "census.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_outcomes(tmp_path):
    outcomes = {
        "StableDiffusionPipeline": "works",
        "DDPMPipeline": "refused",
        "KandinskyCombinedPipeline": "refused",
        "SanaSprintPipeline": "refused",
        "FluxPipeline": "works",
    }
    done = census(*outcomes, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {name: rows[name]["outcome"] for name in outcomes} == outcomes
    assert rows["FluxPipeline"]["calls"] == [8, 8, 4, 3]
    assert rows["StableDiffusionPipeline"]["calls"] == [9, 9, 4, 3]  # PNDM makes one more
    assert "| DDPM | with `DDIMScheduler` | 8, 8, 4, 3 | DDPM |" in done.stdout
    assert "| KandinskyCombined | no: is several pipelines in one: " in done.stdout


@pytest.mark.slow
def test_in_bfloat16():
    """CogVideoX and Mochi round their latents between the steps; Z-Image turns an image's into float32 at the first."""
    names = ("CogVideoXPipeline", "MochiPipeline", "ZImageImg2ImgPipeline")
    done = census(*names, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert all(f"| {name.removesuffix('Pipeline')} | yes |" in done.stdout for name in names)


@pytest.mark.slow
def test_pipelines_of_the_day():
    done = census("--sample", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| **4 that were built, of 4** |" in done.stdout and done.stdout.count("\n| ") == 6


@pytest.mark.slow
def test_an_unknown_name_is_one_line():
    done = census("Nonsense")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: Nonsense: no pipeline")
