"""The demo of ERTACache4CogVideoX-2B: a small `CogVideoXPipeline`, v-prediction, DDIM with zero terminal SNR."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from recipes import text, video
from recipes.training import start_straight


@dataclass
class Recipe:
    """Training steps of each stage, number of videos in `latents`, batch size of the transformer's training.

    The defaults are those of the demo in the repository.
    """

    vae: int = 3000
    text: int = 1200
    latents: int = 3200
    transformer: int = 9600
    batch: int = 16


def build(tokenizer):
    """Return the VAE, the text encoder and the transformer, untrained."""
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(16, 16, 16),
        latent_channels=video.CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
        sample_height=video.SIZE,
        sample_width=video.SIZE,
    )
    start_straight(vae, vae.encoder.conv_out.conv.bias)
    transformer = CogVideoXTransformer3DModel(
        patch_size=4,
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=video.CHANNELS,
        out_channels=video.CHANNELS,
        time_embed_dim=128,
        text_embed_dim=text.WIDTH,
        num_layers=6,
        sample_width=video.SIZE // 4,
        sample_height=video.SIZE // 4,
        sample_frames=video.FRAMES,
        max_text_seq_length=text.TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
    )
    return vae, T5EncoderModel(T5Config(**text.t5_options(tokenizer))), transformer


def train(work: Path, recipe: Recipe, device) -> CogVideoXPipeline:
    """Run all stages, resuming from their checkpoints, and return the trained pipeline."""
    tokenizer = text.train_sentencepiece(work / "tokenizer", video.training_captions())
    vae, text_encoder, transformer = (module.to(device) for module in build(tokenizer))
    scheduler = CogVideoXDDIMScheduler(  # the real model's configuration
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    pipe = CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler)

    def encode(captions):
        return pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=text.TEXT_LENGTH)[0]

    def normalise(latents):
        vae.register_to_config(scaling_factor=1 / latents.square().mean().sqrt().item())
        pipe.vae_scaling_factor_image = vae.config.scaling_factor
        return latents.transpose(1, 2) * vae.config.scaling_factor  # [B, F', C, H', W'], as the transformer expects

    alphas = scheduler.alphas_cumprod.float()

    def example(clean, noise, generator):  # v = √ᾱ noise − √(1 − ᾱ) data, at a uniform timestep
        t = torch.randint(len(alphas), (len(clean),), generator=generator)
        a, b = alphas[t].sqrt().view(-1, 1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1, 1)
        return a * clean + b * noise, t, a * noise - b * clean

    def predict_with(captions):
        embeddings_of = video.caption_table(encode, captions)
        return lambda x, t, *rows: transformer(x, embeddings_of(*rows), t, return_dict=False)[0]

    clips = ((4, 1), (2, 9), (2, 9))
    video.train_stages(work, recipe, pipe, encode, clips, normalise, example, predict_with, device)
    return pipe


def measure(pipe, count):
    """Return the prompt accuracy of the uncached pipeline on `count` held-out captions."""
    return video.measure_accuracy(
        pipe, count, num_inference_steps=50, guidance_scale=6.0, max_sequence_length=text.TEXT_LENGTH, output_type="np"
    )
