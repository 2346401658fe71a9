"""`ertacache.accelerate` as a person meets it: its first and second start, switching in two threads, kills.

    .venv/bin/python scripts/bench/first_use.py                      # all parts, as in the docs
    .venv/bin/python scripts/bench/first_use.py kills --count 5

- start: a script of four lines on the FLUX demo, with an empty store and with one that has its plan.
- switch: in two threads, each with a pipeline of its own, calls that are uncached, at 2× or at 3×, at random. Expected:
  every result equal to that of a process that does nothing else, bit for bit.
- prompts: plans by default, from the package's own prompts, beside plans from as many captions of the demo, and the
  shipped ones: PSNR of the latents to the uncached run, with their range as peak, mean / 10th percentile, on held-out
  captions, full and open ones.
- kills: a first `accelerate` is killed (SIGKILL) at random moments, once or several times, then repeated. Expected: the
  plan of an undisturbed one, bit for bit, and nothing else in the store.

Each part prints a line of the table.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts

import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

import ertacache
from ertacache import Plan
from ertacache.calibration.accelerate import find_plans
from ertacache.cli.inspect import as_values
from ertacache.demos.model_folder import load_model_folder
from ertacache.utils.errors import run_program
from ertacache.utils.files import read_prompts
from parts.campaign import run_parts
from parts.flux_demo import CALL, FOLDER, ROOT, latents, pipeline

SPEEDUPS = (None, 2, 3)
FEW = 12  # steps of the calls whose calibration is killed
SCRIPT = f"""
import sys, time, torch, ertacache
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained("{FOLDER}/demo", dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
call = {CALL} | {{"num_inference_steps": int(sys.argv[1])}}
start = time.perf_counter()
ertacache.accelerate(pipe, speedup=2, **call)
print("seconds", time.perf_counter() - start, flush=True)
pipe("a rocket", **call).images[0]
print(ertacache.summary(pipe))
"""


def started(home: Path, steps: int) -> subprocess.Popen:
    """Start the script with a store."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "common")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment["ERTACACHE_HOME"] = str(home)
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(steps)], env=environment, **options)


def ended(process: subprocess.Popen, steps: int) -> float:
    """Wait for the script. Returns the seconds of `accelerate`."""
    said, errors = process.communicate(timeout=900)
    if process.returncode or f"{steps // 2} steps computed, {steps // 2} skipped" not in said:
        raise AssertionError(f"exit code {process.returncode}: {errors.strip().splitlines()[-1:]}")
    return float(re.search(r"seconds ([\d.e-]+)", said)[1])


def start(count: int, seed: int) -> tuple[str, list[tuple]]:
    """Run the script with an empty store, and then with a full one; return the line of the table, and the faults."""
    with tempfile.TemporaryDirectory() as root:
        homes = [Path(root) / str(number) for number in range(count)]
        first, second = ([ended(started(home, 30), 30) for home in homes] for _ in range(2))
    slow = [("full store", f"{seconds:.1f} s") for seconds in second if seconds > 1]
    medians = f"empty store {statistics.median(first):.1f} s, full store {statistics.median(second):.2f} s"
    return f"{count} of each, medians: {medians} (slowest {max(second):.2f} s)", slow


def alone(plan: Plan | None, prompts: tuple[str, ...], call: dict) -> list[np.ndarray]:
    """Return the latents of a process that does nothing else."""
    torch.set_num_threads(1)
    pipe = pipeline()
    if plan:
        ertacache.enable(pipe, plan)
    return [latents(pipe, prompt, **call).numpy() for prompt in prompts]


def switch(count: int, seed: int) -> tuple[str, list[tuple]]:
    """Switch in two threads; return the line of the table, and the faults."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["ERTACACHE_HOME"] = home
        plans = find_plans(pipeline(), [2, 3], call_kwargs=CALL)
    prompts, wanted = ("a rocket", "a fruit"), {}
    for speedup in SPEEDUPS:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            for prompt, found in zip(
                prompts, fresh.apply(alone, (plans.get(speedup), prompts, dict(CALL))), strict=True
            ):
                wanted[speedup, prompt] = torch.from_numpy(found)
    faults: list[tuple] = []
    pipelines = [pipeline() for _ in range(2)]  # before the threads: diffusers loads one model at a time

    def serve(number: int) -> None:
        own, rng = pipelines[number], random.Random(1000 * seed + number)
        ertacache.enable(own, plans)
        for call in range(count // 2):
            speedup, prompt = rng.choice(SPEEDUPS), rng.choice(prompts)
            try:
                ertacache.speedup(own, speedup)
                if not torch.equal(latents(own, prompt), wanted[speedup, prompt]):
                    faults.append((number, call, speedup, prompt))
            except Exception as error:
                faults.append((number, call, speedup, prompt, repr(error)))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{count} calls in 2 threads, uncached, 2× and 3× at random", faults


def prompts(count: int, seed: int) -> tuple[str, list[tuple]]:
    """Compare prompts to calibrate on; return the line of the table, and the faults."""
    pipe, grammar = pipeline(), load_model_folder(FOLDER).grammar
    captions = read_prompts(FOLDER / "prompts" / "calibration-demo.txt")
    with tempfile.TemporaryDirectory() as home:
        os.environ["ERTACACHE_HOME"] = home
        sets = {
            "package's prompts": find_plans(pipe, [2, 3], call_kwargs=CALL),
            "demo's captions": find_plans(pipe, [2, 3], captions, call_kwargs=CALL),
            "shipped": {s: Plan.load(FOLDER / "cache" / f"demo-30-budget-{30 // s}.json") for s in (2, 3)},
        }

    def made(texts: list[str], plan: Plan | None = None) -> torch.Tensor:
        ertacache.disable(pipe)
        if plan:
            ertacache.enable(pipe, plan, on_drift="ignore")
        return torch.cat([latents(pipe, text, 5000 + number) for number, text in enumerate(texts)])

    parts = []
    for kind in ("full", "open"):
        texts = grammar.sample_captions(count, 77 + seed, True, kind == "open")
        uncached = made(texts)
        peak = uncached.max() - uncached.min()
        for name, plans in sets.items():
            cells = []
            for speedup in (2, 3):
                error = (made(texts, plans[speedup]) - uncached).square().flatten(1).mean(1)
                psnr = 10 * torch.log10(peak**2 / error)
                cells.append(f"{psnr.mean():.1f} / {psnr.quantile(0.1):.1f}")
            parts.append(f"{kind}, {name}: {' and '.join(cells)} dB")
    return f"{count} captions of each kind at 2× and 3×; {'; '.join(parts)}", []


def stored(home: Path) -> dict[str, str]:
    """Return all files of a store; of plans the content without the date, of others the size."""
    found = {}
    for path in sorted(home.rglob("*")):
        if path.suffix == ".json":
            plan = Plan.load(path)
            found[path.name] = str({**as_values(plan), "provenance": {**plan.provenance, "date": ""}})
        elif path.is_file():
            found[path.name] = str(path.stat().st_size)
    return found


def kills(count: int, seed: int) -> tuple[str, list[tuple]]:
    """Kill first starts at random moments; return the line of the table, and the faults."""
    rng, done, campaigns, faults = random.Random(seed), 0, 0, []
    with tempfile.TemporaryDirectory() as root:
        begin = time.monotonic()
        ended(started(Path(root) / "alone", FEW), FEW)
        seconds, wanted = time.monotonic() - begin, stored(Path(root) / "alone")
        while done < count:
            home = Path(root) / str(campaigns)
            for _ in range(rng.choice([1, 2, 4])):
                process = started(home, FEW)
                time.sleep(rng.uniform(0.2, 1.0) * seconds)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                done += 1
            try:
                ended(started(home, FEW), FEW)
                if stored(home) != wanted:
                    raise AssertionError(f"another store: {sorted(stored(home))}")
            except AssertionError as error:
                faults.append((campaigns, str(error)))
            campaigns += 1
    return f"{done} kills of {campaigns} first starts", faults


def main() -> None:
    torch.set_num_threads(1)
    run_parts(__doc__, {"start": (start, 3), "switch": (switch, 200), "prompts": (prompts, 32), "kills": (kills, 50)})


if __name__ == "__main__":
    run_program(main)
