"""Latency and peak memory of caching on the real architectures at full size, with random weights.

    .venv/bin/python scripts/bench/latency.py --json latency.json
    .venv/bin/python scripts/bench/latency.py ERTACache4FLUX --methods baseline,budget,dbcache --compile both
    .venv/bin/python scripts/bench/latency.py --size small --device cpu --steps 12 --repeats 1 --compile no

What a step costs does not depend on the weights, so these are the costs of the published models, without a download.
Timed is the denoising loop on one prompt, with the folder's default guidance; text encoders and VAE are left out or
thin stand-ins, and peak memory is that of the transformer and the loop. Every method computes about half of the steps:
plans exactly, the first-block cache and DBCache at the threshold that a search finds. Nothing here says anything
about quality. `--size small` runs the same code on toy sizes. `--dry-run`, with `--step-seconds S`, says how much it
would be.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import json
import platform
import sys
from argparse import Namespace
from collections.abc import Iterator
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ertacache.cli.arguments import ArgumentParser, check_counts, check_step_seconds
from ertacache.demos.model_folder import load_model_folder
from ertacache.demos.random_models import MODELS, random_module
from ertacache.evaluation.latency import METHODS, NUMBERS, PLANS, SPEEDUP, Latency, describe, empty_row, release_memory
from ertacache.utils.checks import LARGEST_STEPS
from ertacache.utils.devices import checked_device, default_device
from ertacache.utils.errors import UserError, run_program
from ertacache.utils.files import ensure_writable, write_atomically
from ertacache.utils.provenance import library_versions
from ertacache.utils.tables import markdown, planned

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("folder", "method", "compile", "steps", *NUMBERS, "peak_memory_mib", "error")


def open_pipeline(sampler, args: Namespace):
    """Return the folder's pipeline at the chosen size, with random weights."""
    model, dtype = MODELS[sampler.FOLDER.name], getattr(torch, args.dtype)
    new = partial(random_module, args.device, dtype)
    pipe = model.build(sampler.FOLDER / "demo", getattr(model, args.size), new)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rows_of(sampler, args: Namespace) -> Iterator[dict]:
    """Yield a folder's rows; rows with the error where the model cannot be made, for example for lack of memory."""
    settings = getattr(MODELS[sampler.FOLDER.name], args.size).settings
    settings = {**settings, "steps": args.steps or settings["steps"]}
    common = {"folder": sampler.FOLDER.name, "size": args.size}
    common |= origin(torch.device(args.device), getattr(torch, args.dtype))
    latency = error = None
    try:
        pipe = open_pipeline(sampler, args)
        latency = Latency(sampler, pipe, sampler.settings_of(pipe, **settings), args.repeats)
    except torch.OutOfMemoryError as caught:
        error = describe(caught)
    for backend in {"no": (None,), "yes": (args.backend,), "both": (None, args.backend)}[args.compile]:
        empty = (empty_row(name, settings, backend, error) for name in args.methods)
        for row in empty if latency is None else latency.rows(args.methods, backend):
            yield {**common, **row}


def announced(args: Namespace, folder: str) -> str:
    """Return a line on the rows of a model folder, and about how many steps they take."""
    steps = args.steps or getattr(MODELS[folder], args.size).settings["steps"]
    backends, cached = 2 if args.compile == "both" else 1, [name for name in args.methods if name != "baseline"]
    rows, uncached = len(args.methods) * backends, 2 if set(cached) - set(PLANS) else 1  # of each kind one, in turn
    calls = backends * (args.repeats + 1) * steps * (uncached + len(cached) / SPEEDUP)  # with a round to warm up
    text = planned(folder, rows, 1, calls, args.step_seconds)
    return f"{text}; the search for other caches' thresholds comes on top"


def origin(device: torch.device, dtype: torch.dtype) -> dict:
    """Return what a number was measured with."""
    libraries = library_versions()
    try:
        libraries["cache-dit"] = version("cache-dit")
    except PackageNotFoundError:
        libraries["cache-dit"] = "not installed"
    processor = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "dtype": str(dtype).removeprefix("torch."),
        "libraries": libraries,
        "date": date.today().isoformat(),
    }


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    cells = [[row[name] for name in COLUMNS] for row in rows]
    return markdown(COLUMNS, [[f"{v:.4g}" if isinstance(v, float) else v for v in line] for line in cells])


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="model folders (default: all four)")
    add("--size", choices=("full", "small"), default="full", help="published sizes, or toy sizes (default: full)")
    add("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default: all)")
    add("--compile", choices=("yes", "no", "both"), default="both", help="torch.compile of the transformer's blocks")
    add("--backend", default="inductor", help="of torch.compile (default: inductor)")
    add("--steps", type=int, help="T (default: the paper's, 30 or 50)")
    add("--repeats", type=int, default=5, help="timed runs of each method; the median counts")
    add("--device", choices=("cuda", "mps", "cpu"), help="default: a GPU when there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on the CPU")
    add("--json", type=Path, metavar="FILE", help="where to write the rows")
    add("--dry-run", action="store_true", help="say how many rows and steps it would be, and measure nothing")
    add("--step-seconds", type=float, help="of a step of the uncached run, for --dry-run: also say how many hours")
    return checked(parser.parse_args(arguments))


def checked(args: Namespace) -> Namespace:
    """Return the arguments with their defaults; refuse what makes no sense."""
    args.methods = args.methods.split(",")
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise UserError(f"--methods {','.join(unknown)}: choose from {', '.join(METHODS)}")
    check_counts(args, "repeats")
    check_counts(args, "steps", least=4, most=LARGEST_STEPS)
    check_step_seconds(args)
    if args.backend not in torch._dynamo.list_backends(None):
        raise UserError(f"--backend {args.backend}: choose from {', '.join(torch._dynamo.list_backends(None))}")
    args.device = args.device or default_device()
    checked_device(args.device)
    if args.size == "full" and args.device == "cpu":
        raise UserError("--size full: the published sizes need a GPU; use --size small, which any machine can run")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.folders = [Path(folder).resolve() for folder in args.folders] or [ROOT / name for name in MODELS]
    for folder in args.folders:
        if folder.name not in MODELS:
            raise UserError(f"{folder.name} is not a folder that this knows: choose from {', '.join(MODELS)}")
    if args.json:
        ensure_writable(args.json.parent)
    return args


def main():
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    args, rows = parse_arguments(), []
    if args.dry_run:
        for folder in args.folders:
            print(announced(args, folder.name))
        return
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
    for sampler in [load_model_folder(folder) for folder in args.folders]:
        for row in rows_of(sampler, args):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
        if args.json:  # after each model: full sizes take long
            write_atomically(args.json, (json.dumps(rows, indent=1) + "\n").encode())
        release_memory()
    print(table(rows))


if __name__ == "__main__":
    run_program(main)
