"""`ertacache generate`: pictures and videos, with a plan, uncached, or both to compare."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ertacache.cli.calls import Calls, Method
from ertacache.cli.model_folder import METHODS
from ertacache.cli.request import Request, prompts_of
from ertacache.evaluation.metrics import mean, psnr, ssim
from ertacache.pipelines.summary import summary
from ertacache.utils import media
from ertacache.utils.errors import UserError
from ertacache.utils.files import ensure_writable


def run(
    request: Request, source, prompt, prompts_file, seed, batch_size, out: Path, compare: bool, fps: int, on_drift: str
) -> None:
    """With `compare` every method runs once before, to warm up."""
    prompts = prompts_of(prompt, prompts_file)
    if compare and source is None:
        raise UserError("--compare without --plan: give the plan that is compared with the uncached run")
    plan = request.plan(source)
    ensure_writable(out)
    calls = Calls(request, prompts, seed, batch_size, on_drift)
    names = {METHODS[plan.kind]: plan} if plan else {"baseline": None}
    if compare:
        names = {"baseline": None, **names}
        for name, followed in names.items():
            calls.run(calls.method(name, followed), calls.batches[0])
    results = generate(calls, [calls.method(name, followed) for name, followed in names.items()], out, fps)
    kind = "video" if next(iter(results.values()))[0].ndim == 5 else "picture"
    print(f"{len(prompts)} {kind}{'s' if len(prompts) > 1 else ''} in {out}/")
    if plan:
        print(summary(calls.pipe))
    if compare:
        report(calls, plan, results, out)


def generate(calls: Calls, methods: list[Method], out: Path, fps: int) -> dict[str, tuple[np.ndarray, float]]:
    """Name → pictures or videos of all prompts (kept of several methods only), and the seconds of all calls.

    The methods take turns, batch by batch. Each file is written as it is made.
    """
    found = {method.name: ([], []) for method in methods}
    for part in calls.batches:
        for method in methods:
            pictures, seconds = calls.run(method, part)
            for number, picture in enumerate(pictures, part.start):
                save(out / f"{number:03d}-{method.name}", picture, fps)
            found[method.name][0].append(pictures if len(methods) > 1 else pictures[:0])
            found[method.name][1].append(seconds)
    return {name: (np.concatenate(pictures), sum(seconds)) for name, (pictures, seconds) in found.items()}


def save(path: Path, picture: np.ndarray, fps: int) -> None:
    """A picture [H, W, 3] as .png, a video [F, H, W, 3] as .mp4."""
    if picture.ndim == 4:
        media.save_mp4(path.with_suffix(".mp4"), picture, fps)
    else:
        media.save_png(path.with_suffix(".png"), Image.fromarray(media.to_uint8(picture)))


def report(calls: Calls, plan, results: dict[str, tuple[np.ndarray, float]], out: Path) -> None:
    """comparison.png, and a line for people."""
    (reference, uncached), (pictures, planned) = results.values()
    titles = (f"uncached, {plan.steps} steps", f"ERTACache {plan.title}, {plan.nfe} computed")
    media.save_png(out / "comparison.png", media.comparison(calls.prompts, reference, pictures, titles))
    quality = mean(psnr, reference, pictures)
    if getattr(plan, "target", "reference") == "exact":
        print("this plan aims at the exact solution, PSNR and SSIM are to the uncached run", file=sys.stderr)
    words = "equal to the uncached run" if quality is None else f"PSNR {quality:.1f} dB"
    speed = f"{uncached / planned:.2f}× faster calls ({uncached:.2f} s → {planned:.2f} s)"
    print(f"{speed}, {words}, SSIM {mean(ssim, reference, pictures):.4f}; see {out}/comparison.png")
