"""Stages that the recipes of the video demos share: clips of moving shapes, VAE, latents, denoiser, accuracy."""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ertacache.demos import moving_scenes
from recipes import text
from recipes.training import Ema, run_stage, save_atomically

SIZE, FRAMES = 64, 17  # height and width in pixels; frames of a video
CHANNELS = 6  # C, channels of the latents
ATTRIBUTES = {name: list(values) for name, values in moving_scenes.ATTRIBUTES.items()}
DROPPED = 0.12  # share of captions that are dropped, to train the unconditional branch


def training_scenes() -> list[moving_scenes.MovingScene]:
    """Return the scenes of the grammar that are not held out."""
    return [s for s in moving_scenes.all_scenes() if not moving_scenes.is_held_out(s)]


def training_captions() -> list[str]:
    """Return one caption per training scene, with some attributes left open."""
    rng = np.random.default_rng(0)
    return [moving_scenes.loosen(s, rng).caption() for s in training_scenes()]


def sample_captioned(rng, count) -> tuple[list[str], torch.Tensor]:
    """Draw captions of training scenes, a fifth of the optional attributes left open, and their `answers`."""
    pool = training_scenes()
    scenes = [moving_scenes.loosen(pool[i], rng, 0.2) for i in rng.integers(len(pool), size=count)]
    return [scene.caption() for scene in scenes], text.attribute_answers(scenes, ATTRIBUTES)


def render_clips(pool, rng, count, frames) -> torch.Tensor:
    """Render random clips of random training videos in [-1, 1], [B, 3, F, H, W]."""
    clips = []
    for i in rng.integers(len(pool), size=count):
        first = rng.integers(FRAMES - frames + 1)
        clips.append(moving_scenes.render(pool[i], rng, FRAMES, SIZE, SIZE)[first : first + frames])
    return to_model(np.stack(clips))


def to_model(videos: np.ndarray) -> torch.Tensor:
    """Convert videos: uint8 [B, F, H, W, 3] → float32 in [-1, 1], [B, 3, F, H, W]."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_vae(work, vae, steps, clips, device, decode=None, groups=None):
    """Train a VAE on short clips; the VAEs are causal in time, so that short clips suffice.

    Args:
        work: Folder of the checkpoints.
        vae: The VAE.
        steps: Training steps.
        clips: (videos, frames) of the batches, taken in turn.
        device: To train on.
        decode: decode(latents, frames), for a VAE that needs the number of frames.
        groups: Parameter groups of the optimizer; None for all parameters in one.
    """
    decode = decode or (lambda z, frames: vae.decode(z).sample)
    vae.to(device)
    pool = training_scenes()
    optimizer = torch.optim.AdamW(groups or vae.parameters(), weight_decay=0.0)

    def loss_of(step):
        count, frames = clips[step % len(clips)]
        videos = render_clips(pool, np.random.default_rng([2, step]), count, frames).to(device)
        posterior = vae.encode(videos).latent_dist
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = decode(posterior.mean + posterior.std * noise, frames)
        variance = posterior.std.square()
        divergence = 0.5 * (posterior.mean.square() + variance - 1 - variance.log()).mean()  # from N(0, I)
        return F.mse_loss(decoded, videos) + 0.1 * F.l1_loss(decoded, videos) + 3e-5 * divergence

    run_stage("vae", work, steps, {"vae": vae}, optimizer, loss_of, learning_rate=2e-3, cooldown=0.5)


@torch.no_grad()
def build_latents(work, vae, count, device):
    """Encode training videos, unless the latents are stored.

    Returns:
        The captions, and the posterior means, unscaled, float32 [N, C, F', H', W'].
    """
    path = work / "latents.pt"
    if not path.exists():
        rng, pool = np.random.default_rng(3), training_scenes()
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])[:count]
        captions, latents = [], []
        for begin in tqdm(range(0, count, 8), desc="latents", mininterval=10, disable=None):
            chosen = [pool[i] for i in order[begin : begin + 8]]
            captions += [moving_scenes.loosen(s, rng).caption() for s in chosen]
            videos = to_model(np.stack([moving_scenes.render(s, rng, FRAMES, SIZE, SIZE) for s in chosen])).to(device)
            latents.append(vae.encode(videos).latent_dist.mean.half().cpu())
        save_atomically({"captions": captions, "latents": torch.cat(latents)}, path)
    data = torch.load(path, weights_only=True)
    return data["captions"], data["latents"].float()


@torch.no_grad()
def caption_table(encode, captions):
    """Encode each different caption once.

    Args:
        encode: encode(captions) returns embeddings as the pipeline computes them.
        captions: All captions.

    Returns:
        A function of caption indices [B] and a mask of dropped captions [B], bool. It returns their embeddings
        [B, L, WIDTH], those of "" where dropped.
    """
    unique = {c: i for i, c in enumerate(dict.fromkeys([*captions, ""]))}
    texts = list(unique)
    embeddings = torch.cat([encode(texts[i : i + 256]) for i in range(0, len(texts), 256)])
    rows = torch.tensor([unique[c] for c in captions])
    return lambda pick, dropped: embeddings[torch.where(dropped, unique[""], rows[pick])]


def train_denoiser(work, model, latents, example, predict, steps, device, batch, learning_rate=2e-3):
    """Train a transformer on noisy latents with caption dropout; it ends with the moving average of its weights.

    Args:
        work: Folder of the checkpoints.
        model: The transformer.
        latents: Clean latents [N, …].
        example: example(clean, noise, generator) returns noisy latents, the model's times [B] and the target.
        predict: predict(noisy, times, pick, dropped) returns the model's output in the target's layout; `pick` [B]
            are the indices of the latents.
        steps: Training steps.
        device: To train on.
        batch: Videos per step.
        learning_rate: The constant rate of `run_stage`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    ema = Ema(model)

    def loss_of(step):
        generator = torch.Generator().manual_seed(10_000_000 + step)
        pick = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < DROPPED
        clean = latents[pick]
        noisy, times, target = example(clean, torch.randn(clean.shape, generator=generator), generator)
        output = predict(noisy.to(device), times.to(device), pick, dropped)
        return F.mse_loss(output, target.to(device))

    run_stage("transformer", work, steps, {"model": model}, optimizer, loss_of, learning_rate=learning_rate, ema=ema)
    model.load_state_dict(ema.state_dict())


def train_stages(work, recipe, pipe, encode, clips, normalise, example, predict_with, device, **vae_options):
    """Run the stages that the three video recipes share: VAE, text encoder, latents, transformer.

    Args:
        work: Folder of the checkpoints.
        recipe: Steps of each stage.
        pipe: The pipeline.
        encode: encode(captions) returns embeddings [M, L, WIDTH].
        clips: Of `train_vae`.
        normalise: normalise(latents) returns the latents as the transformer sees them, and sets the VAE's config.
        example: Of `train_denoiser`.
        predict_with: predict_with(captions) returns `predict` of `train_denoiser`.
        device: To train on.
        **vae_options: Further arguments of `train_vae`.
    """
    train_vae(work, pipe.vae, recipe.vae, clips, device, **vae_options)
    encoders = {"t5": (pipe.text_encoder, lambda captions: encode(captions).mean(1))}
    text.train_text(work, encoders, [len(v) + 1 for v in ATTRIBUTES.values()], sample_captioned, recipe.text, device)
    captions, latents = build_latents(work, pipe.vae.eval(), recipe.latents, device)
    latents = normalise(latents)
    pipe.text_encoder.eval()
    with torch.no_grad():
        predict = predict_with(captions)
    train_denoiser(work, pipe.transformer, latents, example, predict, recipe.transformer, device, recipe.batch)


@torch.no_grad()
def measure_accuracy(pipe, count, seed=100, batch=10, **options):
    """Measure the prompt accuracy of the uncached pipeline on held-out captions.

    Args:
        pipe: The pipeline.
        count: Number of captions.
        seed: Of the choice of captions.
        batch: Prompts per call.
        **options: Further arguments of the pipeline's call.

    Returns:
        The shares of videos, 0 to 1, in which all attributes ("all"), and each one, agree with the caption.
    """
    held_out = moving_scenes.sample_scenes(count, seed=seed, held_out=True)
    pipe.set_progress_bar_config(disable=True)
    videos = []
    for begin in range(0, count, batch):
        captions = [s.caption() for s in held_out[begin : begin + batch]]
        generators = [torch.Generator().manual_seed(begin + i) for i in range(len(captions))]
        output = pipe(captions, num_frames=FRAMES, height=SIZE, width=SIZE, generator=generators, **options)
        videos += [np.clip(np.rint(v * 255), 0, 255).astype(np.uint8) for v in output.frames]
    verdicts = [moving_scenes.agreement(s, v) for s, v in zip(held_out, videos, strict=True)]
    shares = {name: float(np.mean([v[name] for v in verdicts])) for name in ATTRIBUTES}
    return {"all": float(np.mean([all(v.values()) for v in verdicts])), **shares}
