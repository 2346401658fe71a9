"""Checkpoints in the published layout, the rehearsal on them, and the GPU day on a CPU: scripts/bench."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import gpu_day
import pytest
import rehearse
import torch
from rehearse import Rehearsal, Step, run_step

from conftest import FOLDERS, ROOT
from ertacache.demos.model_folder import load_model_folder
from helpers import refused
from parts import gpu_parts, published

FLUX = ROOT / "ERTACache4FLUX"
LAYOUT = {  # files that are peculiar to a repository
    "ERTACache4FLUX": ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"),
    "ERTACache4Wan2.1": ("tokenizer/spiece.model", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"),
    "ERTACache4CogVideoX-2B": ("tokenizer/spiece.model", "transformer/diffusion_pytorch_model.safetensors"),
    "ERTACache4OpenSora1.2": ("OpenSora-VAE-v1.2/model.safetensors", "t5-v1_1-xxl/pytorch_model.bin.index.json"),
}
SHARDED = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_checkpoint_in_the_published_layout_runs(folder, tmp_path):
    """The tokenizers have T5's special tokens, and prepare and one step of the loop make finite latents."""
    model, sampler = published.write(folder, tmp_path, "toy"), load_model_folder(ROOT / folder)
    sharded = (SHARDED,) if folder in ("ERTACache4FLUX", "ERTACache4Wan2.1") else ()
    assert all((model / name).is_file() for name in (*LAYOUT[folder], *sharded))
    pipe = sampler.load(str(model))
    tokenizer = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
    ids = tokenizer("a red kite").input_ids
    assert tokenizer.pad_token_id == 0 and ids[-1] == tokenizer.eos_token_id == 1 and "<extra_id_0>" in str(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red kite"
    settings = sampler.settings_of(pipe, steps=3, **rehearse.SMALLEST[folder])
    inputs = sampler.prepare(pipe, ["a red kite"], [0], **settings)
    assert sampler.denoise(pipe, inputs).isfinite().all()


def test_clip_has_its_own_end_of_text(tmp_path):
    from transformers import CLIPTokenizer

    size = published.write_clip_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("A Lighthouse", padding="max_length").input_ids
    assert len(ids) == 77 and ids[0] == size - 2 and ids[-1] == size - 1 == max(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a lighthouse"


# --- the rehearsal ---------------------------------------------------------------------------------------------------


def options(work, *words):
    return rehearse.parse_arguments([str(FLUX), "--size", "toy", "--work", str(work), *words])


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    """The smallest checkpoint: written, calibrated and run by run.sh, and found again."""
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "rehearse.py"), str(FLUX), "--size", "toy"]
    command += ["--work", str(tmp_path), "--only", "checkpoint,speedup,again"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "rehearsal.json").read_text())
    rows = {row["step"]: row for row in result["steps"]}
    assert list(rows) == ["checkpoint", "speedup", "again"] and all(row["passed"] for row in rows.values())
    assert rows["speedup"]["disk_mib"] > 0 and rows["speedup"]["peak_memory_mib"] > 100
    assert "calibrating one (quick)" in (tmp_path / "logs" / "speedup.log").read_text()
    assert "calibrating" not in (tmp_path / "logs" / "again.log").read_text()
    assert not (FLUX / "cache" / "local" / "FLUX.1-dev").exists() and (tmp_path / "rehearsal.md").is_file()


def shell(name, script, **options):
    return Step(name, name, ("sh", "-c", script), **options)


def test_steps_that_are_done_are_not_repeated(tmp_path, monkeypatch):
    steps = [shell("one", f"echo 1 >>{tmp_path}/one"), shell("two", f"test -e {tmp_path}/there")]
    monkeypatch.setattr(Rehearsal, "steps", lambda self: steps)
    rehearsal = Rehearsal(options(tmp_path / "work"))
    assert [row["passed"] for row in rehearsal.run([])] == [True, False]
    (tmp_path / "there").touch()
    assert [row["passed"] for row in rehearsal.run([])] == [True, True]
    assert (tmp_path / "one").read_text() == "1\n"
    rehearsal.run(["one"])
    assert (tmp_path / "one").read_text() == "1\n1\n"


@pytest.mark.parametrize(
    ("script", "expected", "passed"),
    [("exit 0", 0, True), ("exit 2", 0, False), ("exit 2", 2, True), ("echo Traceback; exit 2", 2, False)],
)
def test_a_step_passes_by_its_exit_code_and_without_a_traceback(script, expected, passed, tmp_path):
    assert run_step(shell("a", script, expected=expected), tmp_path / "log")["passed"] == passed


def test_a_step_is_interrupted_once_there_is_a_checkpoint(tmp_path):
    watched = tmp_path / "local"
    folder = watched / "calibration.partial"
    script = f"trap 'exit 130' INT; test -e {watched} && exit 1; mkdir -p {folder}; echo abc >{folder}/a.safetensors; "
    watched.mkdir()  # of an earlier run
    loop = "while :; do sleep 0.1; done"
    row = run_step(shell("a", script + loop, watched=watched, interrupt=True, expected=130), tmp_path / "log")
    assert row["passed"] and row["exit_code"] == 130 and row["disk_mib"] is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "dance"], "--only dance: choose from checkpoint, lambda"),
        (["--prompts", "9"], "--prompts 9: give a number from 1 to 4"),
        (["--steps", "3"], "--steps 3: give at least 6"),
    ],
)
def test_what_cannot_be_rehearsed(words, said, tmp_path):
    with refused(said):
        options(tmp_path, *words)


# --- the GPU day -----------------------------------------------------------------------------------------------------


def day(out, *words):
    words = ["--device", "cpu", "--size", "toy", "--folders", "ERTACache4FLUX", "--backend", "eager", *words]
    return gpu_day.parse_arguments([*words, "--seconds", "1500", "--patience", "9", "--out", str(out)])


@pytest.mark.slow
def test_the_gpu_day_starts_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "SEEDS", gpu_parts.SEEDS[:1])
    gpu_day.Day(day(tmp_path)).run()
    parts = json.loads((tmp_path / "gpu-day.json").read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, "done"), parts
    rows = {name: part["rows"] for name, part in parts.items()}
    assert [row["loop equals stock pipeline"] for row in rows["parity"]] == [True, True]
    assert rows["parity"][0]["distance to the CPU in float32"] == 0
    assert len(rows["plans"]) == 4 and all(row["pipeline to loop"] < 1e-5 for row in rows["plans"])
    reference = next(row for row in rows["plans"] if row["plan"] == "demo-30-budget-15")
    assert reference["mean squared error"] < 20 * reference["predicted"]
    assert [row["calibrated"] for row in rows["calibration"]] == list(gpu_parts.CALIBRATIONS)
    assert all(row["computed"] == 2 and row["pipeline to loop"] < 1e-5 for row in rows["calibration"])
    assert [row["offload"] for row in rows["offload, ERTACache4FLUX"]] == ["none", "model", "group, block"]
    assert 5 <= rows["history"][0]["kept, latents"] <= 9
    assert {row["offload"]: row["distance"] for row in rows["offload"]} == {"model": 0, "group, block": 0}
    for name, count in (("latency, ERTACache4FLUX", 6), ("compile, ERTACache4FLUX", 5)):
        assert len(rows[name]) == count and all(row["error"] is None for row in rows[name])
    assert {row["speedup_nfe"] for row in rows["latency, ERTACache4FLUX"][1:5]} == {2.0}
    assert all(row["distance to eager"] < 1e-4 for row in rows["compile"]) and len(rows["compile"]) == 2


def test_parts_that_do_not_fit_are_cut_off_or_skipped_and_said(tmp_path, monkeypatch):
    def slow():
        yield {"row": 1}
        while True:
            pass

    def broken():
        yield {"row": 1}
        raise RuntimeError("no kernel image")

    parts = {"slow": (0.3, slow), "broken": (9, broken), "quick": (9, lambda: iter([{"row": 1}, {"row": 2}]))}
    monkeypatch.setattr(gpu_day, "parts_of", lambda args: parts)
    args = Namespace(out=tmp_path, seconds=60, patience=1, only=[], device="cpu", size="toy")
    gpu_day.Day(args).run()
    found = json.loads((tmp_path / "gpu-day.json").read_text())["parts"]
    states = {name: (part["state"], len(part["rows"])) for name, part in found.items()}
    assert states == {"slow": ("cut off", 1), "broken": ("failed", 1), "quick": ("done", 2)}
    gpu_day.Day(Namespace(**{**vars(args), "seconds": 1})).run()
    found = json.loads((tmp_path / "gpu-day.json").read_text())["parts"]
    assert [part["state"] for part in found.values()] == ["skipped", "skipped", "done"]
    assert re.search(r"slow: skipped \d s are left, 1 rows", (tmp_path / "gpu-day.log").read_text())


def test_the_gpu_day_needs_a_gpu_for_full_sizes(tmp_path):
    with refused("--size full needs a GPU: use --size toy"):
        gpu_day.parse_arguments(["--device", "cpu", "--out", str(tmp_path)])
    with refused("--only dance: choose from parity"):
        day(tmp_path, "--only", "dance")
    script = Path(ROOT / "scripts" / "bench" / "gpu_day.sh")
    assert subprocess.run(["sh", "-n", str(script)]).returncode == 0 and torch.get_num_threads()
