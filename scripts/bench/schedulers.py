"""Budget plans with schedulers of UNet pipelines, beside fewer steps of the same scheduler, on the closed-form problem.

    .venv/bin/python scripts/bench/schedulers.py --count 64

The denoiser is exact (ertacache/demos/closed_form.py) and predicts the noise, as Stable Diffusion does, or v; the noise
levels are Stable Diffusion's. Plans are calibrated on 16 captions, half of them open, and measured on others. PSNR of
the final latents to the uncached run's, range 2, in dB: mean / 10th percentile.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts

import tempfile

import diffusers
import numpy as np
import torch

import ertacache
from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser, check_counts, parse_list
from ertacache.demos import closed_form
from ertacache.demos.model_folder import check_number, check_steps
from ertacache.evaluation.table import facts
from ertacache.plans.names import budget_of, check_speedups
from ertacache.utils.errors import run_program
from ertacache.utils.tables import markdown

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "DDIM, v-prediction": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
SEED = 1000  # of the measured samples; calibration has those from 0 on


def captions(count: int, held_out: bool) -> list[str]:
    """Return captions, half of them open."""
    halves = [closed_form.sample_captions(count // 2, 0, held_out, leave_open) for leave_open in (False, True)]
    return [text for pair in zip(*halves, strict=True) for text in pair]


def psnr(results: torch.Tensor, references: torch.Tensor) -> str:
    """Return mean / 10th percentile / worst of the samples, dB."""
    values = 10 * torch.log10(4 / (results - references).double().square().mean(1)).numpy()
    return f"{values.mean():.1f} / {np.percentile(values, 10):.1f} / {values.min():.1f}"


def row(name: str, options) -> list[str]:
    """Return the table's row of a scheduler."""
    kind, changes = SCHEDULERS[name]
    denoiser = closed_form.denoiser_of_width(options.b)
    pipe = closed_form.ClosedFormPipeline(denoiser, getattr(diffusers, kind)(**TABLE, **changes))
    prompts = captions(options.count, held_out=True)

    def run(steps: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(prompts))]
        call = {"num_inference_steps": steps, "guidance_scale": options.guidance, "generator": generators}
        return pipe(prompts, **call)[0]

    references, cells = run(options.steps), []
    with tempfile.TemporaryDirectory() as work:
        call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "batch_size": 16}
        plans = ertacache.calibrate(pipe, captions(16, held_out=False), options.speedups, work=work, **call)
    for speedup, plan in plans.items():
        ertacache.enable(pipe, plan, on_drift="ignore")
        found = run(options.steps)
        ertacache.disable(pipe)
        cells += [psnr(found, references), psnr(run(round(options.steps / speedup)), references)]
    return [name, *cells]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="T")
    parser.add_argument("--guidance", type=float, default=3.5, help="g")
    parser.add_argument("--b", type=float, default=0.1, help="width of the points: the smaller, the harder")
    parser.add_argument("--speedups", default="2,3,5", metavar="S,S,…", help="of the plans")
    parser.add_argument("--count", type=int, default=64, help="samples")
    options = parser.parse_args()
    check_counts(options, "count", least=2)
    check_number("guidance", options.guidance, minimum=0)
    if not 0 < options.b < float("inf"):
        raise UserError(f"--b {options.b}: give a finite number above 0")
    check_steps(options.steps)
    options.speedups = parse_list(options.speedups, "--speedups", "2,3")
    check_speedups(options.speedups)
    for speedup in options.speedups:
        budget_of(options.steps, speedup, "--speedups")
    torch.set_num_threads(1)
    head = ["scheduler"]
    for speedup in options.speedups:
        head += [f"plan, {speedup:g}×", "fewer steps"]
    print(markdown(head, [row(name, options) for name in SCHEDULERS]))
    print(f"\n{facts(f'{options.count} samples, g = {options.guidance:g}, b = {options.b:g}')}")


if __name__ == "__main__":
    run_program(main)
