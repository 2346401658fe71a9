"""Generations with plans switched at random, and disturbances in between."""

import contextlib
import gc
import os
import random
import resource
import threading
import warnings
from collections import Counter
from pathlib import Path

import torch

import ertacache
from ertacache import Plan, UserError
from parts.flux_demo import FOLDER, PROMPTS, SHIPPED, latents, pipeline


class Stop(Exception):
    pass


def soak(count: int, seed: int) -> tuple[str, list[tuple]]:
    """Generate with plans switched at random, and disturbances; return the line of the table, and the faults."""
    rng, pipe = random.Random(seed), pipeline()
    warnings.simplefilter("ignore")
    plans = {name: Plan.load(FOLDER / "cache" / f"{name}.json") for name in SHIPPED}
    prompts = PROMPTS[:2]
    wanted = {}
    for name in (None, *plans):
        fresh = pipeline()
        if name:
            ertacache.enable(fresh, plans[name])
        wanted |= {(name, prompt): latents(fresh, prompt) for prompt in prompts}
    faults, disturbed, current, before = [], Counter(), None, None
    for number in range(count):
        if rng.random() < 0.7:
            current = rng.choice([None, *plans])
            ertacache.disable(pipe) if current is None else ertacache.enable(pipe, plans[current])
        prompt, kind = rng.choice(prompts), rng.choice(["none", "none", "none", "exception", "interrupt", "steps"])
        if kind in ("exception", "interrupt"):
            at, error = rng.randrange(30), Stop if kind == "exception" else KeyboardInterrupt

            def callback(pipe, i, t, tensors, at=at, error=error):
                if i == at:
                    raise error
                return tensors

            with contextlib.suppress(Stop, KeyboardInterrupt):
                latents(pipe, prompt, callback_on_step_end=callback)
                faults.append((number, "no exception"))
            disturbed[kind] += 1
        elif kind == "steps" and current:
            with contextlib.suppress(UserError):
                latents(pipe, prompt, num_inference_steps=12)
                faults.append((number, "another number of steps was not refused"))
            disturbed[kind] += 1
        try:
            if not torch.equal(latents(pipe, prompt), wanted[current, prompt]):
                faults.append((number, f"another result with {current}"))
        except Exception as error:
            faults.append((number, f"{type(error).__name__}: {error}"))
        if number == count // 10:
            before = usage()
    after = usage()
    for name, limit in (("MiB", 40), ("threads", 0), ("descriptors", 0), ("objects", 2000)):
        if before and after[name] - before[name] > limit:
            faults.append((name, before[name], after[name]))
    kinds = ", ".join(f"{name} {number}" for name, number in sorted(disturbed.items()))
    growth = ", ".join(f"{name} {before[name]} → {after[name]}" for name in after) if before else ""
    return f"{count} generations ({kinds}); {growth}", faults


def usage() -> dict[str, int]:
    """Return what this process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MiB": pages * resource.getpagesize() // 2**20,
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
    }
