"""The model folders that make videos: schedulers, guidance, sizes, and what a user types."""

import copy
import json
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from PIL import Image

from conftest import VIDEO_FOLDERS, open_model_folder
from ertacache.cli.folder_command import main
from ertacache.demos.model_folder import settings_parameters
from ertacache.evaluation import metrics
from ertacache.utils import media
from ertacache.utils.errors import run_program
from helpers import refused

SEEDS = [3, 4]


@pytest.fixture(scope="module", params=VIDEO_FOLDERS)
def model_folder(request):
    return open_model_folder(request.param)


def with_scheduler(model_folder, scheduler):
    return type(model_folder.pipe)(**{**model_folder.pipe.components, "scheduler": scheduler})


def same_as_stock(model_folder, pipe, steps, guidance=None, **sizes):
    settings = {name.removeprefix("num_"): value for name, value in {**model_folder.options, **sizes}.items()}
    guidance = model_folder.guidance if guidance is None else guidance
    prompts, seeds = (model_folder.prompts, SEEDS) if steps < 10 else (model_folder.prompts[:1], SEEDS[:1])
    settings |= {"steps": steps, "guidance": guidance}
    if "negative_prompt" in settings_parameters(model_folder.sampler):
        settings["negative_prompt"] = ""
    inputs = model_folder.sampler.prepare(pipe, prompts, seeds, **settings)
    pipe.set_progress_bar_config(disable=True)
    stock = model_folder.stock(pipe, prompts, seeds, steps, guidance=guidance, **sizes)
    return torch.equal(model_folder.sampler.denoise(pipe, inputs), stock)


# --- parity with the stock pipeline at unusual settings ---------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
def test_guidance_of_any_size_is_the_stock_pipelines(model_folder, guidance):
    assert same_as_stock(model_folder, model_folder.pipe, 4, guidance)


@pytest.mark.parametrize("steps", [3, 7, 12])
def test_step_counts_that_do_not_divide_1000_are_the_stock_pipelines(model_folder, steps):
    assert same_as_stock(model_folder, model_folder.pipe, steps)


@pytest.mark.parametrize("sizes", [{"height": 48, "width": 80}, {"num_frames": 25}, {"num_frames": 1}])
def test_other_sizes_are_the_stock_pipelines(model_folder, sizes):
    assert same_as_stock(model_folder, model_folder.pipe, 4, **sizes)
    settings = {name.removeprefix("num_"): value for name, value in sizes.items()}
    inputs = model_folder.sampler.prepare(model_folder.pipe, model_folder.prompts, SEEDS, steps=3, **settings)
    videos = model_folder.sampler.decode(model_folder.pipe, inputs.latents, inputs)
    wanted = {"frames": 17, "height": 64, "width": 64, **settings}
    assert videos.shape == (2, wanted["frames"], wanted["height"], wanted["width"], 3)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 8, 12])
@pytest.mark.parametrize("key", ["wan", "cogvideox"])
def test_the_other_known_scheduler_is_the_stock_pipelines(key, steps):
    model_folder = open_model_folder(key)
    config = model_folder.pipe.scheduler.config
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    other = euler if model_folder.name.endswith("2.1") else CogVideoXDPMScheduler.from_config(config)
    assert same_as_stock(model_folder, with_scheduler(model_folder, other), steps)


def test_a_stochastic_scheduler_draws_the_same_noise_in_every_run():
    model_folder = open_model_folder("cogvideox")
    pipe = with_scheduler(model_folder, CogVideoXDPMScheduler.from_config(model_folder.pipe.scheduler.config))
    inputs = model_folder.sampler.prepare(pipe, model_folder.prompts, SEEDS, steps=5)
    first, again = (model_folder.sampler.denoise(pipe, inputs) for _ in range(2))
    alone = model_folder.sampler.denoise(
        pipe, model_folder.sampler.prepare(pipe, model_folder.prompts[1:], SEEDS[1:], steps=5)
    )
    assert torch.equal(first, again) and torch.allclose(first[1:], alone, atol=5e-4)


def test_running_leaves_the_pipelines_scheduler_usable(model_folder):
    inputs = model_folder.sampler.prepare(model_folder.pipe, model_folder.prompts, SEEDS, steps=6)
    before = copy.deepcopy(vars(model_folder.pipe.scheduler))
    model_folder.sampler.denoise(model_folder.pipe, inputs)
    assert repr(before) == repr(vars(model_folder.pipe.scheduler))


def test_rotary_positions_reach_the_model():
    """CogVideoX-5B has rotary embeddings; a random model of that kind must match its stock pipeline too."""
    from diffusers import CogVideoXTransformer3DModel

    model_folder = open_model_folder("cogvideox")
    torch.manual_seed(0)
    config = {k: v for k, v in model_folder.pipe.transformer.config.items() if not k.startswith("_")}
    transformer = CogVideoXTransformer3DModel(**{**config, "num_layers": 2, "use_rotary_positional_embeddings": True})
    scheduler = CogVideoXDPMScheduler.from_config(model_folder.pipe.scheduler.config)
    pipe = type(model_folder.pipe)(
        **{**model_folder.pipe.components, "transformer": transformer, "scheduler": scheduler}
    )
    assert same_as_stock(model_folder, pipe, 4)


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sampler(model_folder, tmp_path, monkeypatch):
    """The model folder in a directory of its own, with the shipped demo and prompts and an empty cache."""
    folder = tmp_path / "model_folder"
    (folder / "cache").mkdir(parents=True)
    shutil.copytree(model_folder.sampler.FOLDER / "prompts", folder / "prompts")
    (folder / "demo").symlink_to(model_folder.sampler.FOLDER / "demo")
    monkeypatch.setattr(model_folder.sampler, "FOLDER", folder)
    return model_folder.sampler


def run(sampler, *arguments):
    run_program(lambda: main(sampler, [str(a) for a in arguments]))


def test_a_new_threshold_is_calibrated_and_gives_videos_and_a_comparison(sampler, model_folder, tmp_path):
    (tmp_path / "few.txt").write_text("a red ring\na blue circle moving up slowly\n")
    out = tmp_path / "sample"
    few = ["--steps", 6, "--threshold", 0.9, "--calibration-prompts", tmp_path / "few.txt"]
    run(sampler, "--prompt", model_folder.prompts[0], *few, "--compare", "--out", out)
    names = ["000-baseline.mp4", "000-ertacache.mp4", "comparison.png", "metrics.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    video = imageio.imread(out / "000-baseline.mp4")
    assert video.shape == (17, 64, 64, 3)
    found = json.loads((out / "metrics.json").read_text())
    assert found["nfe"] < 6 and found["quality"]["temporal_psnr"] > 10 and found["quality"]["psnr"] > 10
    assert set(found["quality"]["prompt_accuracy"]) == {"baseline", "cached"}
    assert Image.open(out / "comparison.png").width > 3 * 3 * 64


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frames", "0"], "--frames 0: "),
        (["--frames", "16"], "--frames 16: "),
        (["--height", "3"], "--height 3: "),
        (["--steps", "2"], "--steps 2: "),
        (["--guidance", "nan"], "--guidance nan: "),
        (["--fps", "0"], "--fps 0: give a whole number from 1 to 1000"),
        (["--fps", "1000000000000"], "--fps 1000000000000: give a whole number from 1 to 1000"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(sampler, capsys, tmp_path, flags, words):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run(sampler, "--prompt", "a red circle", "--baseline", *flags, "--out", out)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not out.exists()


@pytest.mark.parametrize("key", ["wan", "cogvideox"])
@pytest.mark.parametrize(("setting", "value"), [("frames", 18), ("height", 60), ("width", 72)])
def test_sizes_between_multiples_are_refused(key, setting, value):
    model_folder = open_model_folder(key)
    with refused(f"--{setting} {value}", "a multiple of", "for example"):
        model_folder.sampler.settings_of(model_folder.pipe, **{setting: value})


def test_cogvideox_refuses_frames_that_its_vae_would_decode_to_another_number():
    model_folder = open_model_folder("cogvideox")
    with refused("--frames 13", "9 or 17"):
        model_folder.sampler.settings_of(model_folder.pipe, frames=13)


def test_an_unknown_scheduler_is_named_with_those_that_are_known(model_folder):
    other = DDIMScheduler() if model_folder.name.endswith("2.1") else DPMSolverMultistepScheduler()
    with refused(type(other).__name__, *model_folder.sampler.SCHEDULERS):
        model_folder.sampler.settings_of(with_scheduler(model_folder, other))


def test_flux_refuses_an_unknown_scheduler_too(flux, demo):
    pipe = FluxPipeline(**{**demo.components, "scheduler": DPMSolverMultistepScheduler()})
    with refused("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"):
        flux.settings_of(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("model_folder", ["opensora"], indirect=True)
def test_a_plan_warns_once_about_other_frames_and_guidance(sampler, model_folder, tmp_path, recwarn):
    (tmp_path / "few.txt").write_text("a red circle\n")
    few = ["--prompt", model_folder.prompts[0], "--steps", 4, "--threshold", 0.9, "--out", tmp_path / "out"]
    run(sampler, *few, "--calibration-prompts", tmp_path / "few.txt")
    (plan,) = (tmp_path / "model_folder" / "cache" / "local").glob("*.json")
    recwarn.clear()
    given = [*few[:4], "--plan", plan, *few[-2:]]
    run(sampler, *given, "--frames", 25, "--guidance", 2)
    texts = [str(w.message) for w in recwarn if "calibrated at" in str(w.message)]
    assert (
        len(texts) == 1 and "frames 17, now 25" in texts[0] and f"guidance {model_folder.guidance}, now 2.0" in texts[0]
    )


# --- measures ---------------------------------------------------------------------------------------------------------


def test_temporal_psnr_sees_flicker_and_not_a_constant_error():
    rng = np.random.default_rng(0)
    video = rng.uniform(0.2, 0.8, (5, 16, 16, 3))
    shifted, flicker = video + 0.1, video + 0.1 * (-1.0) ** np.arange(5)[:, None, None, None]
    assert metrics.temporal_psnr(video, shifted) > 200  # rounding only
    # Differences are wrong by 0.2, halved 0.1: 20 dB.
    assert metrics.temporal_psnr(video, flicker) == pytest.approx(20, abs=1e-6)
    none = metrics.Lpips.__new__(metrics.Lpips)
    none.network = None
    found = metrics.quality(video[None], flicker[None], none)
    assert found["psnr"] == pytest.approx(20, abs=1e-6) and found["lpips"] is None
    assert metrics.quality(video, flicker, none)["temporal_psnr"] is None


def test_first_middle_last():
    videos = np.arange(2 * 5 * 4 * 6 * 3).reshape(2, 5, 4, 6, 3)
    strips = media.first_middle_last(videos)
    assert strips.shape == (2, 4, 20, 3)
    assert np.array_equal(strips[1, :, 7:13], videos[1, 2]) and np.array_equal(strips[0, :, 14:], videos[0, 4])


def test_mp4_keeps_the_colours_and_odd_files_do_not_remain(tmp_path):
    video = np.full((4, 32, 48, 3), (0.9, 0.2, 0.1), np.float32)
    media.save_mp4(tmp_path / "a.mp4", video, fps=8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    read = imageio.imread(tmp_path / "a.mp4")
    assert read.shape == (4, 32, 48, 3) and np.abs(read / 255 - video).max() < 0.03


def test_an_mp4_that_cannot_be_written_is_one_line(tmp_path):
    """ffmpeg ends at once; without a line of its own a program would take that for a reader of its output that went."""
    with refused("cannot write to", "a.mp4", "choose another folder"):
        media.save_mp4(tmp_path / "a.mp4", np.zeros((2, 32, 32, 3), np.float32), fps=10**12)
    assert not list(tmp_path.iterdir())
