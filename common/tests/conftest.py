import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def flux():
    from ertacache.programs import load_program

    return load_program(ROOT / "ERTACache4FLUX")


@pytest.fixture(scope="session")
def demo(flux):
    """The trained demo that is shipped, float32 on the CPU."""
    return flux.load("demo")


@pytest.fixture(scope="session")
def random_directory(flux, demo, tmp_path_factory):
    """A random FLUX of another size, laid out on disk as a downloaded checkpoint is (sharded transformer included)."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=demo.text_encoder_2.config.d_model,
        pooled_projection_dim=demo.text_encoder.config.hidden_size,
        guidance_embeds=False,  # as FLUX.1-schnell
        axes_dims_rope=(4, 6, 6),
    )
    path = tmp_path_factory.mktemp("random-flux")
    FluxPipeline(**{**demo.components, "transformer": transformer}).save_pretrained(path)
    (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(path / "transformer", max_shard_size="50KB")
    assert (path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    return path
