"""Budget plans beside DeepCache at equal FLOPs, on a small random UNet in Stable Diffusion's pipeline.

    .venv/bin/python -m pip install 'ertacache[peers]'
    .venv/bin/python scripts/bench/unets.py --count 16

DeepCache (arXiv 2312.00858; its package, branch 0) computes the UNet in every k-th step and its outermost layers alone
in the others. A plan gets as many calls as cost the same. The weights are random, with outputs of the size of the
noise. Such a network changes little from step to step: the figures compare methods and say nothing of real models.

PSNR of the final latents to the uncached run's, relative to their range, in dB: mean / 10th percentile / worst. Times
are medians of interleaved runs, over the uncached run's.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts

import contextlib
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import ertacache
from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser, check_counts, parse_list
from ertacache.demos.model_folder import check_steps
from ertacache.evaluation.table import facts
from ertacache.utils.errors import run_program
from ertacache.utils.tables import markdown

SIDE, WIDTH = 16, 32  # of the latents, of the text states
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SEED = 1000  # of the measured samples; calibration has those from 0 on


def pipeline() -> StableDiffusionPipeline:
    """Return the pipeline, whose text states are random and belong to each prompt."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(32, 64, 64, 64),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    )
    unet.eval().requires_grad_(False)
    unet.conv_out.weight.mul_(1 / unet(torch.randn(1, 4, SIDE, SIDE), 500, torch.randn(1, 8, WIDTH))[0].std())
    scheduler = DPMSolverMultistepScheduler(**TABLE, use_karras_sigmas=True)
    parts = {"vae": AutoencoderKL(), "unet": unet, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**parts, **rest)

    def states(prompts):
        seeds = [zlib.crc32(text.encode()) for text in prompts]
        return torch.stack([torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def encode_prompt(prompt, *_, **__):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return states(prompts), states([""] * len(prompts))

    pipe.encode_prompt = encode_prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Runs:
    """Runs of the pipeline over the measured prompts.

    Args:
        pipe: The pipeline.
        steps: T.
        count: Number of samples.
    """

    def __init__(self, pipe, steps: int, count: int):
        self.pipe, self.steps, self.prompts = pipe, steps, [f"text {i}" for i in range(count)]
        self.references = self.latents()

    def latents(self, steps: int | None = None) -> torch.Tensor:
        """Return the final latents [B, C, H, W] with whatever is on the pipeline."""
        generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(self.prompts))]
        call = {"num_inference_steps": steps or self.steps, "generator": generators, "output_type": "latent"}
        return self.pipe(self.prompts, **call).images

    def psnr(self, found: torch.Tensor) -> str:
        """Return mean / 10th percentile / worst, dB."""
        errors = (found - self.references).double().square().flatten(1).mean(1)
        size = (self.references.max() - self.references.min()).item()
        values = 10 * torch.log10(size**2 / errors).numpy()
        return f"{values.mean():.1f} / {np.percentile(values, 10):.1f} / {values.min():.1f}"

    def flops(self) -> int:
        """Return the operations of a run."""
        with FlopCounterMode(display=False) as counter:
            self.latents()
        return counter.get_total_flops()


@contextlib.contextmanager
def deepcache(pipe, interval: int):
    """Have the pipeline compute the whole UNet in every so many steps."""
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise UserError("DeepCache is missing: pip install 'ertacache[peers]'") from error
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextlib.contextmanager
def planned(pipe, plan):
    """Have the pipeline follow a plan."""
    ertacache.enable(pipe, plan, on_drift="ignore")
    try:
        yield
    finally:
        ertacache.disable(pipe)


def seconds(run: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="T")
    parser.add_argument("--intervals", default="2,3,5", metavar="N,N,…", help="of DeepCache")
    parser.add_argument("--count", type=int, default=16, help="samples")
    parser.add_argument("--repeats", type=int, default=5, help="of each run for its time")
    options = parser.parse_args()
    check_counts(options, "count", "repeats")
    check_steps(options.steps)
    options.intervals = parse_list(options.intervals, "--intervals", "2,3", int)
    torch.set_num_threads(1)
    pipe = pipeline()
    runs, rows = Runs(pipe, options.steps, options.count), []
    whole = runs.flops()
    shares = {}
    for interval in options.intervals:
        with deepcache(pipe, interval):
            shares[interval] = runs.flops() / whole
    budgets = {interval: max(2, round(share * options.steps)) for interval, share in shares.items()}
    prompts = [f"calibration text {i}" for i in range(8)]
    with tempfile.TemporaryDirectory() as work:
        speedups = [options.steps / budget for budget in budgets.values()]
        call = {"num_inference_steps": options.steps, "batch_size": 8, "work": work}
        plans = ertacache.calibrate(pipe, prompts, speedups, **call)
    for interval, plan in zip(budgets, plans.values(), strict=True):
        methods = {
            f"DeepCache, interval {interval}": (lambda k=interval: deepcache(pipe, k), None),
            f"plan, {plan.nfe} of {options.steps} calls": (lambda p=plan: planned(pipe, p), None),
            f"{plan.nfe} steps": (contextlib.nullcontext, plan.nfe),
        }
        times = {name: [] for name in ("uncached", *methods)}
        for _ in range(options.repeats):
            times["uncached"].append(seconds(runs.latents))
            for name, (context, steps) in methods.items():
                with context():
                    times[name].append(seconds(lambda steps=steps: runs.latents(steps)))
        for name, (context, steps) in methods.items():
            with context():
                quality = runs.psnr(runs.latents(steps))
            share = shares[interval] if "DeepCache" in name else plan.nfe / options.steps
            ratio = statistics.median(times["uncached"]) / statistics.median(times[name])
            rows.append([name, f"{100 * share:.0f} %", f"{ratio:.2f}×", quality])
    print(markdown(["method", "FLOPs", "faster", "PSNR"], rows))
    print(f"\n{facts(f'{options.count} samples, T = {options.steps}')}")


if __name__ == "__main__":
    run_program(main)
