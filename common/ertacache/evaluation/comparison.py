"""Comparison of an uncached and a cached run: their distance, an image of both, and a sentence."""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ertacache.evaluation.metrics import Lpips, quality
from ertacache.plans import Plan
from ertacache.utils import media

BRIGHT = 0.5  # of full scale: how bright the largest differences are shown
LARGEST_GAIN = 1024
MARGIN = 0.02  # above T/N, within which a speed-up is a matter of rounding
SCATTER = 0.2  # between the fastest and the slowest repeat, beyond which a speed-up is doubtful


@dataclass(frozen=True)
class Comparison:
    """A cached run against the uncached one with the same prompts and seeds.

    Attributes:
        quality: Means over images, or over frames, by the names of METRICS; a PSNR is None when a pair is equal.
        sheet: Uncached, cached and amplified difference, one line per prompt.
        count: Number of prompts.
    """

    quality: dict[str, float | None]
    sheet: Image.Image
    count: int

    def __str__(self) -> str:
        psnr, worst, files = (self.quality[name] for name in ("psnr", "psnr_worst", "psnr_8bit"))
        if psnr is None:
            return f"equal to the uncached run, SSIM {self.quality['ssim']:.4f}"
        more = [f"worst {worst:.1f}"] if worst is not None and self.count > 1 else []
        more += [f"in 8 bits {files:.1f}"] if files is not None else []
        more = f" ({', '.join(more)})" if more else ""
        return f"PSNR {psnr:.1f} dB{more}, SSIM {self.quality['ssim']:.4f}"


def compare(
    prompts: Sequence[str], uncached: np.ndarray, cached: np.ndarray, plan: Plan, lpips: Lpips | None = None
) -> Comparison:
    """Compare two runs over the same prompts and seeds.

    Args:
        prompts: N texts.
        uncached, cached: Images float [N, H, W, 3], or videos [N, F, H, W, 3], in [0, 1].
        plan: That the cached run followed.
        lpips: Measures LPIPS too.

    Returns:
        Distances and the sheet. For a plan with the exact target a line on stderr says what the distances are to.
    """
    if plan.target == "exact":
        print("this plan aims at the exact solution, PSNR and SSIM are to the uncached run", file=sys.stderr)
    gain = difference_gain(uncached, cached)
    columns = {
        f"uncached, {plan.steps} steps": uncached,
        f"ERTACache {plan.title}, {plan.nfe} computed": cached,
        f"difference x{gain}": media.difference(cached, uncached, gain),
    }
    return Comparison(quality(uncached, cached, lpips), media.sheet(list(prompts), columns), len(prompts))


def doubt(times: Sequence[Sequence[float]], calls_ratio: float) -> str:
    """Return why a measured speed-up is to be doubted, for the line that says it; "" where it is not.

    Args:
        times: Seconds of the repeats of each method.
        calls_ratio: T/N, beyond which no plan is faster.
    """
    medians = [statistics.median(repeats) for repeats in times]
    scatter = max(max(repeats) / min(repeats) for repeats in times)
    reasons = [f"repeats differ by {100 * (scatter - 1):.0f} %"] if scatter > 1 + SCATTER else []
    measured = medians[0] / medians[1]
    if measured > calls_ratio * (1 + MARGIN):
        reasons.append(f"it cannot be above {calls_ratio:.2f}×")
    elif measured < 1 < calls_ratio:
        reasons.append("slower than without a plan")
    return f"; {', '.join(reasons)}: measure again on an idle machine" if reasons else ""


def difference_gain(uncached: np.ndarray, cached: np.ndarray) -> int:
    """Return the power of two, from 1 to 1024, that makes the largest differences (99.9th percentile) half bright."""
    largest = float(np.quantile(np.abs(cached - uncached), 0.999))
    if largest == 0:
        return 1
    return 2 ** int(np.clip(round(math.log2(BRIGHT / largest)), 0, round(math.log2(LARGEST_GAIN))))
