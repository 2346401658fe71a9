"""The command line of a model folder's `generate.py`: what runs, and what is written."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ertacache.calibration.effort import effort_of
from ertacache.calibration.from_folder import CalibrationOptions, PlanRequest, find_plan
from ertacache.cli.arguments import ArgumentParser, check_counts, prompts_of
from ertacache.demos.model_folder import Sampler, draws_captions, makes_videos, settings_parameters
from ertacache.evaluation.comparison import compare, doubt
from ertacache.evaluation.metrics import METRICS, Lpips
from ertacache.numerics.finite import FiniteCheck
from ertacache.plans import Plan
from ertacache.plans.names import TARGETS
from ertacache.plans.requirements import Requirements
from ertacache.plans.schema import check_levels
from ertacache.plans.threshold import SITES
from ertacache.utils import media
from ertacache.utils.checks import LARGEST_FPS, check_seed
from ertacache.utils.devices import default_device, dtype_for, synchronize
from ertacache.utils.errors import UserError
from ertacache.utils.files import relative, writable
from ertacache.utils.progress import Progress
from ertacache.utils.provenance import library_versions, machine
from ertacache.utils.words import counted

SETTINGS = {  # settings that a model folder may offer, with the type and help of their flag
    "steps": (int, "T, steps of the uncached run"),
    "guidance": (float, "guidance scale"),
    "height": (int, "in pixels (default: the model's own)"),
    "width": (int, "in pixels (default: the model's own)"),
    "frames": (int, "frames of the video (default: the model's own)"),
    "negative_prompt": (str, "prompt of the unconditional branch (default: the model's own)"),
    "aesthetic_score": (float, "aesthetic score appended to the prompt, 4 to 7"),
}
OF_A_RUN = ("threshold", "speedup", "budget", "plan", "baseline", "compare", "repeats", "out")  # flags scripts lack
EXAMPLE = 'example: generate.py --prompt "a rocket" --speedup 2 --compare'


def parse_arguments(
    sampler: Sampler, arguments: Sequence[str] | None = None, effort: str = "quick", without: Collection[str] = ()
) -> argparse.Namespace:
    """Parse the flags of a model folder; its settings are flags too. Other scripts add theirs to these.

    Args:
        sampler: The model folder.
        arguments: Of the command line; None for those of the process.
        effort: Default of --effort.
        without: Names of flags that mean nothing to a script, so that it does not know them.
    """
    parser = ArgumentParser(description=sampler.__doc__.splitlines()[0], epilog=EXAMPLE)

    def add(flag: str, to: argparse._ActionsContainer = parser, **options) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        if name in without:
            parser.set_defaults(**{name: options.get("default")})
        else:
            to.add_argument(flag, **options)

    add("--model", default="demo", help='"demo", a local directory, or a hub id (default: demo)')
    add("--prompt", action="append", help="a prompt; may be given several times")
    add(
        "--prompts",
        metavar="FILE",
        help="a text file with one prompt a line (default: prompts/demo.txt, or examples.txt)",
    )
    add("--seed", type=int, default=1000, help="seed of the first prompt; the next one has seed + 1, and so on")
    for name, default in settings_parameters(sampler).items():
        kind, text = SETTINGS[name]
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    if makes_videos(sampler):
        add("--fps", type=int, default=8, help="frames per second of the .mp4 files")
    choice = parser.add_mutually_exclusive_group()
    text = "cache by the paper's plan for this λ: the higher, the more steps are skipped; calibrated if new"
    add("--threshold", choice, type=float, metavar="λ", help=text)
    add("--speedup", choice, type=float, metavar="S", help="compute exactly T/S steps, where they matter most")
    add("--budget", choice, type=int, metavar="N", help="compute exactly N steps, where they matter most")
    add("--plan", choice, type=Path, metavar="FILE", help="cache by this plan file")
    add("--baseline", choice, action="store_true", help="the uncached run only")
    add("--site", choices=SITES, help="where a threshold plan caches the residual (default: output)")
    add("--compare", action="store_true", help="also run uncached, and compare")
    add("--repeats", type=int, default=1, help="timed runs of each; the median is reported")
    add("--batch-size", type=int, default=4, help="prompts per call")
    learned = "prompts for a plan that is not stored yet"
    add(
        "--calibration-prompts",
        type=Path,
        metavar="FILE",
        help=f"{learned} (default: prompts/calibration-demo.txt, or calibration.txt)",
    )
    costs = "what calibrating a plan may cost, where none is stored: quick, normal, thorough or a number of minutes"
    add("--effort", help=f"{costs} (default: {effort})")
    aims = "what a budget plan imitates: the uncached run (reference), or the solution that it approximates (exact)"
    add("--target", choices=tuple(TARGETS), help=f"{aims} (default: reference)")
    add("--out", type=Path, default=Path("sample"), help="output folder (default: sample)")
    add("--device", help="cpu, cuda, cuda:N or mps (default: a GPU when there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on the CPU")
    add("--offload", choices=("none", "model", "sequential"), default="none", help="save GPU memory, slower")
    args = parser.parse_args(arguments)
    check_counts(args, "batch_size", "repeats")
    check_seed(args.seed)
    for flag, value in (("--effort", args.effort), ("--calibration-prompts", args.calibration_prompts)):
        if value is not None and (args.plan or args.baseline):
            remedy = "leave it out, or give --threshold or --speedup"
            raise UserError(f"{flag} {value}: nothing is calibrated, {remedy}")
    args.effort = effort if args.effort is None else args.effort
    effort_of(args.effort, "--effort")
    if "fps" in args:
        check_counts(args, "fps", most=LARGEST_FPS)
    return args


def plan_request(args: argparse.Namespace) -> PlanRequest | None:
    """Return the plan that the flags ask for; None for the uncached run."""
    ways = {"threshold": args.threshold, "speedup": args.speedup, "budget": args.budget, "file": args.plan}
    if all(value is None for value in ways.values()) and not args.baseline:
        raise UserError("nothing to do: give --threshold λ, --speedup S, --budget N, --plan FILE or --baseline")
    if args.compare and args.baseline:
        raise UserError("--compare with --baseline: say what is compared with the uncached run, or leave it out")
    if args.site and args.threshold is None:
        raise UserError(f"--site {args.site}: only threshold plans have one, leave it out or give --threshold")
    if args.target and args.speedup is None and args.budget is None:
        raise UserError(f"--target {args.target}: only budget plans have one, leave it out or give --speedup")
    if args.baseline:
        return None
    site, target = args.site or "output", args.target or "reference"
    return PlanRequest(args.model, args.steps, site=site, target=target, **ways)


def calibration_options(args: argparse.Namespace) -> CalibrationOptions:
    """Return how the flags ask for a plan to be calibrated."""
    return CalibrationOptions(args.calibration_prompts, args.batch_size, args.effort)


def checked_settings(sampler: Sampler, pipe, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the flags ask for, checked by the model folder."""
    return sampler.settings_of(pipe, **{name: getattr(args, name) for name in settings_parameters(sampler)})


def open_pipeline(sampler: Sampler, args: argparse.Namespace):
    """Load the pipeline that the flags ask for, without the libraries' own messages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = default_device() if args.device is None else args.device
    if args.model == "demo" and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # a small model is no reason to take them all
    return sampler.load(args.model, device, dtype_for(device, args.dtype), args.offload)


def main(sampler: Sampler, arguments: Sequence[str] | None = None) -> None:
    """Run a model folder's command line.

    Args:
        sampler: Its `generate.py` as a module.
        arguments: Words of the command line; default: those of the process.

    Raises:
        UserError: Wrong input; the message names the flag.
    """
    args = parse_arguments(sampler, arguments)
    default = sampler.FOLDER / "prompts" / ("demo.txt" if draws_captions(sampler, args.model) else "examples.txt")
    prompts = prompts_of(args.prompt, args.prompts, default)
    request, options = plan_request(args), calibration_options(args)
    with writable(args.out) as out:
        pipe = open_pipeline(sampler, args)
        settings = checked_settings(sampler, pipe, args)
        plan, path = (None, None) if request is None else find_plan(sampler, pipe, settings, request, options)

        methods = {"baseline": None} if plan is None else {plan.method: plan}
        if args.compare and plan:
            methods = {"baseline": None, **methods}
        runs = run_interleaved(sampler, pipe, prompts, args, settings, methods)
        for method, run in runs.items():
            media.save_results(out, run.images, method, getattr(args, "fps", None))
        report(sampler, pipe, args, settings, prompts, runs, plan, path)


# --- running and reporting ---------------------------------------------------------------------------------------


@dataclass
class TimedRun:
    """A method's runs over all prompts.

    Attributes:
        images: Images [N, H, W, 3] or videos [N, F, H, W, 3] in [0, 1].
        times: Seconds of the denoising loops, one entry per timed run.
    """

    images: np.ndarray = field(default_factory=lambda: np.empty(0))
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def run_interleaved(
    sampler: Sampler,
    pipe,
    prompts: Sequence[str],
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    methods: Mapping[str, Plan | None],
) -> dict[str, TimedRun]:
    """Run each method `--repeats` times in turn (A B A B …); a comparison warms up with one more round.

    Raises:
        UserError: Noise levels that do not fall, or a run that led to numbers that are not finite.
    """
    runs = {name: TimedRun() for name in methods}
    parts = [slice(b, b + args.batch_size) for b in range(0, len(prompts), args.batch_size)]
    seeds = range(args.seed, args.seed + len(prompts))
    with np.errstate(all="ignore"):  # a grid that comes to nothing is refused in one line
        inputs = [sampler.prepare(pipe, prompts[part], seeds[part], **settings) for part in parts]
    check_levels(inputs[0].sigmas.tolist(), Requirements.of_scheduler(pipe.scheduler, settings["steps"]).scheduler)
    rounds = args.repeats + (len(methods) > 1)
    progress = Progress("step")
    calls = sum(plan.nfe if plan and plan.kind == "budget" else settings["steps"] for plan in methods.values())
    progress.expect(rounds * len(parts) * calls)

    def latents_of(part, plan: Plan | None) -> torch.Tensor:
        finite = FiniteCheck()

        def on_step(i, x, v):
            progress.update()
            finite.see(i, x, v)

        latents = sampler.denoise(pipe, part, plan, on_step)
        finite.end(latents, "try --dtype float32, or other settings")
        return latents

    for number in range(rounds):
        for name, plan in methods.items():
            progress.begin(name)
            start = time.perf_counter()
            latents = [latents_of(part, plan) for part in inputs]
            synchronize(pipe._execution_device)
            if number or rounds == args.repeats:
                runs[name].times.append(time.perf_counter() - start)
            if number == 0:
                images = [sampler.decode(pipe, z, part) for z, part in zip(latents, inputs, strict=True)]
                runs[name].images = np.concatenate(images)
    progress.close()
    return runs


def report(
    sampler: Sampler,
    pipe,
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    prompts: Sequence[str],
    runs: Mapping[str, TimedRun],
    plan: Plan | None,
    path: Path | None,
) -> None:
    """Write metrics.json (common/docs/reference/metrics.md), and where both ran comparison.png; print one line."""
    seconds = {"baseline": None, "cached": None} | {_role(name): run.seconds for name, run in runs.items()}
    both = len(runs) == 2
    comparison, lpips, quality = None, None, dict.fromkeys(METRICS)
    if both:
        lpips = Lpips()
        comparison = compare(prompts, *(run.images for run in runs.values()), plan, lpips)
        quality = dict(comparison.quality)
    quality["prompt_accuracy"] = _prompt_accuracy(sampler, pipe, args.model, prompts, runs)
    metrics = {
        "schema": 2,
        "model": args.model,
        "method": plan.method if plan else "baseline",
        "plan": relative(path, sampler.FOLDER) if plan else None,
        "steps": args.steps,
        "nfe": plan.nfe if plan else args.steps,
        "settings": settings,
        "prompts": len(prompts),
        "seeds": [args.seed, args.seed + len(prompts) - 1],
        "repeats_s": {"baseline": [], "cached": []} | {_role(name): run.times for name, run in runs.items()},
        "latency_s": seconds,
        "speedup": seconds["baseline"] / seconds["cached"] if both else None,
        "quality": quality,
        "machine": machine(pipe._execution_device),
        "threads": torch.get_num_threads(),
        "libraries": library_versions(),
        "date": date.today().isoformat(),
    }
    media.save_metrics(args.out, metrics)
    made = counted(len(prompts), "video" if makes_videos(sampler) else "image")
    if comparison is None:
        print(f"{made} in {args.out}/, {counted(metrics['nfe'], 'step')} computed for each")
        return
    media.save_png(args.out / "comparison.png", comparison.sheet)
    if quality["psnr"] is None:
        print("PSNR has no number: a cached image equals the uncached one", file=sys.stderr)
    print(
        f"{made} in {args.out}/: {plan.nfe} of {args.steps} steps computed, "
        f"{metrics['speedup']:.2f}× faster denoising ({seconds['baseline']:.2f} s → {seconds['cached']:.2f} s"
        f"{doubt([run.times for run in runs.values()], args.steps / plan.nfe)}), {comparison}"
    )
    if lpips.problem:
        print(lpips.problem, file=sys.stderr)


def _prompt_accuracy(
    sampler: Sampler, pipe, model: str, prompts: Sequence[str], runs: Mapping[str, TimedRun]
) -> dict[str, float | None]:
    accuracy: dict[str, float | None] = {"baseline": None, "cached": None}
    if not draws_captions(sampler, model):
        return accuracy
    for name, run in runs.items():
        images = [media.to_uint8(image) for image in run.images]
        accuracy[_role(name)] = sampler.grammar.prompt_accuracy(list(prompts), images, pipe)
    if all(value is None for value in accuracy.values()):
        print("prompt accuracy is not computed: a prompt is not a caption of the demo's grammar", file=sys.stderr)
    return accuracy


def _role(method: str) -> str:
    return "baseline" if method == "baseline" else "cached"
