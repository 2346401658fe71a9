"""The demo of ERTACache4FLUX: a small `FluxPipeline`, flow matching, then guidance distilled into its embedding."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from ertacache.demos import emoji
from recipes import emoji_pictures, text
from recipes.training import Ema, noise_levels, run_stage, save_atomically, start_straight

TOKENS = (emoji.SIZE // 16) ** 2  # of an image: the VAE's factor 8 times FLUX's 2 × 2 packing
SHIFT = 2.0  # of the noise levels in training, towards noise: there the sampler decides what to draw
OPEN = 0.35  # share of training captions that leave open which emoji to draw


@dataclass
class Recipe:
    """Training steps of each stage, the number of training pictures per emoji in `latents`, and whether to compile.

    The defaults are those of the demo in the repository.
    """

    vae: int = 3000
    text: int = 1500
    latents: int = 24
    transformer: int = 34000
    compile: int = 0
    distilled: int = 1000


# --- text --------------------------------------------------------------------------------------------------------


def sample_subjects(rng, indices) -> list[str]:
    """Draw a caption for each emoji: its own, or OPEN of the time that of its kind; half of them as they are."""
    captions = []
    for index in indices:
        one = emoji.all_emoji()[index]
        subject = one.kind if one.kind and rng.random() < OPEN else one.caption
        phrases = emoji.PHRASES[:1] if rng.random() < 0.5 else emoji.PHRASES
        bare = rng.random() < 0.2
        captions.append(emoji.bare(subject) if bare else phrases[rng.integers(len(phrases))].format(subject))
    return captions


def sample_captioned(rng, count) -> tuple[list[str], torch.Tensor]:
    """Draw captions, and for each the probabilities of the emoji that answer it, [B, emoji]."""
    captions = sample_subjects(rng, rng.integers(len(emoji.all_emoji()), size=count))
    answers = torch.zeros(count, len(emoji.all_emoji()))
    for row, caption in zip(answers, captions, strict=True):
        indices = list(emoji.parse(caption))
        row[indices] = 1 / len(indices)
    return captions, answers


def build_tokenizers(work: Path):
    """Train a byte-pair encoding for CLIP and a sentencepiece unigram model for T5 on the captions."""
    captions = [phrase.format(subject) for subject in emoji.answers() for phrase in emoji.PHRASES]
    t5 = text.train_sentencepiece(work / "tokenizers", captions, pieces=1500)
    lines = text.caption_lines(captions)
    clip = CLIPTokenizer().train_new_from_iterator(lines, vocab_size=1500, show_progress=False)
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
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=emoji.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    start_straight(vae, vae.encoder.conv_out.bias)
    return vae


def train_vae(work, vae, pictures, steps, device):
    """Train the VAE on random training pictures."""
    vae.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    def loss_of(step):
        rng = np.random.default_rng([2, step])
        batch = [emoji_pictures.render(pictures, i, rng) for i in rng.integers(len(pictures), size=8)]
        images = emoji_pictures.to_model(batch).to(device)
        posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images) + 1e-4 * divergence

    run_stage("vae", work, steps, {"vae": vae}, optimizer, loss_of, learning_rate=2e-3, cooldown=0.5)


@torch.no_grad()
def build_latents(work, vae, pictures, count, device):
    """Encode training pictures, unless the latents are stored, and set the VAE's shift and scale.

    Returns:
        Latents packed as FLUX packs them, of zero mean and unit variance, [emoji, count, TOKENS, 64].
    """
    path = work / "latents.pt"
    if not path.exists():
        rng, latents = np.random.default_rng(3), []
        for index in tqdm(range(len(pictures)), desc="latents", mininterval=10, disable=None):
            images = emoji_pictures.to_model([emoji_pictures.render(pictures, index, rng) for _ in range(count)])
            latents.append(vae.encode(images.to(device)).latent_dist.mean.half().cpu())
        latents = torch.stack(latents)
        statistics = {"shift": latents.float().mean().item(), "scale": 1 / latents.float().std().item()}
        save_atomically({"latents": latents, **statistics}, path)
    data = torch.load(path, weights_only=True)
    vae.register_to_config(shift_factor=data["shift"], scaling_factor=data["scale"])
    z = (data["latents"].float() - data["shift"]) * data["scale"]
    n, r, c, h, w = z.shape
    return FluxPipeline._pack_latents(z.flatten(0, 1), n * r, c, h, w).unflatten(0, (n, r))


# --- transformer -------------------------------------------------------------------------------------------------


def build_transformer():
    """Return the transformer, untrained."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


@torch.no_grad()
def embed(pipe, captions):
    """Return embeddings of captions, as the pipeline computes them: T5 sequences [M, L, 96], CLIP vectors [M, 96]."""
    batches = [
        pipe.encode_prompt(captions[i : i + 256], None, max_sequence_length=text.TEXT_LENGTH)[:2]
        for i in range(0, len(captions), 256)
    ]
    sequences, pooled = (torch.cat(embeddings) for embeddings in zip(*batches, strict=True))
    return sequences, pooled


def train_transformer(work, pipe, latents, steps, distil_steps, device, batch=32):
    """Train the transformer by flow matching, then distil guidance into its guidance embedding.

    Args:
        work: Folder of the checkpoints.
        pipe: The pipeline; its transformer is trained.
        latents: Of `build_latents`.
        steps: Steps of flow matching.
        distil_steps: Steps of distillation.
        device: To train on.
        batch: Images per step.
    """
    model, teacher = pipe.transformer.to(device), build_transformer().to(device).eval().requires_grad_(False)
    row_of = {caption: row for row, caption in enumerate([*emoji.captions(), ""])}
    sequences, pooled = embed(pipe, list(row_of))
    empty = torch.tensor(row_of[""])
    side = emoji.SIZE // 16
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
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
        rng, generator = np.random.default_rng([stage, step]), torch.Generator().manual_seed(stage * 10_000_000 + step)
        picked, variants = (rng.integers(n, size=batch) for n in latents.shape[:2])
        rows = torch.tensor([row_of[caption] for caption in sample_subjects(rng, picked)])
        sigma = noise_levels(batch, generator, SHIFT)
        clean = latents[torch.from_numpy(picked), torch.from_numpy(variants)].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        level = sigma.to(device)[:, None, None]
        return generator, rows, sigma.to(device), (1 - level) * clean + level * noise, noise - clean

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
        ("transformer", steps, flow_matching, 2e-3),
        ("distilled", distil_steps, distillation, 5e-4),
    ):
        if count == 0:
            continue
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=True)
        ema = Ema(model)
        run_stage(stage, work, count, {"model": model}, optimizer, loss_of, learning_rate=rate, ema=ema, cooldown=0.5)
        model.load_state_dict(ema.state_dict())
        teacher.load_state_dict(ema.state_dict())


# --- assembly ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(pipe, count, guidance=3.5, steps=30):
    """Measure the retrieval accuracy of the uncached pipeline on `count` captions of each sort, with unused seeds.

    Returns:
        The shares of pictures, 0 to 1, that show what the caption asks for: "full" captions and "open" ones.
    """
    pipe.set_progress_bar_config(disable=True)
    accuracy = {}
    for name, leave_open, seed in (("full", False, 500_000), ("open", True, 600_000)):
        captions, images = emoji.sample_captions(count, seed, held_out=True, leave_open=leave_open), []
        for begin in range(0, count, 20):
            part = captions[begin : begin + 20]
            generators = [torch.Generator().manual_seed(seed + begin + i) for i in range(len(part))]
            options = {"height": emoji.SIZE, "width": emoji.SIZE, "max_sequence_length": text.TEXT_LENGTH}
            options |= {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
            images += [np.asarray(image) for image in pipe(part, **options).images]
        accuracy[name] = emoji.prompt_accuracy(captions, images, pipe)
    return accuracy


def save_references(pipe, work: Path, folder: Path) -> None:
    """Save in the demo's folder what `emoji.prompt_accuracy` compares pictures with."""
    pictures = [emoji_pictures.on_white(p, emoji.SIZE, 0, 0) for p in emoji_pictures.load(work / "emoji")]
    references = emoji.latents_of(pipe.vae, pictures).to(torch.float8_e4m3fn).contiguous()
    save_file({"latents": references}, folder / emoji.REFERENCES)


def train(work: Path, recipe: Recipe, device) -> FluxPipeline:
    """Run all stages, resuming from their checkpoints, and return the trained pipeline."""
    clip_tokenizer, t5_tokenizer = build_tokenizers(work)
    clip, t5 = (encoder.to(device) for encoder in build_text_encoders(clip_tokenizer, t5_tokenizer))
    vae, transformer = build_vae(), build_transformer()
    pictures = emoji_pictures.load(work / "emoji")
    train_vae(work, vae, pictures, recipe.vae, device)

    def pooled(captions):
        return clip(text.token_ids(clip_tokenizer, captions).to(device)).pooler_output

    def mean(captions):
        return t5(text.token_ids(t5_tokenizer, captions).to(device)).last_hidden_state.mean(1)

    encoders = {"clip": (clip, pooled), "t5": (t5, mean)}
    text.train_text(work, encoders, [len(emoji.all_emoji())], sample_captioned, recipe.text, device)
    latents = build_latents(work, vae.eval(), pictures, recipe.latents, device)
    # Dynamic shifting as in FLUX.1-dev: mu is 1.15 at the demo's 16 tokens, as for the real model at 1024².
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift=3.0,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=4,
        max_image_seq_len=TOKENS,
    )
    pipe = FluxPipeline(scheduler, vae, clip.eval(), clip_tokenizer, t5.eval(), t5_tokenizer, transformer)
    if recipe.compile:
        transformer.compile()
    train_transformer(work, pipe, latents, recipe.transformer, recipe.distilled, device)
    return pipe
