"""The demo of ERTACache4OpenSora1.2: a small `OpenSoraPipeline`, rectified flow, a two-stage autoencoder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from opensora12 import AutoencoderOpenSora, OpenSoraPipeline, RFlowScheduler, STDiT3Transformer3DModel
from recipes import text, video
from recipes.training import noise_levels, start_straight

FRAME_CHANNELS = 7  # channels between the two stages of the VAE: two per colour, and a constant
WIDTH = 16  # channels of the VAE's layers


@dataclass
class Recipe:
    """Training steps of each stage, number of videos in `latents`, batch size of the transformer's training.

    The defaults are those of the demo in the repository.
    """

    vae: int = 2400
    text: int = 1200
    latents: int = 3200
    transformer: int = 7500
    batch: int = 16


def build(tokenizer):
    """Return the VAE, the text encoder and the transformer, untrained."""
    vae = AutoencoderOpenSora(
        spatial_latent_channels=FRAME_CHANNELS,
        spatial_block_out_channels=(WIDTH,) * 3,
        spatial_layers_per_block=1,
        spatial_norm_num_groups=1,
        spatial_scaling_factor=1.0,
        latent_channels=video.CHANNELS,
        temporal_block_out_channels=(WIDTH,) * 4,
        temporal_num_res_blocks=1,
        temporal_norm_num_groups=1,
        latents_shift=(0.0,) * video.CHANNELS,
        latents_scale=(1.0,) * video.CHANNELS,
        micro_batch_size=17,
    )
    start_stages_straight(vae)
    transformer = STDiT3Transformer3DModel(
        in_channels=video.CHANNELS,
        # All five latent frames in one token: positions in time are only relative, and at this size a model with one
        # frame per token moved shapes along the right axis but in an arbitrary direction.
        patch_size=(5, 2, 2),
        hidden_size=144,
        depth=3,
        num_heads=4,
        caption_channels=text.WIDTH,
        model_max_length=text.TEXT_LENGTH,
        input_sq_size=video.SIZE,
    )
    return vae, T5EncoderModel(T5Config(**text.t5_options(tokenizer))), transformer


@torch.no_grad()
def start_stages_straight(vae):
    """Apply `start_straight`, and initialise the second stage as the identity in time.

    The second stage normalises over a whole chunk and its first convolution has no bias, so amplitudes would be lost.
    Therefore the first stage also outputs a constant, so large that the norms divide by nearly the same number for
    every video.
    """
    start_straight(vae, vae.spatial.quant_conv.bias, vae.temporal.quant_conv.bias)
    constant = FRAME_CHANNELS - 1
    vae.spatial.quant_conv.weight[constant] = 0.0
    vae.spatial.quant_conv.bias[constant] = 4.0
    encoder, decoder = vae.temporal.encoder, vae.temporal.decoder
    positive, negative = 2 * video.CHANNELS, 2 * video.CHANNELS + 1  # constants of the decoder, of both signs
    decoder.conv_in.weight[positive:] = 0.0
    decoder.conv_in.bias[positive], decoder.conv_in.bias[negative] = 4.0, -4.0
    for conv, pairs in ((encoder.conv_out, FRAME_CHANNELS), (decoder.conv_out, video.CHANNELS)):
        newest = conv.weight[:, :, -1, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2]
        newest.zero_()
        for channel in range(video.CHANNELS):  # silu(x) − silu(−x) = x
            newest[channel, channel], newest[channel, channel + pairs] = 1.4, -1.4
    decoder.conv_out.weight[constant, positive, -1, 1, 1] = 1.4


def train(work: Path, recipe: Recipe, device) -> OpenSoraPipeline:
    """Run all stages, resuming from their checkpoints, and return the trained pipeline."""
    from opensora12.prompts import append_scores

    captions = [append_scores(caption) for caption in video.training_captions()]
    tokenizer = text.train_sentencepiece(work / "tokenizer", captions)
    vae, text_encoder, transformer = (module.to(device) for module in build(tokenizer))
    # base_size shifts the sigmas as at 480 × 854 and 51 frames: √(64 · 64 / 30²) · √5 = 4.8.
    scheduler = RFlowScheduler(base_size=30)
    sizes = {"sample_height": video.SIZE, "sample_width": video.SIZE, "sample_frames": video.FRAMES}
    pipe = OpenSoraPipeline(tokenizer, text_encoder, vae, transformer, scheduler, **sizes)

    def encode(captions):  # with zeros at the padding
        states, mask = pipe.encode_prompt(captions)
        return states * mask.unsqueeze(-1)

    def normalise(latents):
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        vae.register_to_config(latents_shift=mean.tolist(), latents_scale=std.tolist())
        return (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)

    def example(clean, noise, generator):  # rectified flow: x = (1 − s) data + s noise, v = data − noise, time 1000 s
        s = noise_levels(len(clean), generator, shift=4.0)
        level = s.view(-1, 1, 1, 1, 1)
        return (1 - level) * clean + level * noise, 1000 * s, clean - noise

    def predict_with(captions):
        states_of = video.caption_table(lambda unique: pipe.encode_prompt(unique)[0], captions)
        masks_of = video.caption_table(lambda unique: pipe.encode_prompt(unique)[1], captions)

        def predict(x, t, pick, dropped):
            kept = torch.zeros_like(dropped)  # a dropped caption keeps its mask, as the null text does
            states = torch.where(dropped.view(-1, 1, 1), transformer.y_embedding, states_of(pick, kept))
            output = transformer(x, t, states, masks_of(pick, kept), 24.0, video.SIZE, video.SIZE, return_dict=False)[0]
            return output[:, : video.CHANNELS]

        return predict

    clips = ((4, 1), (1, 17), (2, 9), (1, 17))
    groups = [{"params": vae.spatial.parameters()}, {"params": vae.temporal.parameters(), "share": 0.06}]
    options = {"groups": groups, "decode": lambda z, frames: vae.decode(z, frames).sample}
    video.train_stages(work, recipe, pipe, encode, clips, normalise, example, predict_with, device, **options)
    return pipe


def measure(pipe, count):
    """Return the prompt accuracy of the uncached pipeline on `count` held-out captions."""
    return video.measure_accuracy(pipe, count, num_inference_steps=30, guidance_scale=7.0)
