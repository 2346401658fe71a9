"""The autoencoder of Open-Sora 1.2 against the original code's numbers, and the rules of its chunks."""

import pytest
import torch

from helpers import refused
from opensora import far, golden, vae
from opensora12 import AutoencoderOpenSora
from opensora12.temporal import CausalConv3d


@pytest.mark.parametrize("frames", [1, 3, 8, 17])
def test_the_second_stage(frames):
    g, temporal = golden("vae_tiny_temporal"), vae().temporal
    assert far(temporal.encode(g[f"temporal.encode.f{frames}.in"]), g[f"temporal.encode.f{frames}.moments"]) < 1e-4
    assert far(temporal.decode(g[f"temporal.decode.f{frames}.in"], frames), g[f"temporal.decode.f{frames}.out"]) < 1e-4


@pytest.mark.parametrize(("name", "stride"), [("causalconv", 1), ("causalconv_stride2", 2)])
def test_causal_convolutions(name, stride):
    g, conv = golden("vae_tiny_temporal"), CausalConv3d(2, 3, time_stride=stride).requires_grad_(False)
    conv.load_state_dict({"weight": g[f"{name}.weight"], "bias": g[f"{name}.bias"]})
    assert far(conv(g["causalconv.in"]), g[f"{name}.out"]) < 1e-5


def test_latent_sizes():
    model = vae()
    frames = {1: 1, 17: 5, 20: 6, 51: 15, 102: 30, 204: 60, 408: 120}
    assert {n: model.latent_frames(n) for n in frames} == frames
    assert model.latent_size(51, 480, 854) == (15, 60, 106)


def test_encoding_is_chunk_by_chunk_and_normalised():
    """The mode of 20 frames: of 17 and of 3, each through both stages, as in the original pipeline."""
    torch.manual_seed(0)
    model, x = vae(), torch.randn(2, 3, 20, 17, 24)
    posterior = model.encode(x, sample_frames=False).latent_dist
    frames = [model.spatial.encode(x[:, :, i]).latent_dist.mode() * 0.18215 for i in range(20)]
    chunks = torch.stack(frames[:17], dim=2), torch.stack(frames[17:], dim=2)
    mean, logvar = torch.cat([model.temporal.encode(chunk) for chunk in chunks], dim=2).chunk(2, dim=1)
    shift = torch.tensor([-0.10, 0.34, 0.27, 0.98]).view(1, 4, 1, 1, 1)
    scale = torch.tensor([3.85, 2.32, 2.33, 3.06]).view(1, 4, 1, 1, 1)
    assert posterior.mode().shape == (2, 4, 6, 2, 3)
    assert far(posterior.mode(), (mean - shift) / scale) < 1e-5
    assert far(posterior.std, (0.5 * logvar).exp() / scale) < 1e-5


def test_decoding_undoes_the_normalisation_and_the_chunks():
    torch.manual_seed(0)
    model, z = vae(), torch.randn(2, 4, 6, 2, 3)
    shift, scale = (
        torch.tensor(c).view(1, 4, 1, 1, 1) for c in (model.config.latents_shift, model.config.latents_scale)
    )
    first, last = (z * scale + shift).split(5, dim=2)
    frames = torch.cat([model.temporal.decode(first, 17), model.temporal.decode(last, 3)], dim=2) / 0.18215
    video = torch.stack([model.spatial.decode(frames[:, :, i]).sample for i in range(20)], dim=2)
    assert far(model.decode(z, num_frames=20).sample, video) < 1e-5
    with refused("num_frames 21", "6 latent frames", "have 5"):
        model.decode(z[:, :, :5], num_frames=21)


def test_sampling_is_reproducible_and_of_both_stages():
    model, x = vae(), torch.linspace(-1, 1, 3 * 4 * 16 * 16).view(1, 3, 4, 16, 16)
    draws = [model.encode(x, generator=torch.Generator().manual_seed(n)).latent_dist.mode() for n in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_another_size_is_trained_in_every_weight(tmp_path):
    """Six channels, one level fewer in space; random draws in both stages let gradients through."""
    torch.manual_seed(0)
    sizes = {"spatial_block_out_channels": (8, 8, 8), "spatial_layers_per_block": 1, "spatial_norm_num_groups": 4}
    sizes |= {"temporal_block_out_channels": (4, 8), "temporal_downsample": (True,), "temporal_num_res_blocks": 1}
    sizes |= {
        "temporal_norm_num_groups": 2,
        "latent_channels": 6,
        "latents_shift": [0.0] * 6,
        "latents_scale": [2.0] * 6,
    }
    model, x = AutoencoderOpenSora(**sizes, micro_frame_size=8), torch.randn(1, 3, 11, 8, 8)
    model(x, sample_posterior=True).sample.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.spatial_factor == 4 and model.latent_size(11, 8, 8) == (6, 2, 2)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoencoderOpenSora.from_pretrained(tmp_path)(x).sample, model(x).sample)


def test_statistics_of_another_number_of_channels_are_refused():
    with refused("latents_shift", "4", "latent_channels is 6"):
        AutoencoderOpenSora(latent_channels=6)
