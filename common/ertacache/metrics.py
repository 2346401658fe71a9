"""Distances between an uncached and a cached picture: thin faces over scikit-image and lpips, on float pictures."""

import sys

import numpy as np


def psnr(reference: np.ndarray, picture: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of float pictures [H, W, 3] in [0, 1]; ∞ when they are equal."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(reference, picture):
        return float("inf")
    return float(peak_signal_noise_ratio(reference, picture, data_range=1.0))


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


def quality(references: np.ndarray, pictures: np.ndarray, lpips: Lpips) -> dict[str, float | None]:
    """Means over pictures [N, H, W, 3]. A mean PSNR is None when a pair is equal, its PSNR has no number."""
    pairs = list(zip(references, pictures, strict=True))
    values = {
        "psnr": [psnr(*pair) for pair in pairs],
        "ssim": [ssim(*pair) for pair in pairs],
        "lpips": [lpips(*pair) for pair in pairs],
    }
    return {name: None if None in v or not np.all(np.isfinite(v)) else float(np.mean(v)) for name, v in values.items()}
