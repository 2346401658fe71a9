"""The demo of ERTACache4Wan2.1: a small `WanPipeline`, flow matching, UniPC on shifted flow sigmas."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from recipes import text, video
from recipes.training import noise_levels, start_straight


@dataclass
class Recipe:
    """Training steps of each stage, number of videos in `latents`, batch size of the transformer's training.

    The defaults are those of the demo in the repository.
    """

    vae: int = 2400
    text: int = 1200
    latents: int = 3200
    transformer: int = 11000
    batch: int = 16


def build(tokenizer):
    """Return the VAE, the text encoder and the transformer, untrained."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=video.CHANNELS,
        dim_mult=[1, 1, 1],
        temperal_downsample=[True, True],
        num_res_blocks=1,
        scale_factor_spatial=4,
        latents_mean=[0.0] * video.CHANNELS,
        latents_std=[1.0] * video.CHANNELS,
    )
    start_straight(vae, vae.quant_conv.bias)
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=video.CHANNELS,
        out_channels=video.CHANNELS,
        text_dim=text.WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=6,
        rope_max_seq_len=256,
    )
    return vae, UMT5EncoderModel(UMT5Config(**text.t5_options(tokenizer))), transformer


def train(work: Path, recipe: Recipe, device) -> WanPipeline:
    """Run all stages, resuming from their checkpoints, and return the trained pipeline."""
    tokenizer = text.train_sentencepiece(work / "tokenizer", video.training_captions())
    vae, text_encoder, transformer = (module.to(device) for module in build(tokenizer))
    # flow_shift as for the real model at 480p.
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer)

    def encode(captions):
        return pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=text.TEXT_LENGTH)[0]

    def normalise(latents):
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        return (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)

    def example(clean, noise, generator):  # flow matching: x = (1 − s) data + s noise, v = noise − data, time 1000 s
        s = noise_levels(len(clean), generator, shift=4.0)
        level = s.view(-1, 1, 1, 1, 1)
        return (1 - level) * clean + level * noise, 1000 * s, noise - clean

    def predict_with(captions):
        embeddings_of = video.caption_table(encode, captions)
        return lambda x, t, *rows: transformer(x, t, embeddings_of(*rows), return_dict=False)[0]

    clips = ((4, 1), (1, 17), (2, 9), (1, 17))
    video.train_stages(work, recipe, pipe, encode, clips, normalise, example, predict_with, device)
    return pipe


def measure(pipe, count):
    """Return the prompt accuracy of the uncached pipeline on `count` held-out captions."""
    return video.measure_accuracy(
        pipe, count, num_inference_steps=50, guidance_scale=5.0, max_sequence_length=text.TEXT_LENGTH, output_type="np"
    )
