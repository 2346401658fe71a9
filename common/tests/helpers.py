"""What tests in several folders share."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import sys
import warnings
import zlib
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch

import ertacache
from ertacache import BudgetPlan, Conditions, ThresholdPlan
from ertacache.calibration.budget import BudgetCalibration
from ertacache.numerics.schedulers import first_order, solver_of
from ertacache.utils.provenance import fingerprint
from tiny_pipelines import STEPS, flux
from toy import Pipe, Program


class CallCounter:
    """Counts a module's calls through a hook."""

    def __init__(self, module):
        self.count = 0
        self.handle = module.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


# --- the toy ---------------------------------------------------------------------------------------------------------

MATRIX = np.array([[1.5, 2.0, 0.1], [-1.7, 0.3, 0.4], [0.2, -0.6, 0.9]])
TOY_STEPS = 12


def budget_calibration(tmp_path, prompts=8, steps=TOY_STEPS, matrix=MATRIX, program=None, **options):
    names, settings = [f"p{i}" for i in range(prompts)], {"steps": steps}
    options = {"settings": settings, "batch_size": 3, "work": tmp_path, "progress": False, **options}
    return BudgetCalibration(program or Program(), Pipe(matrix), names, list(range(prompts)), **options)


# --- tiny pipelines --------------------------------------------------------------------------------------------------

HALF = (0, 1, 3, 5)


def conditions(tiny, steps=STEPS):
    return Conditions.of(SimpleNamespace(transformer=tiny.pipe.transformer, scheduler=tiny.pipe.scheduler), steps, {})


def budget_plan(tiny, computed, anchors=1):
    """First-order jumps between these steps, on the grid that the pipeline itself asks for."""
    tiny.run()
    own, ends = tiny.pipe.scheduler, [*computed, STEPS]
    grid = tuple(solver_of(own).levels.tolist())
    jumps = [first_order(own, i, k) for i, k in pairwise(ends)]
    weights = tuple((w, *[0.0] * (anchors - 1)) for _, w in jumps)
    return BudgetPlan(conditions(tiny), tuple(computed), weights, grid, scale=tuple(a for a, _ in jumps))


def threshold_plan(tiny, cached, **changes):
    tiny.run()
    grid = tuple(solver_of(tiny.pipe.scheduler).levels.tolist())
    return ThresholdPlan(conditions(tiny), 0.1, cached, "output", grid, **changes)


PROMPTS = ["a red star", "a small blue ring", "green stripes", "a dotted ground", "two rings"]


def with_prompts(tiny):
    """A tiny pipeline whose text states belong to each prompt, in place of given ones."""

    def states(prompts, *shape):
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def encode_prompt(prompt, *_, **__):
        nothing = [""] * len(prompt)
        text, other, mask = states(prompt, 5, 16), states(nothing, 5, 16), torch.ones(len(prompt), 5, dtype=torch.int64)
        return {
            "flux": (text, states(prompt, 16), torch.zeros(5, 3)),
            "stable_diffusion_3": (text, other, states(prompt, 16), states(nothing, 16)),
            "wan": (text, other),
        }.get(type(tiny.pipe).__module__.split(".")[-2], (text, mask, other, mask))

    tiny.pipe.encode_prompt = encode_prompt
    return replace(tiny, arguments={k: v for k, v in tiny.arguments.items() if "prompt" not in k})


def calibrate(tiny, prompts=PROMPTS, speedups=(2,), **options):
    options = {"num_inference_steps": STEPS, "progress": False, **tiny.arguments, **options}
    return ertacache.calibrate(tiny.pipe, prompts, speedups, **options)


@cache
def flux_plan() -> BudgetPlan:
    """4 of 8 steps of the tiny FLUX; it knows its weights."""
    tiny = flux()
    return replace(budget_plan(tiny, HALF), provenance={"weights": fingerprint(tiny.pipe)})


@cache
def flux_planned() -> torch.Tensor:
    """The latents that the tiny FLUX makes with it."""
    tiny = flux()
    ertacache.enable(tiny.pipe, flux_plan())
    return tiny.run()


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def counted(tiny, **changes) -> tuple[torch.Tensor, int]:
    """The latents of a run, and how often it calls the transformer."""
    with CallCounter(tiny.pipe.transformer) as calls:
        return tiny.run(**changes), calls.count


# --- several processes -----------------------------------------------------------------------------------------------

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["ertacache.calibration.budget", "accelerate"])


def processes(size, work, folder):
    """Run work(folder) as `size` processes: their exit codes, results and what they said on stderr, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [context.Process(target=child, args=(rank, size, port, work, folder)) for rank in range(size)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
        process.kill()  # nothing, where it has ended
    results, said = ([folder / f"{name}-{rank}" for rank in range(size)] for name in ("result", "stderr"))
    results = [pickle.loads(path.read_bytes()) if path.exists() else None for path in results]
    return [process.exitcode for process in children], results, [path.read_text() for path in said]


def child(rank, size, port, work, folder):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in address.items()} | {"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    sys.stderr = (folder / f"stderr-{rank}").open("w", buffering=1)
    result = work(folder)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))


# --- rows ------------------------------------------------------------------------------------------------------------


def row(folder, label, family, asked, speedup, psnr, **values):
    method = label.split(" (")[0]
    return {
        "folder": folder, "model": "demo", "method": method, "label": label, "family": family, "asked": asked,
        "settings": {"steps": 12, "guidance": 3.5, "negative_prompt": ""}, "steps": 12, "nfe": 12 / speedup,
        "prompts": 2, "seed": 7, "batch_size": 2, "flops": 1e9 / speedup, "speedup_flops": speedup,
        "speedup_nfe": speedup, "latency_s": 1.0, "speedup_latency": 0.9 * speedup, "end_to_end_s": 2.0,
        "speedup_end_to_end": 0.8 * speedup, "psnr": psnr, "ssim": psnr and 1 - 10 ** (-psnr / 20), "lpips": None,
        "exact_psnr": 44.0, "prompt_accuracy": 1.0, "plan": None, "timeline": None, "samples": None,
        "sample_prompts": None, "machine": "toy machine", "libraries": {"torch": "2.0"}, "date": "2026-01-02", **values,
    }  # fmt: skip
