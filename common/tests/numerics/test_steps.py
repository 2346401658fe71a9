"""The steps between any two noise levels, against mathematics; parity with diffusers is in test_video.py."""

import math

import pytest
import torch

from ertacache.numerics.steps import ddim_step, dpm_step, predicted_data


def level(angle):
    return torch.tensor(math.cos(angle) ** 2, dtype=torch.float64)


def pair():
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return data, noise


@pytest.mark.parametrize("ends", [(1.5, 1.2), (1.2, 0.4), (0.4, 0.0), (math.pi / 2, 0.9)])
def test_ddim_turns_x_by_the_angle_between_the_levels(ends):
    data, noise = pair()
    x, v = (math.cos(ends[0]) * data + math.sin(ends[0]) * noise, math.cos(ends[0]) * noise - math.sin(ends[0]) * data)
    wanted = math.cos(ends[1]) * data + math.sin(ends[1]) * noise
    turn = ends[1] - ends[0]
    stepped = ddim_step(x, v, level(ends[0]), level(ends[1]))
    assert torch.allclose(stepped, wanted) and torch.allclose(stepped, math.cos(turn) * x + math.sin(turn) * v)
    assert torch.allclose(predicted_data(x, v, level(ends[0])), data)


def test_ddim_in_two_halves_is_one_step_when_v_is_exact():
    data, noise = pair()

    def v(angle):
        return math.cos(angle) * noise - math.sin(angle) * data

    x = math.cos(1.1) * data + math.sin(1.1) * noise
    half = ddim_step(x, v(1.1), level(1.1), level(0.8))
    assert torch.allclose(ddim_step(half, v(0.8), level(0.8), level(0.3)), ddim_step(x, v(1.1), level(1.1), level(0.3)))


def test_dpm_with_the_true_data_has_the_right_mean_and_variance():
    """E[x'] = cos θ' · data + what is left of the noise; the variance of x' given the data is sin²θ'."""
    data, noise = pair()
    angle, angle_next = 1.2, 0.7
    x = math.cos(angle) * data + math.sin(angle) * noise
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    drift = dpm_step(x, data, None, level(angle), level(angle_next), zero)
    fresh = dpm_step(x, data, None, level(angle), level(angle_next), one) - drift
    kept = drift - math.cos(angle_next) * data
    share = (kept / noise).flatten()[0]
    assert torch.allclose(kept, share * noise)
    assert torch.allclose(share**2 + fresh**2, torch.full_like(x, math.sin(angle_next) ** 2))


def test_dpm_of_second_order_is_exact_for_data_that_is_linear_in_the_half_log_snr():
    """With equal predictions before and now the second order changes nothing; from pure noise it falls back to it."""
    data, noise = pair()
    x = math.cos(1.0) * data + math.sin(1.0) * noise
    first = dpm_step(x, data, None, level(1.0), level(0.8), noise)
    assert torch.allclose(dpm_step(x, data, (data, level(1.2)), level(1.0), level(0.8), noise), first)
    at_zero_snr = dpm_step(x, data, (noise, torch.tensor(0.0, dtype=torch.float64)), level(1.0), level(0.8), noise)
    assert torch.allclose(at_zero_snr, first)
    other = dpm_step(x, data, (noise, level(1.2)), level(1.0), level(0.8), noise)
    assert not torch.allclose(other, first)
