"""Open-Sora 1.2 at tiny size: golden tensors of data/opensora12, the models they belong to, and a random pipeline."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from opensora12 import OpenSoraPipeline, RFlowScheduler, load_transformer, load_vae

DATA = Path(__file__).parent / "data" / "opensora12"
VAE_SIZES = {
    "spatial_block_out_channels": (8, 8, 8, 8),
    "spatial_layers_per_block": 1,
    "spatial_norm_num_groups": 4,
    "temporal_block_out_channels": (4, 8, 8, 16),
    "temporal_num_res_blocks": 2,
    "temporal_norm_num_groups": 2,
}


@cache
def golden(name):
    return load_file(DATA / f"{name}.safetensors")


@cache
def transformer():
    return load_transformer(DATA / "stdit3").requires_grad_(False)


@cache
def vae():
    return load_vae(DATA / "vae", **VAE_SIZES).requires_grad_(False)


def case_a(**changes):
    """Arguments of golden case A: two videos, texts of 5 and 9 tokens."""
    g = golden("stdit3_tiny_forward")
    arguments = {
        "hidden_states": g["A.x"],
        "timestep": g["A.timestep"],
        "encoder_hidden_states": g["A.y"][:, 0],
        "encoder_attention_mask": g["A.mask"],
        "fps": g["A.fps"],
        "height": 48,
        "width": 64,
    }
    return arguments | changes


def far(a, b):
    """The largest difference of two tensors, which must have one shape."""
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().max().item()


def random_pipeline(folder):
    """The tiny models with a tokenizer and a random text encoder, made in `folder`."""
    from transformers import T5Config, T5EncoderModel

    from recipes.text import train_sentencepiece

    tokenizer = train_sentencepiece(folder, ["a red circle moving left", "aesthetic score: 6.5."])
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0)
    pipe = OpenSoraPipeline(tokenizer, T5EncoderModel(config).eval(), vae(), transformer(), RFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
