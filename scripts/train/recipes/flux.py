"""The demo of ERTACache4FLUX: a small `FluxPipeline`, flow matching, then guidance distilled into its embedding."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from ertacache.demos import scenes
from recipes import text
from training import Ema, noise_levels, run_stage, save_atomically

SIZE = 64  # height and width of an image, pixels
ATTRIBUTES = {
    "size": list(scenes.SIZES),
    "colour": list(scenes.COLOURS),
    "shape": list(scenes.SHAPES),
    "position": list(scenes.POSITIONS),
    "texture": list(scenes.TEXTURES),
    "ground": list(scenes.COLOURS),
}


@dataclass
class Recipe:
    """Training steps of each stage, and the number of training images in `latents`.

    The defaults are those of the demo in the repository.
    """

    vae: int = 3000
    text: int = 1500
    latents: int = 27000
    transformer: int = 15000
    distilled: int = 1300


# --- data --------------------------------------------------------------------------------------------------------


def training_scenes() -> list[scenes.Scene]:
    """Return the scenes of the grammar that are not held out."""
    return [s for s in scenes.all_scenes() if not scenes.is_held_out(s)]


def render_batch(pool, rng, count) -> torch.Tensor:
    """Render random training images in [-1, 1], [B, 3, H, W]."""
    chosen = [pool[i] for i in rng.integers(len(pool), size=count)]
    images = np.stack([scenes.render(s, rng, SIZE, SIZE) for s in chosen])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def sample_captioned(rng, count) -> list[scenes.Scene]:
    """Draw random training scenes, a fifth of the optional attributes left open."""
    pool = training_scenes()
    return [scenes.loosen(pool[i], rng, 0.2) for i in rng.integers(len(pool), size=count)]


# --- text --------------------------------------------------------------------------------------------------------


def build_tokenizers(work: Path):
    """Train a byte-pair encoding for CLIP and a sentencepiece unigram model for T5 on the caption grammar."""
    rng = np.random.default_rng(0)
    captions = [scenes.loosen(s, rng).caption() for s in training_scenes()]
    t5 = text.train_sentencepiece(work / "tokenizers", captions)
    lines = text.caption_lines(captions)
    clip = CLIPTokenizer().train_new_from_iterator(lines, vocab_size=600, show_progress=False)
    clip.model_max_length = text.TEXT_LENGTH
    return clip, t5


def build_text_encoders(clip_tokenizer, t5_tokenizer):
    """Return the CLIP and the T5 encoder, untrained."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=text.WIDTH,
            projection_dim=text.WIDTH,
            intermediate_size=2 * text.WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=text.TEXT_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    return clip, T5EncoderModel(T5Config(**text.t5_options(t5_tokenizer)))


# --- VAE ---------------------------------------------------------------------------------------------------------


def build_vae():
    """Return the VAE, untrained."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def train_vae(work, vae, steps, device):
    """Train the VAE on random training images."""
    vae.to(device, memory_format=torch.channels_last)
    pool = training_scenes()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)

    def loss_of(step):
        images = render_batch(pool, np.random.default_rng([2, step]), 8).to(device)
        posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images) + 1e-5 * posterior.kl().mean() / 1024

    run_stage("vae", work, steps, {"vae": vae}, optimizer, loss_of, learning_rate=2e-3, cooldown=0.5)


@torch.no_grad()
def build_latents(work, vae, count, device):
    """Encode training images, unless the latents are stored, and set the VAE's shift and scale.

    Returns:
        The captions, and the latents packed as FLUX packs them, of zero mean and unit variance, [N, 64, 16].
    """
    path = work / "latents.pt"
    if not path.exists():
        rng = np.random.default_rng(3)
        pool = training_scenes()
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])[:count]
        captions, latents = [], []
        for begin in tqdm(range(0, count, 64), desc="latents", mininterval=10, disable=None):
            chosen = [pool[i] for i in order[begin : begin + 64]]
            captions += [scenes.loosen(s, rng).caption() for s in chosen]
            images = np.stack([scenes.render(s, rng, SIZE, SIZE) for s in chosen])
            images = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
            latents.append(vae.encode(images).latent_dist.mean.half().cpu())
        latents = torch.cat(latents)
        statistics = {"shift": latents.float().mean().item(), "scale": 1 / latents.float().std().item()}
        save_atomically({"captions": captions, "latents": latents, **statistics}, path)
    data = torch.load(path, weights_only=True)
    vae.register_to_config(shift_factor=data["shift"], scaling_factor=data["scale"])
    z = (data["latents"].float() - data["shift"]) * data["scale"]
    b, c, h, w = z.shape
    return data["captions"], FluxPipeline._pack_latents(z, b, c, h, w)  # [N, 64, 16]


# --- transformer -------------------------------------------------------------------------------------------------


def build_transformer():
    """Return the transformer, untrained."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


@torch.no_grad()
def embed(pipe, captions):
    """Return embeddings of the M different captions, as the pipeline computes them.

    Returns:
        T5 sequences [M, L, 96], CLIP vectors [M, 96], and the row of each caption in them, [N].
    """
    unique = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    batches = [
        pipe.encode_prompt(list(unique)[i : i + 256], None, max_sequence_length=text.TEXT_LENGTH)[:2]
        for i in range(0, len(unique), 256)
    ]
    sequences, pooled = (torch.cat(embeddings) for embeddings in zip(*batches, strict=True))
    return sequences, pooled, torch.tensor([unique[c] for c in captions])


def train_transformer(work, pipe, data, steps, distil_steps, device, batch=32):
    """Train the transformer by flow matching, then distil guidance into its guidance embedding.

    Args:
        work: Folder of the checkpoints.
        pipe: The pipeline; its transformer is trained.
        data: Captions and latents of `build_latents`.
        steps: Steps of flow matching.
        distil_steps: Steps of distillation.
        device: To train on.
        batch: Images per step.
    """
    captions, latents = data
    model, teacher = pipe.transformer.to(device), build_transformer().to(device).eval().requires_grad_(False)
    sequences, pooled, index = embed(pipe, [*captions, ""])
    empty = index[-1]
    image_ids = FluxPipeline._prepare_latent_image_ids(1, SIZE // 8, SIZE // 8, device, torch.float32)
    text_ids = torch.zeros(text.TEXT_LENGTH, 3, device=device)

    def velocity(network, x, sigma, rows, guidance):
        return network(
            hidden_states=x,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled[rows].to(device),
            encoder_hidden_states=sequences[rows].to(device),
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def draw(stage, step):
        generator = torch.Generator().manual_seed(stage * 10_000_000 + step)
        pick = torch.randint(len(latents), (batch,), generator=generator)
        sigma = noise_levels(batch, generator)
        clean = latents[pick].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        level = sigma.to(device)[:, None, None]
        return generator, index[pick], sigma.to(device), (1 - level) * clean + level * noise, noise - clean

    def flow_matching(step):  # Eq. 3; one caption in ten is dropped
        generator, rows, sigma, x, target = draw(1, step)
        rows = torch.where(torch.rand(batch, generator=generator) < 0.1, empty, rows)
        return F.mse_loss(velocity(model, x, sigma, rows, torch.ones(batch, device=device)), target)

    def distillation(step):  # the guidance embedding learns v_u + g (v_c - v_u) of the undistilled teacher
        generator, rows, sigma, x, _ = draw(2, step)
        g = (1 + 4 * torch.rand(batch, generator=generator)).to(device)
        one = torch.ones(batch, device=device)
        with torch.no_grad():
            conditional = velocity(teacher, x, sigma, rows, one)
            unconditional = velocity(teacher, x, sigma, empty.expand(batch), one)
        target = unconditional + g[:, None, None] * (conditional - unconditional)
        return F.mse_loss(velocity(model, x, sigma, rows, g), target)

    for stage, count, loss_of, rate in (
        ("transformer", steps, flow_matching, 1e-3),
        ("distilled", distil_steps, distillation, 5e-4),
    ):
        if count == 0:
            continue
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=True)
        ema = Ema(model)
        run_stage(stage, work, count, {"model": model}, optimizer, loss_of, learning_rate=rate, ema=ema)
        model.load_state_dict(ema.state_dict())
        teacher.load_state_dict(ema.state_dict())


# --- assembly ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(pipe, count, guidance=3.5, steps=30):
    """Measure the prompt accuracy of the uncached pipeline on `count` held-out captions.

    Returns:
        The shares of images, 0 to 1, in which all attributes ("all"), and each one, agree with the caption.
    """
    held_out = scenes.sample_scenes(count, seed=100, held_out=True)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for begin in range(0, count, 20):
        batch = held_out[begin : begin + 20]
        output = pipe(
            [s.caption() for s in batch],
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=text.TEXT_LENGTH,
            generator=[torch.Generator().manual_seed(begin + i) for i in range(len(batch))],
        )
        images += [np.asarray(image) for image in output.images]
    verdicts = [scenes.agreement(s, p) for s, p in zip(held_out, images, strict=True)]
    shares = {name: float(np.mean([v[name] for v in verdicts])) for name in ATTRIBUTES}
    return {"all": float(np.mean([all(v.values()) for v in verdicts])), **shares}


def train(work: Path, recipe: Recipe, device) -> FluxPipeline:
    """Run all stages, resuming from their checkpoints, and return the trained pipeline."""
    clip_tokenizer, t5_tokenizer = build_tokenizers(work)
    clip, t5 = (encoder.to(device) for encoder in build_text_encoders(clip_tokenizer, t5_tokenizer))
    vae, transformer = build_vae(), build_transformer()
    train_vae(work, vae, recipe.vae, device)

    def pooled(captions):
        return clip(text.token_ids(clip_tokenizer, captions).to(device)).pooler_output

    def mean(captions):
        return t5(text.token_ids(t5_tokenizer, captions).to(device)).last_hidden_state.mean(1)

    encoders = {"clip": (clip, pooled), "t5": (t5, mean)}
    text.train_text(work, encoders, ATTRIBUTES, sample_captioned, recipe.text, device)
    data = build_latents(work, vae.eval(), recipe.latents, device)
    # Dynamic shifting as in FLUX.1-dev: mu is 1.15 at the demo's 64 tokens, as for the real model at 1024².
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift=3.0,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=16,
        max_image_seq_len=64,
    )
    pipe = FluxPipeline(scheduler, vae, clip.eval(), clip_tokenizer, t5.eval(), t5_tokenizer, transformer)
    train_transformer(work, pipe, data, recipe.transformer, recipe.distilled, device)
    return pipe
