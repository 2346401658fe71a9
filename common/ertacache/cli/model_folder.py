"""The command line of a model folder's `generate.py`: which runs, and what is written."""

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from ertacache.calibration.from_folder import find_plan
from ertacache.demos.model_folder import makes_videos, settings_parameters, world
from ertacache.evaluation.metrics import METRICS, Lpips
from ertacache.evaluation.metrics import quality as measure
from ertacache.plans.budget import TARGETS
from ertacache.utils import media
from ertacache.utils.devices import synchronize
from ertacache.utils.errors import ArgumentParser, UserError
from ertacache.utils.files import ensure_writable, read_prompts, relative

METHODS = {"threshold": "ertacache", "budget": "budget"}  # what a kind of plan is called in files and tables
SETTINGS = {  # what a model folder may let one choose, with the type and help of its flag
    "steps": (int, "T, steps of the uncached run"),
    "guidance": (float, "scale of the guidance"),
    "height": (int, "in pixels"),
    "width": (int, "in pixels"),
    "frames": (int, "frames of the video"),
    "negative_prompt": (str, "what the unconditional branch is told"),
    "aesthetic_score": (float, "what is said of the video's beauty behind the prompt, from 4 to 7"),
}


def parse_arguments(program, arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=program.__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="demo", help='"demo", a local directory, or a hub id (default: demo)')
    add("--prompt", action="append", help="a prompt; may be given several times")
    add("--prompts", metavar="FILE", help="a text file with one prompt a line")
    add("--seed", type=int, default=1000, help="seed of the first prompt; the next one has seed + 1, and so on")
    for name, default in settings_parameters(program).items():
        kind, text = SETTINGS[name]
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    if makes_videos(program):
        add("--fps", type=int, default=8, help="frames a second of the .mp4 files")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--threshold", type=float, metavar="λ", help="cache by the plan for this λ; calibrated if new")
    choice.add_argument("--speedup", type=float, metavar="S", help="compute exactly T/S steps, where they matter most")
    choice.add_argument("--budget", type=int, metavar="N", help="compute exactly N steps, where they matter most")
    choice.add_argument("--plan", metavar="FILE", help="cache by this plan file")
    choice.add_argument("--baseline", action="store_true", help="the uncached run only")
    add("--site", choices=("output", "blocks"), default="output", help="where the residual is cached")
    add("--compare", action="store_true", help="also run uncached, and compare")
    add("--repeats", type=int, default=1, help="timed runs of each; the median is reported")
    add("--batch-size", type=int, default=4, help="prompts a model call")
    add("--calibration-prompts", metavar="FILE", help="prompts for a plan that is not stored yet")
    searched = "replays that calibration may spend to better a budget plan"
    add("--search", type=int, default=0, metavar="EVALS", help=searched)
    aims = "what a budget plan imitates: the uncached run (reference), or the solution that it approximates (exact)"
    add("--target", choices=TARGETS, default="reference", help=aims)
    add("--out", default="sample", help="output folder (default: sample)")
    add("--device", help="cuda or cpu (default: cuda when there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, float32 on the CPU")
    add("--offload", choices=("none", "model", "sequential"), default="none", help="save GPU memory, slower")
    return parser.parse_args(arguments)


def checked_settings(program, pipe, args) -> dict:
    """The settings that the arguments ask for, checked by the model folder."""
    return program.settings_of(pipe, **{name: getattr(args, name) for name in settings_parameters(program)})


def parse_list(text: str) -> list[float]:
    """Numbers with commas between them, from a flag like --thresholds."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{text!r} is no list of numbers: write them with commas between, like 0.05,0.1") from error
    if not values:
        raise UserError("an empty list of numbers: give at least one, like 0.1")
    return values


def generate(program, arguments: list[str] | None = None) -> None:
    """Run a model folder's command line. program: its `generate.py` as a module."""
    args = parse_arguments(program, arguments)
    prompts = _prompts(program, args)
    for name in ("repeats", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a whole number of at least 1")
    if not (args.plan or args.baseline) and (args.threshold, args.budget, args.speedup) == (None, None, None):
        raise UserError("nothing to do: give --threshold λ, --speedup S, --budget N, --plan FILE or --baseline")
    out = ensure_writable(args.out)
    pipe = load(program, args)
    settings = checked_settings(program, pipe, args)
    plan, plan_path = (None, None) if args.baseline else find_plan(program, pipe, args, settings)

    methods = {METHODS[plan.kind]: plan} if plan else {"baseline": None}
    if args.compare and plan:
        methods = {"baseline": None, **methods}
    runs = run_interleaved(program, pipe, prompts, args, settings, methods)
    for method, run in runs.items():
        media.save_results(out, run["pictures"], method, getattr(args, "fps", None))
    report(program, args, prompts, runs, plan, plan_path, out)


def load(program, args):
    """The pipeline that the arguments ask for, quietly."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    return program.load(args.model, device, getattr(torch, dtype), args.offload)


def _prompts(program, args) -> list[str]:
    if args.prompt and args.prompts:
        raise UserError("--prompt and --prompts exclude each other: give one of them")
    default = "demo.txt" if args.model == "demo" else "examples.txt"
    prompts = args.prompt or read_prompts(args.prompts or program.FOLDER / "prompts" / default)
    if not all(p.strip() for p in prompts):
        raise UserError("--prompt is empty: say what should be seen")
    return prompts


# --- running and reporting ---------------------------------------------------------------------------------------


def run_interleaved(program, pipe, prompts, args, settings, methods):
    """Run each method `repeats` times in turn (A B A B …): name → pictures and denoising seconds, the median."""
    runs = {name: {"seconds": [], "pictures": []} for name in methods}
    parts = [slice(b, b + args.batch_size) for b in range(0, len(prompts), args.batch_size)]
    seeds = range(args.seed, args.seed + len(prompts))
    inputs = [program.prepare(pipe, prompts[p], seeds[p], **settings) for p in parts]
    rounds = args.repeats + (len(methods) > 1)  # a comparison warms up first
    bar = tqdm(total=rounds * len(methods) * len(parts) * settings["steps"], unit="step", disable=None)

    def tick(i, x, v):
        bar.update()

    for number in range(rounds):
        for name, plan in methods.items():
            bar.set_description(name)
            latents, start = [], time.perf_counter()
            for part in inputs:
                latents.append(program.denoise(pipe, part, plan, tick))
            synchronize(pipe)
            if number or rounds == args.repeats:
                runs[name]["seconds"].append(time.perf_counter() - start)
            if number == 0:
                pictures = [program.decode(pipe, z, part) for z, part in zip(latents, inputs, strict=True)]
                runs[name]["pictures"] = np.concatenate(pictures)
    bar.close()
    for run in runs.values():
        run["seconds"] = statistics.median(run["seconds"])
    return runs


def report(program, args, prompts, runs, plan, plan_path, out) -> None:
    """metrics.json (schema 1 of common/docs/metrics.md), comparison.png, and a line for people."""
    method, kind = METHODS[plan.kind] if plan else "baseline", "videos" if makes_videos(program) else "pictures"
    both = len(runs) == 2
    seconds = {"baseline": None, "cached": None}
    seconds |= {_role(name): run["seconds"] for name, run in runs.items()}
    quality = dict.fromkeys(METRICS)
    if both:
        quality = measure(runs["baseline"]["pictures"], runs[method]["pictures"], Lpips())
    quality["prompt_accuracy"] = _prompt_accuracy(world(program), args.model, prompts, runs)
    speedup = seconds["baseline"] / seconds["cached"] if both else None
    metrics = {
        "schema": 1,
        "model": args.model,
        "method": method,
        "plan": relative(plan_path, program.FOLDER) if plan else None,
        "steps": args.steps,
        "nfe": plan.nfe if plan else args.steps,
        "prompts": len(prompts),
        "latency_s": seconds,
        "speedup": speedup,
        "quality": quality,
    }
    media.save_metrics(out, metrics)
    if not both:
        print(f"{len(prompts)} {kind} in {out}/, {metrics['nfe']} steps computed for each")
        return
    titles = (f"baseline, {args.steps} steps", f"ERTACache {plan.title}, {plan.nfe} computed")
    sheet = media.comparison(prompts, *(runs[name]["pictures"] for name in ("baseline", method)), titles)
    media.save_png(out / "comparison.png", sheet)
    if quality["psnr"] is None:
        print("PSNR has no number: a cached picture equals the uncached one", file=sys.stderr)
    if getattr(plan, "target", "reference") == "exact":
        print("this plan aims at the exact solution, PSNR and SSIM are to the uncached run", file=sys.stderr)
    psnr = "equal" if quality["psnr"] is None else f"{quality['psnr']:.1f} dB"
    print(
        f"{len(prompts)} {kind} in {out}/: {plan.nfe} of {args.steps} steps computed, {speedup:.2f}× faster denoising "
        f"({seconds['baseline']:.2f} s → {seconds['cached']:.2f} s), PSNR {psnr}, SSIM {quality['ssim']:.4f}"
    )


def _prompt_accuracy(oracle, model, prompts, runs) -> dict:
    accuracy = {"baseline": None, "cached": None}
    if model != "demo":
        return accuracy
    for name, run in runs.items():
        pictures = [media.to_uint8(p) for p in run["pictures"]]
        accuracy[_role(name)] = oracle.prompt_accuracy(prompts, pictures)
    if all(value is None for value in accuracy.values()):
        print("prompt accuracy is not computed: a prompt is not a caption of the demo's grammar", file=sys.stderr)
    return accuracy


def _role(method: str) -> str:
    return "baseline" if method == "baseline" else "cached"
