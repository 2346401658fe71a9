"""Open-Sora's sampler and prompts against the original code's, and the pipeline on a tiny random model."""

import copy
import json

import numpy as np
import pytest
import torch

from helpers import refused
from opensora import DATA, far, golden, random_pipeline, transformer
from opensora12 import OpenSoraPipeline, RFlowScheduler, STDiT3Transformer3DModel, prompts

SIZES = {"height": 48, "width": 64, "num_frames": 17}
PROMPTS = ["a red circle", "a red circle moving left, a red circle moving left"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return random_pipeline(tmp_path_factory.mktemp("tokenizer"))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the sampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden("rflow_timesteps"))
def test_timesteps(name):
    dtype, size, steps = name.split(".")
    height, width, frames = (int(n) for n in size.split("x"))
    dtype = {"bf16args": torch.bfloat16, "fp32args": torch.float32}[dtype]
    scheduler = RFlowScheduler()
    steps = int(steps.removeprefix("steps"))
    scheduler.set_timesteps(steps, height=height, width=width, num_frames=frames, size_dtype=dtype)
    assert far(scheduler.timesteps, golden("rflow_timesteps")[name]) < 2e-4
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0 and len(scheduler.sigmas) == steps + 1


def test_ten_guided_steps(pipe):
    g, seen = golden("rflow_trajectory_n1"), []
    pipe.set_timesteps(10, num_frames=51, height=48, width=64)
    assert far(pipe.scheduler.timesteps, g["timesteps"][:, 0]) < 2e-4

    def watch(pipe, i, t, tensors):
        seen.append(tensors["latents"])

    z = pipe.denoise(g["z0"], pipe.conditioning(g["y"][:, 0], g["mask"], 51, 48, 64), 7.0, watch)
    assert far(torch.stack(seen[:-1]), g["z_before_step"][1:]) < 2e-3
    assert far(z, g["z_final"]) < 2e-3


def test_the_exact_velocity_of_noised_data_leads_back_to_the_data():
    torch.manual_seed(0)
    scheduler, data, noise = RFlowScheduler(), torch.randn(2, 4, 3, 6, 8), torch.randn(2, 4, 3, 6, 8)
    scheduler.set_timesteps(4, height=480, width=854, num_frames=51)
    x = scheduler.add_noise(data, noise, scheduler.timesteps[1].expand(2))
    assert far(x, data + scheduler.sigmas[1] * (noise - data)) < 1e-6
    for t in scheduler.timesteps[1:]:
        x = scheduler.step((data - noise).bfloat16(), t, x).prev_sample
    assert x.dtype == torch.float32 and far(x, data) < 2e-2 and scheduler.step_index == 4


def test_steps_follow_another_grid_from_any_place():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(3, height=64, width=64, num_frames=1)
    scheduler.sigmas, scheduler.timesteps = torch.tensor([1.0, 0.5, 0.25, 0.0]), torch.tensor([1000.0, 500.0, 250.0])
    scheduler.set_begin_index(1)
    one, none = torch.ones(1), torch.zeros(1)
    assert [scheduler.step(one, t, none).prev_sample.item() for t in scheduler.timesteps[1:]] == [0.25, 0.25]


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads((DATA / "prompts.json").read_text("utf-8")))
def test_prompts_are_completed_and_cleaned(case):
    text = prompts.append_scores(case["prompt"], case["aes"], case["flow"], case["camera_motion"])
    assert text == case["appended"] and prompts.clean(text) == case["cleaned"]


def test_cleaning_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setattr(prompts, "is_ftfy_available", lambda: False)
    with refused("pip install ftfy beautifulsoup4"):
        prompts.clean("a cat")


# --- the pipeline --------------------------------------------------------------------------------------------------


def test_a_batch_gives_what_single_prompts_give(pipe):
    settings = {**SIZES, "num_inference_steps": 3, "output_type": "latent", "aesthetic_score": None}
    together = pipe(PROMPTS, generator=generators(1, 2), **settings).frames
    lengths = pipe.encode_prompt(PROMPTS, aesthetic_score=None)[1].sum(1)
    assert lengths[0] < lengths[1]
    for row, (prompt, generator) in enumerate(zip(PROMPTS, generators(1, 2), strict=True)):
        alone = pipe(prompt, generator=generator, **settings).frames[0]
        assert torch.allclose(alone, together[row], rtol=1e-4, atol=1e-4)  # another summation order


def test_videos_are_the_decoded_latents(pipe):
    settings = {**SIZES, "num_inference_steps": 2}
    latents = pipe(PROMPTS, generator=generators(1, 2), **settings, output_type="latent").frames
    videos = pipe(PROMPTS, generator=generators(1, 2), **settings).frames
    tensors = pipe(PROMPTS, generator=generators(1, 2), **settings, output_type="pt", return_dict=False)[0]
    assert latents.shape == (2, 4, 5, 6, 8) and latents.dtype == torch.float32
    assert videos.shape == (2, 17, 48, 64, 3) and videos.min() >= 0 and videos.max() <= 1
    decoded = (pipe.vae.decode(latents, 17).sample / 2 + 0.5).clamp(0, 1)
    assert np.allclose(videos, decoded.permute(0, 2, 3, 4, 1), atol=1e-6)
    assert far(tensors, decoded.transpose(1, 2)) < 1e-6


def test_without_guidance_the_null_text_is_not_read(pipe):
    rows = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, out: rows.append(len(out[0])))
    for guidance in (1.0, 7.0):
        pipe("a red circle", **SIZES, num_inference_steps=1, guidance_scale=guidance, output_type="latent")
    handle.remove()
    assert rows == [1, 2]


def test_scores_latents_and_the_callback_reach_the_result(pipe):
    settings = {**SIZES, "num_inference_steps": 2, "output_type": "latent", "aesthetic_score": None}
    noise = torch.randn(1, 4, 5, 6, 8, generator=torch.Generator().manual_seed(1))
    plain = pipe("a red circle", latents=noise, **settings).frames
    assert torch.equal(plain, pipe("a red circle", generator=generators(1), **settings).frames)
    assert not torch.equal(plain, pipe("a red circle", latents=noise, motion_score=4.0, **settings).frames)
    stopped = pipe("a red circle", latents=noise, **settings, callback_on_step_end=lambda *_: {"latents": noise * 0})
    assert torch.equal(stopped.frames, noise * 0) and pipe.current_timestep is None


def test_in_bfloat16_sizes_are_rounded_as_upstreams_are(pipe):
    """The last of 30 times at 480 × 854 is 143.121 there, 143.105 in float32; a width of 854 is 856."""
    rounded = OpenSoraPipeline(**{**pipe.components, "transformer": copy.deepcopy(transformer()).bfloat16()})
    widths = []
    for p, last in ((pipe, 143.105), (rounded, 143.121)):
        p.set_timesteps(30, num_frames=51, height=480, width=854)
        assert p.scheduler.timesteps[-1].item() == pytest.approx(last, abs=6e-4)
        conditioning = p.conditioning(*p.encode_prompt(["a red circle"]), 51, 480, 854)
        assert p.velocity(torch.zeros(1, 4, 1, 2, 2), torch.tensor(500.0), conditioning).isfinite().all()
        widths.append(conditioning["width"])
    assert widths == [854, 856]


def test_a_saved_pipeline_is_loaded_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    settings = {**SIZES, "num_inference_steps": 2, "output_type": "latent"}
    wanted = pipe("a red circle", generator=generators(1), **settings).frames
    loaded = OpenSoraPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded("a red circle", generator=generators(1), **settings).frames, wanted)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"][0] == "opensora12.autoencoder"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 7}, ("height 7", "at least 8")),
        ({"width": 64.5}, ("width 64.5", "whole number")),
        ({"num_frames": 0}, ("num_frames 0", "at least 1")),
        ({"num_frames": 16}, ("num_frames 16", "at least 17")),
        ({"num_inference_steps": 0}, ("num_inference_steps 0", "at least 1")),
        ({"prompt": []}, ("prompt []", "list of texts")),
        ({"generator": generators(1, 2)}, ("generators: 2, prompts: 1", "one a prompt")),
        ({"latents": torch.zeros(1, 4, 1, 6, 8)}, ("[1, 4, 1, 6, 8]", "[1, 4, 5, 6, 8]")),
        ({"output_type": "gif"}, ("'gif'", "np, pt or latent")),
    ],
)
def test_what_cannot_run_is_refused(pipe, changes, words):
    with refused(*words):
        pipe(**{"prompt": "a red circle", **SIZES, **changes})


def test_components_that_do_not_belong_together_are_refused(pipe):
    other = STDiT3Transformer3DModel(depth=1, hidden_size=32, num_heads=2, caption_channels=16)
    with refused("32 channels", "takes 16", "load"):
        OpenSoraPipeline(**{**pipe.components, "transformer": other})
    other = STDiT3Transformer3DModel(in_channels=8, depth=1, hidden_size=32, num_heads=2, caption_channels=32)
    with refused("4 channels", "takes 8", "load"):
        OpenSoraPipeline(**{**pipe.components, "transformer": other})
