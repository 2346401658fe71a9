"""The FLUX demo in a stock pipeline, as the campaigns call it."""

from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "ERTACache4FLUX"
SHIPPED = ("demo-30-budget-6", "demo-30-budget-15", "demo-30-budget-10-exact", "demo-30-0.17", "demo-30-0.1-blocks")
CALL = {"num_inference_steps": 30, "height": 64, "width": 64, "guidance_scale": 3.5, "max_sequence_length": 16}
PROMPTS = ["a red apple", "a rocket", "a sailing boat", "a fruit"]


def pipeline():
    """Return the FLUX demo in a stock pipeline."""
    from diffusers import FluxPipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipe = FluxPipeline.from_pretrained(FOLDER / "demo", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, prompt: str = "a rocket", seed: int = 0, **changes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="latent", **{**CALL, **changes}).images
