"""What evaluation.py measures, on dx/ds = A x, and the scripts that print tables, on the demo."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from ertacache import UserError
from ertacache.caches.registry import CACHES
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.session import CalibrationSession
from ertacache.evaluation.method import Method
from ertacache.evaluation.metrics import Clip, latent_psnrs, quality
from ertacache.evaluation.runner import Evaluation
from helpers import refused
from toy import Pipe, ToySampler

A = np.array([[1.5, 2.0, 0.1], [-1.7, 0.3, 0.4], [0.2, -0.6, 0.9]])
SETTINGS = {"steps": 12}


class Images(ToySampler):
    """Latents of 16 × 16 rows of three, shown as they are."""

    FOLDER = Path("toy")

    def __init__(self):
        super().__init__(rows=256)

    def decode(self, pipe, latents, inputs):
        return latents.reshape(-1, 16, 16, 3).numpy() / 20 + 0.5


@pytest.fixture
def evaluation(tmp_path):
    options = {"model": "toy", "batch_size": 2, "work": tmp_path, "exact": True}
    return Evaluation(Images(), Pipe(A), ["a", "b", "c"], range(3), SETTINGS, **options)


def plan(tmp_path, target):
    options = {"settings": SETTINGS, "batch_size": 4, "work": tmp_path, "progress": False}
    session = CalibrationSession(Images(), Pipe(A), list("defghijk"), range(10, 18), **options)
    return BudgetCalibration(session, target).plans([6])[6]


def test_both_distances_say_what_a_plan_aims_at(evaluation, tmp_path):
    uncached = evaluation.row(evaluation.uncached())
    plans = (evaluation.planned("budget", target, plan(tmp_path, target)) for target in ("exact", "reference"))
    exact, reference = (evaluation.row(candidate, target=2) for candidate in plans)
    assert uncached["psnr"] is None and uncached["latent_psnr"] is None and uncached["nfe"] == 12
    assert reference["psnr"] > exact["psnr"] and reference["latent_psnr"] > exact["latent_psnr"]
    assert exact["exact_psnr"] > uncached["exact_psnr"] + 6 and exact["nfe"] == 6
    assert reference["exact_psnr"] == pytest.approx(uncached["exact_psnr"], abs=1)
    assert [row["asked"] for row in (uncached, exact, reference)] == [None, 2, 2]
    assert exact["timeline"]["error"] is None and len(exact["timeline"]["sigmas"]) == 25  # a grid of its own
    errors = reference["timeline"]["error"]
    assert len(errors) == 6 and errors[0] == 0 and 0 < max(errors) < 0.1


def test_fewer_steps_on_a_shifted_grid(evaluation):
    shifts = (None, 1.0, 3.0)
    native, same, other = (evaluation.row(evaluation.fewer_steps("fewer", str(s), 6, s)) for s in shifts)
    assert native["latent_psnr"] == pytest.approx(same["latent_psnr"], abs=1e-3)  # the toy's own grid is uniform
    assert abs(native["latent_psnr"] - other["latent_psnr"]) > 1 and other["settings"]["shift"] == 3.0


def test_finished_rows_are_not_measured_again(evaluation):
    calls = []

    def run(part, on_step=None):
        calls.append(part)
        return evaluation.in_loop()(part)

    candidate = Method("same", "same", "peer", run, run, SETTINGS)
    first = evaluation.row(candidate, target=2)
    assert calls == [slice(0, 2), slice(2, 4)] and first["latent_psnr"] is None and first["speedup_nfe"] == 1
    assert evaluation.row(candidate, target=3) == {**first, "asked": 3} and len(calls) == 2


def test_latency_is_measured_in_turn_with_the_uncached_run(evaluation):
    evaluation.repeats, order = 3, []

    def timed(name, seconds):
        def run(part, on_step=None):
            order.append(name)
            return evaluation.in_loop()(part)._replace(seconds=seconds)

        return run

    candidate = Method("half", "half", "peer", timed("B", 0.5), timed("A", 1.0), SETTINGS)
    found = evaluation.latency(candidate)
    assert "".join(order) == "ABABABAB" and found["latency_s"] == 0.5 and found["speedup_latency"] == 2
    assert found["end_to_end_s"] > 0 and found["speedup_end_to_end"] > 0


@pytest.fixture(scope="module")
def clip(tmp_path_factory, demo):
    """A random CLIP with the demo's tokenizer, as a directory."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    text = {**small, "vocab_size": len(demo.tokenizer), "max_position_embeddings": 16, "eos_token_id": 0}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=32), demo.tokenizer).save_pretrained(folder)
    return Clip(str(folder))


def test_clip_compares_pictures_frames_and_prompts(clip):
    videos = np.random.default_rng(0).random((2, 3, 32, 32, 3))
    assert clip.similarity(videos, videos) == pytest.approx(1)
    assert clip.similarity(videos, videos[:, ::-1] ** 3) < 0.9999
    prompts = ["a big red star", "a small blue ring"]
    scores = [clip.score([p], v[None]) for p, v in zip(prompts, videos, strict=True)]
    assert min(scores) >= 0 and clip.score(prompts, videos) == pytest.approx(np.mean(scores), abs=1e-3)
    with pytest.raises(UserError, match=r"no model '\./nowhere'"):
        Clip("./nowhere")
    none = Clip(None)
    assert none.similarity(videos, videos) is None and none.score(prompts, videos) is None


def test_latent_psnr():
    reference = np.array([[0.0, 4.0], [0.0, 2.0]])
    assert latent_psnrs(reference, reference + 0.4) == pytest.approx([20, 20 * np.log10(5)])
    assert np.isinf(latent_psnrs(reference, reference)).all()


def test_quality_shows_the_tail():
    """Ten images whose error is 10^(−k/20), so that their PSNRs are known."""
    decibels = np.array([12.0, 20, 29, 31, 35, 40, 45, 50, 60, 70])
    uncached = np.full((10, 16, 16, 3), 0.25)
    found = quality(uncached, uncached + 10 ** (-decibels / 20).reshape(-1, 1, 1, 1))
    assert found["psnr"] == pytest.approx(decibels.mean())
    assert found["psnr_p10"] == pytest.approx(np.quantile(decibels, 0.1))
    assert found["psnr_worst"] == pytest.approx(12) and found["below_30db"] == 0.3
    assert found["psnr_8bit"] is None  # 0.25 + 0.0003 has the same 8 bits
    coarse = 10 ** (-decibels[:6] / 20)
    levels = np.rint(255 * (0.25 + coarse)) - np.rint(255 * 0.25)
    found = quality(uncached[:6], uncached[:6] + coarse.reshape(-1, 1, 1, 1))
    assert found["psnr_8bit"] == pytest.approx(np.mean(-20 * np.log10(levels / 255)))
    equal = quality(uncached, uncached)
    assert equal["psnr"] is equal["psnr_worst"] is equal["psnr_p10"] is None and equal["below_30db"] == 0


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / name), str(ROOT / "ERTACache4FLUX"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_table_of_the_demo(tmp_path):
    methods = ["--methods", "fewer-steps,first-block,budget", "--speedups", "3", "--no-exact", "--samples", "1"]
    files = ["--json", str(tmp_path / "rows.json"), "--csv", str(tmp_path / "rows.csv")]
    how = ["--count", "2", "--latency-repeats", "1", "--work", str(tmp_path / "work")]
    done = script("evaluate.py", *methods, *files, *how)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    none, fewer, budget, peer = rows
    assert [row["method"] for row in rows] == ["none", "fewer-steps", "budget", "first-block"]
    assert [row["nfe"] for row in rows[:3]] == [30, 10, 10] and budget["psnr"] > fewer["psnr"] + 6
    assert budget["speedup_flops"] == pytest.approx(3, rel=0.01) and budget["exact_psnr"] is None
    assert peer["label"] == f"first-block ({CACHES['first-block'].written(peer['settings']['value'])})"
    assert 2 < peer["speedup_flops"] < 4.5 and peer["nfe"] == pytest.approx(30 / peer["speedup_flops"])
    assert 25 < peer["psnr"] < 70 and none["psnr"] is None and none["speedup_latency"] == 1
    assert all((tmp_path / path).exists() for row in rows for path in row["samples"]) and len(none["samples"]) == 1
    assert budget["plan"] == "ERTACache4FLUX/cache/demo-30-budget-10.json"
    assert done.stdout.count("\n| ") == 6 and "2 prompts" in done.stdout
    assert (tmp_path / "rows.csv").read_text().count("\n") == 5
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert script("evaluate.py", *methods, *files, *how).stdout == done.stdout
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # all rows were finished


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("evaluate.py", "--methods magic --speedups 2", "--methods magic: choose from"),
        ("evaluate.py", "--methods budget", "give either --speedups"),
        ("evaluate.py", "--methods budget --speedups 2 --samples -1", "--samples -1: give a whole number"),
        ("evaluate.py", "--methods budget --speedups 2 --sites edge", "--sites edge: choose from output, blocks"),
        ("evaluate.py", "--methods budget --thresholds 0.1", "--thresholds has no meaning for budget"),
        ("evaluate.py", "--methods budget --speedups 0.5", "a speed-up is a number of at least 1"),
        ("evaluate.py", "--methods budget --speedups 100", "--speedups 100: at most 15 of 30 steps"),
        ("evaluate.py", "--methods ertacache --thresholds nan", "--thresholds nan: λ must be a finite number"),
        ("evaluate.py", "--speedups 2 --count 10000000", "--count 10000000: give a whole number from 1 to 100000"),
        ("evaluate.py", "--speedups 2 --steps 2", "--steps 2: give a whole number from 3"),
        ("evaluate.py", "--speedups 2 --seed -1", "--seed -1: give a whole number from 0"),
        ("evaluate.py", "--speedups 2 --batch-size 0", "--batch-size 0: give a whole number of at least 1"),
        ("evaluate.py", "--speedups 2 --compare", "unrecognized arguments: --compare"),
        ("evaluate.py", "--speedups 2 --step-seconds 2", "--step-seconds 2 is of --dry-run: give that too, or"),
        ("evaluate.py", "--speedups 2 --dry-run --step-seconds nan", "--step-seconds nan: give seconds above 0"),
        ("bench/study.py", "prompts --counts 2.5", "--counts '2.5' is no list of numbers: give whole numbers"),
        ("bench/study.py", "prompts --compare", "unrecognized arguments: --compare"),
        ("bench/study.py", "draws --json /dev/null/x", "cannot write to /dev/null"),
        ("bench/noise.py", "--effort quick", "unrecognized arguments: --effort quick"),
        ("bench/overhead.py", "--seed 3", "unrecognized arguments: --seed 3"),
        ("bench/study.py", "transfer --sizes 48", "--sizes 48: write HEIGHTxWIDTH"),
        ("bench/study.py", "prompts --counts two", "'two' is no list of numbers"),
        ("bench/study.py", "prompts --model other/model", "use the demo"),
    ],
)
def test_what_cannot_be_measured(name, arguments, words, monkeypatch):
    monkeypatch.syspath_prepend((ROOT / "scripts" / name).parent)
    monkeypatch.setattr(sys, "argv", [name, str(ROOT / "ERTACache4FLUX"), *arguments.split()])
    main = runpy.run_path(str(ROOT / "scripts" / name))["main"]
    with refused(words):
        main()
