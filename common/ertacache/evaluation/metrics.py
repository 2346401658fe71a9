"""Distances between uncached and cached images or videos: thin wrappers around scikit-image and lpips, on floats."""

from pathlib import Path

import numpy as np

from ertacache.plans.names import model_source
from ertacache.utils import media
from ertacache.utils.errors import UserError, reason_of

PSNRS = ("psnr", "psnr_p10", "psnr_worst", "below_30db", "psnr_8bit")
METRICS = (*PSNRS, "ssim", "lpips", "temporal_psnr")
FETCH = """python -c "import lpips; lpips.LPIPS(net='alex')\""""  # the weights, 233 MiB
OTHER_IMAGE = 30.0  # dB, below which a result is often another image


def psnr(reference: np.ndarray, image: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of float images [H, W, 3] in [0, 1]; ∞ when they are equal."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(reference, image):
        return float("inf")
    return float(peak_signal_noise_ratio(reference, image, data_range=1.0))


def latent_psnrs(references: np.ndarray, results: np.ndarray) -> np.ndarray:
    """Return the PSNR in dB of latents [N, …], [N], with each reference's largest minus least value as data range.

    It is ∞ where a pair is equal.
    """
    axes = tuple(range(1, references.ndim))
    error = np.square(np.subtract(references, results, dtype=np.float64)).mean(axes)
    ranges = references.max(axes).astype(np.float64) - references.min(axes)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(ranges**2 / error)


def ssim(reference: np.ndarray, image: np.ndarray) -> float:
    """Return the structural similarity in [−1, 1] of float images [H, W, 3] in [0, 1] (Wang et al. 2004)."""
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(reference, image, channel_axis=-1, data_range=1.0, **options))


class Lpips:
    """LPIPS (AlexNet), where the `eval` extra and AlexNet's weights are there, which are not fetched; else None.

    Attributes:
        problem: Why it is not computed, in one line; None where it is.
    """

    def __init__(self):
        self.network = self.problem = None
        try:
            import lpips
            import torch
            from torchvision.models import AlexNet_Weights

            weights = Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.IMAGENET1K_V1.url).name)
            if weights.is_file():
                self.network = lpips.LPIPS(net="alex", verbose=False)
            else:
                self.problem = f"LPIPS is not computed (no file {weights}): fetch it, {FETCH}"
        except Exception as error:  # no package, no torchvision, or damaged weights
            remedy = "sh scripts/setup.sh eval, or pip install 'ertacache[eval]'"
            self.problem = f"LPIPS is not computed ({reason_of(error)}): {remedy}"

    def __call__(self, reference: np.ndarray, image: np.ndarray) -> float | None:
        import torch

        if self.network is None:
            return None
        pair = (torch.from_numpy(p).permute(2, 0, 1)[None].float() * 2 - 1 for p in (reference, image))
        with torch.no_grad():
            return float(self.network(*pair))


def temporal_psnr(reference: np.ndarray, video: np.ndarray) -> float:
    """Return the mean PSNR in dB between the consecutive-frame differences of two videos [F, H, W, 3].

    A difference f_{j+1} − f_j lies in [−1, 1]; both are halved, so that the data range is 1 as for images.
    """
    pairs = zip(np.diff(reference, axis=0) / 2, np.diff(video, axis=0) / 2, strict=True)
    return float(np.mean([psnr(*pair) for pair in pairs]))


class Clip:
    """CLIP (Radford et al. 2021) by transformers.

    Args:
        model: A Hub id or directory; None: every measure is None.

    Raises:
        UserError: The model cannot be loaded.
    """

    def __init__(self, model: str | None):
        self.model = None
        if model is None:
            return
        source = model_source(model)
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.model, self.processor = CLIPModel.from_pretrained(source), CLIPProcessor.from_pretrained(source)
        except Exception as error:  # hub, json, safetensors and torch all raise their own types here
            raise UserError(f"--clip {model} cannot be loaded ({reason_of(error)}): check the id") from error

    def similarity(self, references: np.ndarray, results: np.ndarray) -> float | None:
        """Return the mean cosine between embeddings of images (or frames) and of their references (paper, Table 2)."""
        if self.model is None:
            return None
        pairs = (self.embedded(images=frames_of(x)) for x in (references, results))
        return float(np.mean(np.sum(np.multiply(*pairs), axis=-1)))

    def score(self, prompts: list[str], results: np.ndarray) -> float | None:
        """Return the CLIP score (Hessel et al. 2021), 100 · max(0, cosine) of a prompt and its image or frames."""
        if self.model is None:
            return None
        images = self.embedded(images=frames_of(results)).reshape(len(prompts), -1, self.model.config.projection_dim)
        texts = self.embedded(text=list(prompts))[:, None]
        return float(100 * np.mean(np.maximum(0, np.sum(images * texts, axis=-1))))

    def embedded(self, images=None, text=None) -> np.ndarray:
        """Return unit vectors [N, D] of images float [N, H, W, 3] in [0, 1], or of texts, cut at CLIP's length."""
        import torch

        with torch.no_grad():
            if text is not None:
                inputs = self.processor(text=text, return_tensors="pt", padding=True, truncation=True)
                features = self.model.get_text_features(**inputs)
            else:
                rounded = list(np.rint(images * 255).clip(0, 255).astype(np.uint8))
                features = self.model.get_image_features(**self.processor(images=rounded, return_tensors="pt"))
        features = getattr(features, "pooler_output", features).numpy()
        return features / np.linalg.norm(features, axis=-1, keepdims=True)


def frames_of(results: np.ndarray) -> np.ndarray:
    """Return images [N, H, W, 3] unchanged, and videos [N, F, H, W, 3] as their frames [N·F, H, W, 3]."""
    return results.reshape(-1, *results.shape[-3:])


def each(metric, references: np.ndarray, results: np.ndarray) -> np.ndarray:
    """Return a metric of each image, or of each video as the mean over its frames, [N]."""
    pairs = zip(frames_of(references), frames_of(results), strict=True)
    return np.array([metric(*pair) for pair in pairs]).reshape(len(references), -1).mean(1)


def mean(metric, references: np.ndarray, results: np.ndarray) -> float | None:
    """Return the mean of a metric over images or videos; None when a value is not finite.

    The PSNR of an equal pair has none.
    """
    return finite(np.mean(each(metric, references, results)))


def finite(value) -> float | None:
    """Return a number as a float, or None where it is not finite."""
    return float(value) if np.isfinite(value) else None


def share_below(psnrs: np.ndarray) -> float:
    """Return the share of PSNRs below 30 dB."""
    return float(np.mean(psnrs < OTHER_IMAGE))


def mean_and_tail(psnrs: np.ndarray) -> dict[str, float | None]:
    """Return psnr, psnr_p10, psnr_worst and below_30db of the PSNRs of single images or videos, [N]."""
    with np.errstate(invalid="ignore"):  # between two that are ∞
        values = {"psnr": np.mean(psnrs), "psnr_p10": np.quantile(psnrs, 0.1), "psnr_worst": np.min(psnrs)}
    return {name: finite(value) for name, value in values.items()} | {"below_30db": share_below(psnrs)}


def quality(references: np.ndarray, results: np.ndarray, lpips: Lpips | None = None) -> dict[str, float | None]:
    """Measure the METRICS: means over images or videos, and the tail of their PSNR.

    Args:
        references: Images [N, H, W, 3], or videos [N, F, H, W, 3], in [0, 1].
        results: Of the same shape.
        lpips: Measures LPIPS; without it LPIPS is None.

    Returns:
        A value for each name in METRICS: psnr, ssim, lpips and temporal_psnr (None for images) are means; psnr_p10,
        psnr_worst and below_30db are the 10th percentile, the least, and the share of them below 30 dB; psnr_8bit is
        the mean of what is stored, rounded to 8 bits.
    """
    values: dict[str, float | None] = {**mean_and_tail(each(psnr, references, results))}
    values["psnr_8bit"] = mean(psnr, *(media.to_uint8(images) / 255 for images in (references, results)))
    values["ssim"] = mean(ssim, references, results)
    values["lpips"] = mean(lpips, references, results) if lpips and lpips.network is not None else None
    videos = references.ndim == 5
    temporal = [temporal_psnr(*pair) for pair in zip(references, results, strict=True)] if videos else []
    values["temporal_psnr"] = float(np.mean(temporal)) if videos and np.all(np.isfinite(temporal)) else None
    return values
