import inspect
import os
from functools import cache
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each where several processes share the tests
    os.environ["OMP_NUM_THREADS"] = "1"  # in place of what the process that started this one has set below
os.environ.setdefault("OMP_NUM_THREADS", "2")  # of the programs that tests start, too

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class ModelFolder:
    """A model folder, its shipped demo (float32 on the CPU), and how its stock pipeline is called."""

    def __init__(self, name, prompts, guidance, **options):
        from ertacache.demos.model_folder import load_model_folder

        self.name, self.prompts, self.guidance, self.options = name, prompts, guidance, options
        self.sampler = load_model_folder(ROOT / name)
        self.pipe = self.sampler.load("demo")

    def stock(self, pipe, prompts, seeds, steps, output_type="latent", guidance=None, **options):
        """What the stock pipeline returns: latents, or float32 images or videos."""
        if "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
            options["max_sequence_length"] = 16
        result = pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=self.guidance if guidance is None else guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type=output_type,
            **{**self.options, **options},
        )
        return result.images if hasattr(result, "images") else result.frames


IMAGES = ["a red apple", "a steam train"]
VIDEOS = ["a red circle moving left slowly on a blue background", "a green cross moving up"]
MODEL_FOLDERS = {
    "flux": ("ERTACache4FLUX", IMAGES, 3.5, {"height": 64, "width": 64}),
    "wan": ("ERTACache4Wan2.1", VIDEOS, 5.0, {"height": 64, "width": 64, "num_frames": 17}),
    "cogvideox": ("ERTACache4CogVideoX-2B", VIDEOS, 6.0, {"height": 64, "width": 64, "num_frames": 17}),
    "opensora": ("ERTACache4OpenSora1.2", VIDEOS, 7.0, {"height": 64, "width": 64, "num_frames": 17}),
}

FOLDERS = [model_folder[0] for model_folder in MODEL_FOLDERS.values()]


@cache
def open_model_folder(key):
    *arguments, options = MODEL_FOLDERS[key]
    return ModelFolder(*arguments, **options)


VIDEO_FOLDERS = [pytest.param(key, marks=pytest.mark.slow) for key in MODEL_FOLDERS if key != "flux"]


@pytest.fixture(scope="session", params=["flux", *VIDEO_FOLDERS])
def model_folder(request):
    return open_model_folder(request.param)


@pytest.fixture(scope="session")
def flux():
    return open_model_folder("flux").sampler


@pytest.fixture(scope="session")
def demo():
    """The trained FLUX demo that is shipped, float32 on the CPU."""
    return open_model_folder("flux").pipe


@pytest.fixture(scope="session")
def random_directory(flux, demo, tmp_path_factory):
    """A random FLUX of another size, laid out on disk as a downloaded checkpoint is (sharded transformer included)."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=demo.transformer.config.in_channels,
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
