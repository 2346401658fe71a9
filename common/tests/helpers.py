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

import numpy as np
import pytest
import torch

import ertacache
from ertacache import BudgetPlan, Plan, Requirements, ThresholdPlan, UserError
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.session import CalibrationSession
from ertacache.numerics.schedulers import first_order, solver_of
from ertacache.utils.provenance import fingerprint
from tiny_pipelines import STEPS, flux
from toy import Pipe, ToySampler


@contextlib.contextmanager
def refused(*words, error=UserError):
    """The block ends with this error, in one line that has these words: the value, and what to do."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    missing = [word for word in map(str, words) if word not in message]
    assert not missing and "\n" not in message, f"{missing} missing in: {message}"


def fast(values, *names):
    """Parameters of which only those of these names are in `test.sh --fast`."""
    name_of = {value: getattr(value, "__name__", value) for value in values}
    return [value if name_of[value] in names else pytest.param(value, marks=pytest.mark.slow) for value in values]


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


def toy_session(work, prompts=8, steps=TOY_STEPS, matrix=MATRIX, sampler=None, batch_size=3, **settings):
    """A calibration session on dx/ds = A x; prompts: their number, or texts."""
    names = [f"p{i}" for i in range(prompts)] if isinstance(prompts, int) else list(prompts)
    options = {"settings": {"steps": steps, **settings}, "batch_size": batch_size, "work": work, "progress": False}
    return CalibrationSession(sampler or ToySampler(), Pipe(matrix), names, range(len(names)), **options)


def all_inputs(session):
    """The inputs of all calibration prompts in one batch, past the session's own batches."""
    return session.sampler.prepare(session.pipe, session.prompts, session.seeds, **session.settings)


def budget_calibration(work, target="reference", **options):
    """A calibration of budget plans on dx/ds = A x."""
    return BudgetCalibration(toy_session(work, **options), target)


# --- model folders ---------------------------------------------------------------------------------------------------


def shipped_plans(sampler) -> dict[str, Plan]:
    """The plans of a model folder's demo, by file name."""
    return {path.name: Plan.load(path) for path in sorted((sampler.FOLDER / "cache").glob("demo-*.json"))}


def shipped_plan(sampler, kind) -> Plan:
    """The one nearest to half of the steps. kind: site of a threshold plan, or target of a budget plan."""
    plans = [p for p in shipped_plans(sampler).values() if kind == (p.target if p.kind == "budget" else p.site)]
    return min(plans, key=lambda plan: abs(plan.nfe - plan.steps / 2))


# --- tiny pipelines --------------------------------------------------------------------------------------------------

HALF = (0, 1, 3, 5)


def requirements(tiny, steps=STEPS):
    return Requirements.of(tiny.pipe, steps, {})


def budget_plan(tiny, computed, history_length=1, steps=STEPS):
    """First-order jumps between these steps, on the grid that the pipeline itself asks for."""
    tiny.run(steps)
    own, ends = tiny.pipe.scheduler, [*computed, steps]
    grid = tuple(solver_of(own).sigmas.tolist())
    jumps = [first_order(own, i, k) for i, k in pairwise(ends)]
    weights = tuple((w, *[0.0] * (history_length - 1)) for _, w in jumps)
    return BudgetPlan(requirements(tiny, steps), tuple(computed), weights, grid, scale=tuple(a for a, _ in jumps))


def threshold_plan(tiny, cached, **changes):
    tiny.run()
    grid = tuple(solver_of(tiny.pipe.scheduler).sigmas.tolist())
    return ThresholdPlan(requirements(tiny), 0.1, cached, "output", grid, **changes)


PROMPTS = ["a red star", "a small blue ring", "green stripes", "a dotted ground", "two rings"]


def with_prompts(tiny):
    """A tiny pipeline whose text states belong to each prompt, in place of given ones."""

    def states(prompts, *shape):
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def encode_prompt(prompt, *_, **__):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        nothing = [""] * len(prompt)
        text, other, mask = states(prompt, 5, 16), states(nothing, 5, 16), torch.ones(len(prompt), 5, dtype=torch.int64)
        return {
            "flux": (text, states(prompt, 16), torch.zeros(5, 3)),
            "stable_diffusion_3": (text, other, states(prompt, 16), states(nothing, 16)),
            "wan": (text, other),
            "qwenimage": (text, mask),
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
    """Run work(folder) as `size` processes: their exit codes, results and stderr, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [context.Process(target=child, args=(rank, size, port, work, folder)) for rank in range(size)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
        process.kill()  # nothing, where it has ended
    results, errors = ([folder / f"{name}-{rank}" for rank in range(size)] for name in ("result", "stderr"))
    results = [pickle.loads(path.read_bytes()) if path.exists() else None for path in results]
    return [process.exitcode for process in children], results, [path.read_text() for path in errors]


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
