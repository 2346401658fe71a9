"""Distances between uncached and cached pictures or videos: thin faces over scikit-image and lpips, on floats."""

import sys

import numpy as np

METRICS = ("psnr", "ssim", "lpips", "temporal_psnr")


def psnr(reference: np.ndarray, picture: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of float pictures [H, W, 3] in [0, 1]; ∞ when they are equal."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(reference, picture):
        return float("inf")
    return float(peak_signal_noise_ratio(reference, picture, data_range=1.0))


def latent_psnr(references: np.ndarray, results: np.ndarray) -> float | None:
    """Mean PSNR in dB of latents [N, …], with each reference's largest minus least value as the data range.

    None when a pair is equal.
    """
    axes = tuple(range(1, references.ndim))
    error = np.square(np.subtract(references, results, dtype=np.float64)).mean(axes)
    ranges = references.max(axes).astype(np.float64) - references.min(axes)
    return None if np.any(error == 0) else float(np.mean(10 * np.log10(ranges**2 / error)))


def ssim(reference: np.ndarray, picture: np.ndarray) -> float:
    """Structural similarity in [−1, 1] of float pictures [H, W, 3] in [0, 1], with the window of Wang et al. 2004."""
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(reference, picture, channel_axis=-1, data_range=1.0, **options))


class Lpips:
    """LPIPS (AlexNet), when the `eval` extra and its weights are there; otherwise None, with one line that says why."""

    def __init__(self):
        self.network = None
        try:
            import lpips

            self.network = lpips.LPIPS(net="alex", verbose=False)
        except Exception as error:  # no package, no torchvision, or no weights and no network to fetch them
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            print(f"LPIPS is not computed ({reason}): pip install 'ertacache[eval]'", file=sys.stderr)

    def __call__(self, reference: np.ndarray, picture: np.ndarray) -> float | None:
        import torch

        if self.network is None:
            return None
        pair = (torch.from_numpy(p).permute(2, 0, 1)[None].float() * 2 - 1 for p in (reference, picture))
        with torch.no_grad():
            return float(self.network(*pair))


def temporal_psnr(reference: np.ndarray, video: np.ndarray) -> float:
    """Temporal consistency: mean PSNR in dB between the consecutive-frame differences of two videos [F, H, W, 3].

    A difference f_{j+1} − f_j lies in [−1, 1]; both are halved, so that the data range is 1 as for pictures.
    """
    pairs = zip(np.diff(reference, axis=0) / 2, np.diff(video, axis=0) / 2, strict=True)
    return float(np.mean([psnr(*pair) for pair in pairs]))


def quality(references: np.ndarray, results: np.ndarray, lpips: Lpips) -> dict[str, float | None]:
    """Means over pictures [N, H, W, 3], or over the frames of videos [N, F, H, W, 3] and then over the videos.

    A mean PSNR is None when a pair is equal, its PSNR has no number; temporal_psnr is None for pictures.
    """
    videos = references.ndim == 5
    frames = (x.reshape(-1, *x.shape[-3:]) for x in (references, results))
    pairs = list(zip(*frames, strict=True))
    values = {
        "psnr": [psnr(*pair) for pair in pairs],
        "ssim": [ssim(*pair) for pair in pairs],
        "lpips": [lpips(*pair) for pair in pairs],
        "temporal_psnr": [temporal_psnr(*pair) for pair in zip(references, results, strict=True)] if videos else [None],
    }
    return {name: None if None in v or not np.all(np.isfinite(v)) else float(np.mean(v)) for name, v in values.items()}
