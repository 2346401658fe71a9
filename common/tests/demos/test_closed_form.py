"""The closed-form problem against integrals, limits and its own data."""

import numpy as np
import pytest
import torch

from conftest import ROOT
from ertacache.demos import closed_form
from ertacache.demos.model_folder import load_model_folder
from ertacache.utils.media import to_uint8
from helpers import refused


@pytest.fixture(scope="module")
def folder():
    return load_model_folder(ROOT / "scripts" / "bench" / "closed_form")


def denoiser(points, members=None, spread=0.2):
    points = torch.tensor(points, dtype=torch.float64)
    members = torch.ones(1, len(points), dtype=torch.bool) if members is None else torch.tensor(members)
    return closed_form.ClosedFormDenoiser(points, members, spread)


@pytest.mark.parametrize("s", [0.05, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("spread", [0.1, 0.5, 3.0])
def test_the_velocity_is_the_conditional_mean_of_noise_minus_data(s, spread):
    """Against the integral over the data, on a fine grid."""
    points, x = [-1.0, 0.3, 1.1], 0.45
    model = denoiser([[p] for p in points], spread=spread)
    data = np.linspace(-20, 20, 400001)
    density = sum(np.exp(-((data - p) ** 2) / (2 * spread**2)) for p in points)
    noise = (x - (1 - s) * data) / s
    weights = density * np.exp(-(noise**2) / 2)
    expected = np.sum(weights * (noise - data)) / weights.sum()
    v = model(torch.tensor([[x]], dtype=torch.float64), torch.tensor(s), torch.tensor([0]), 1)
    assert v.item() == pytest.approx(expected, abs=1e-6)


def test_one_point_is_reached_in_one_step():
    model = denoiser([[0.3, -0.8]], spread=0.0)
    x = torch.randn(4, 2, dtype=torch.float64)
    v = model(x, torch.tensor(1.0), torch.zeros(4, dtype=torch.int64), 1)
    assert torch.allclose(x - v, model.points.expand(4, 2))


def test_wide_data_are_linear():
    """b → ∞: every point counts the same, and v is an affine function of x."""
    model, s = denoiser([[1.0, 0.0], [-0.5, 2.0]], spread=1e4), torch.tensor(0.6, dtype=torch.float64)
    x, y = torch.randn(2, 1, 2, dtype=torch.float64)
    asked = torch.tensor([0])
    middle = model((x + y) / 2, s, asked, 1)
    assert torch.allclose(middle, (model(x, s, asked, 1) + model(y, s, asked, 1)) / 2)


def test_guidance_goes_from_all_points_through_the_class():
    model = denoiser([[-1.0], [1.0]], members=[[True, False], [False, True]])
    x, s, asked = torch.tensor([[0.1]], dtype=torch.float64), torch.tensor(0.7), torch.tensor([1])
    everything, own, beyond = (model(x, s, asked, g) for g in (0, 1, 3))
    assert torch.allclose(own - everything, (beyond - everything) / 3) and not torch.allclose(own, everything)
    alone = denoiser([[1.0]])(x, s, torch.tensor([0]), 1)
    assert torch.allclose(own, alone)


@pytest.mark.parametrize("leave_open", [False, True])
def test_samples_are_pictures_that_the_caption_asks_for(folder, leave_open):
    pipe = folder.load("demo")
    prompts = closed_form.sample_captions(6, 1, leave_open=leave_open)
    inputs = folder.prepare(pipe, prompts, range(6), steps=60, guidance=2.0)
    latents = folder.denoise(pipe, inputs)
    assert torch.cdist(latents.flatten(1), pipe.transformer.points).min(1).values.max() < 0.2 * 3072**0.5
    images = to_uint8(folder.decode(pipe, latents, inputs))
    assert closed_form.prompt_accuracy(prompts, images) == 1.0
    assert closed_form.prompt_accuracy(prompts, images[::-1]) < 1.0
    assert closed_form.prompt_accuracy(["a red cat"], images[:1]) is None


def test_captions_for_plans_and_for_measuring_are_kept_apart():
    samples = [closed_form.sample_captions(8, 3, held_out, leave_open) for held_out in (0, 1) for leave_open in (0, 1)]
    assert not {*samples[0], *samples[1]} & {*samples[2], *samples[3]}
    assert all(len(closed_form.captions()[text]) == 56 for text in (*samples[0], *samples[2]))


def test_bad_input_is_one_line(folder):
    for model in ("b=0", "b=x", "width=3", "nonsense"):
        with refused(f"--model {model}", "b=0.3,shift=1"):
            folder.load(model)
    with refused("'a red cat' is no caption"):
        folder.prepare(folder.load("demo"), ["a red cat"], [0])
    with refused("--site blocks"):
        folder.open_site(None, None, "blocks")
