"""`ertacache generate`: images and videos, with a plan, uncached, or both to compare."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ertacache.cli.calls import Call, Calls
from ertacache.cli.request import Request
from ertacache.evaluation.comparison import compare
from ertacache.pipelines.summary import summary
from ertacache.utils import media
from ertacache.utils.checks import check_seed
from ertacache.utils.errors import UserError
from ertacache.utils.files import ensure_writable


def run(request: Request, source: str | None, seed: int, out: Path, comparing: bool, fps: int, on_drift: str) -> None:
    """Generate; to compare, both methods run once before, to warm up."""
    check_seed(seed)
    if comparing and source is None:
        raise UserError("--compare without --plan: give the plan that is compared with the uncached run")
    plan = request.plan(source)
    ensure_writable(out)
    calls = Calls(request, seed, on_drift)
    methods = {"baseline": None} if plan is None else {plan.method: plan}
    if comparing:
        methods = {"baseline": None, **methods}
        for name, followed in methods.items():
            calls.run(calls.call(name, followed), calls.batches[0])
    results = generate(calls, [calls.call(name, followed) for name, followed in methods.items()], out, fps)
    count, kind = len(request.prompts), "video" if next(iter(results.values()))[0].ndim == 5 else "image"
    print(f"{count} {kind}{'s' if count > 1 else ''} in {out}/")
    if plan:
        print(summary(calls.pipe))
    if comparing:
        (uncached, before), (cached, after) = results.values()
        comparison = compare(calls.prompts, uncached, cached, plan)
        media.save_png(out / "comparison.png", comparison.sheet)
        speed = f"{before / after:.2f}× faster calls ({before:.2f} s → {after:.2f} s)"
        print(f"{speed}, {comparison}; see {out}/comparison.png")


def generate(calls: Calls, methods: Sequence[Call], out: Path, fps: int) -> dict[str, tuple[np.ndarray, float]]:
    """Make all calls, the methods in turn, batch by batch; each file is written as it is made.

    Returns:
        Name → images or videos of all prompts (kept of several methods only), and the seconds of all calls.
    """
    results: dict[str, tuple[list, list]] = {method.name: ([], []) for method in methods}
    for part in calls.batches:
        for method in methods:
            images, seconds = calls.run(method, part)
            media.save_results(out, images, method.name, fps, first=part.start)
            results[method.name][0].append(images if len(methods) > 1 else images[:0])
            results[method.name][1].append(seconds)
    return {name: (np.concatenate(images), sum(seconds)) for name, (images, seconds) in results.items()}
