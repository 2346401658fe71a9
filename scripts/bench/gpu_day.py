"""All that was never run on CUDA, in under nine minutes of one GPU: parity, plans, offload, compilation, latency.

    sh scripts/bench/gpu_day.sh                                        # how to bring packages: its head
    .venv/bin/python scripts/bench/gpu_day.py --device cpu --size toy --folders ERTACache4FLUX --out runs/gpu-toy

| part | content |
|---|---|
| parity | each demo uncached, float32 and bfloat16: model folder's loop against stock pipeline, CUDA against CPU |
| plans | the shipped plans nearest to 2×, of each kind, in loop and pipeline; their error and the predicted one |
| calibration | plans of each kind, calibrated on the device on two prompts |
| history | bytes that a budget plan keeps between steps, in sizes of the latents, and peak memory beside uncached |
| offload | model, sequential, group (leaf with streams, block): the latents of the same plan without |
| quantised | int8 weights by torchao |
| parallel | ring and Ulysses attention on two devices |
| latency, MODEL | as bench/latency.py, random weights at full size: uncached, plans, other caches, at T/2 steps |
| offload, MODEL | seconds and peak memory of a plan on the same, by way to offload |
| compile, MODEL | the latency with compiled blocks |
| compile | the FLUX demo compiled by inductor, and with CUDA graphs |

Each part has a budget of seconds; one that does not fit into what is left of --seconds is skipped, one that exceeds its
budget is cut off, and both are said. After each row the JSON is written, after each part a line to the log; the same
command goes on with the parts that are missing. Distances are root mean squares over that of the uncached latents.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import contextlib
import json
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

import latency as bench_latency
from ertacache.cli.arguments import ArgumentParser
from ertacache.demos.model_folder import load_model_folder
from ertacache.demos.random_models import MODELS
from ertacache.evaluation.latency import Latency, describe, release_memory
from ertacache.utils.devices import checked_device, default_device
from ertacache.utils.errors import UserError, run_program
from ertacache.utils.files import ensure_writable, of_earlier_run, write_atomically
from ertacache.utils.provenance import library_versions, machine
from parts import gpu_parts

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"ERTACache4FLUX": 12, "ERTACache4Wan2.1": 4, "ERTACache4CogVideoX-2B": 6, "ERTACache4OpenSora1.2": 8}
PLAIN = (["baseline", "budget", "threshold", "threshold-blocks"], ["teacache"], ["first-block"])
COMPILED = (["baseline", "budget", "threshold", "threshold-blocks"], ["teacache"])
LEAST = 5  # seconds: a part that has fewer left is not begun


def random_model(folder: str, args: Namespace) -> tuple[Any, Callable, dict]:
    """Return a model folder, a function that makes its pipeline with random weights, and the settings of a run."""
    words = ["--size", "small" if args.size == "toy" else "full", "--device", args.device]
    options, sampler = bench_latency.parse_arguments(words), load_model_folder(ROOT / folder)
    settings = {**getattr(MODELS[folder], options.size).settings, "steps": STEPS[folder]}
    return sampler, partial(bench_latency.open_pipeline, sampler, options), settings


def latency_rows(folder: str, args: Namespace, groups: tuple[list[str], ...], backend: str | None) -> Iterator[dict]:
    """Yield the rows of bench/latency.py for one model. groups: of methods; a cut-off loses one group."""
    sampler, new_pipeline, settings = random_model(folder, args)
    pipe = new_pipeline()
    latency = Latency(sampler, pipe, sampler.settings_of(pipe, **settings), repeats=1)
    for methods in groups:
        yield from ({"folder": folder, **row} for row in latency.rows(methods, backend))


def offload_rows(folder: str, args: Namespace) -> Iterator[dict]:
    """Yield the rows of gpu_parts.offload_full for one model, at T = 4: moving weights is what takes the time."""
    sampler, new_pipeline, settings = random_model(folder, args)
    yield from gpu_parts.offload_full(new_pipeline, sampler, args.device, {**settings, "steps": 4})


def parts_of(args: Namespace) -> dict[str, tuple[int, Callable[[], Iterator[dict]]]]:
    """Return the parts in their order: (budget in seconds, rows()) by name."""
    demos = [load_model_folder(ROOT / folder) for folder in args.folders]
    few = {"steps": 4 if args.size == "toy" else 10}  # also run on the CPU, which is slow in bfloat16
    parts = {
        "parity": (60, lambda: gpu_parts.parity(demos, args.device, **few)),
        "plans": (60, lambda: gpu_parts.plans(demos, args.device)),
        "calibration": (60, lambda: gpu_parts.calibration(demos, args.device, **few)),
        "history": (20, lambda: gpu_parts.history(demos, args.device)),
        "offload": (30, lambda: gpu_parts.offload(args.device)),
        "quantised": (20, lambda: gpu_parts.quantised(args.device)),
        "parallel": (40, lambda: gpu_parts.parallel(args.device)),
    }
    for folder in args.folders:
        parts[f"latency, {folder}"] = (60, partial(latency_rows, folder, args, PLAIN, None))
    parts[f"offload, {args.folders[0]}"] = (60, partial(offload_rows, args.folders[0], args))
    if args.device != "cpu":  # where it takes minutes
        exact = partial(gpu_parts.calibration, demos, args.device, ["exact target"], **few)
        parts["calibration, exact target"] = (60, exact)
    parts["compile"] = (60, lambda: gpu_parts.compiled(args.device, args.backend))
    for folder in args.folders:
        parts[f"compile, {folder}"] = (60, partial(latency_rows, folder, args, COMPILED, args.backend))
    return parts


class Cut(BaseException):
    """A part has used its budget. No Exception, so that nothing but the runner takes it for an error of its own."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Cut in the block after so many seconds."""

    def cut(*_):
        raise Cut

    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Day:
    """The parts, one after the other, and the file of their rows.

    Args:
        args: Of the command line.
    """

    def __init__(self, args: Namespace):
        self.args, self.file, self.log = args, args.out / "gpu-day.json", args.out / "gpu-day.log"
        self.start = time.monotonic()
        self.parts = of_earlier_run(self.file, lambda found: found["parts"], {})

    def run(self) -> None:
        """Run the parts that are missing, or those of --only."""
        for name, (budget, rows) in parts_of(self.args).items():
            if self.args.only and name.split(",")[0] not in self.args.only:
                continue
            if not self.args.only and self.parts.get(name, {}).get("state") == "done":
                continue
            left = self.args.seconds - (time.monotonic() - self.start)
            if left < LEAST:
                self.end(name, "skipped", f"{left:.0f} s are left")
            else:
                self.run_part(name, min(budget * self.args.patience, left), rows)
            release_memory()

    def run_part(self, name: str, seconds: float, rows: Callable[[], Iterator[dict]]) -> None:
        start, self.parts[name] = time.monotonic(), {"state": "begun", "rows": []}
        state, reason = "done", ""
        try:
            with limited(seconds):
                for row in rows():
                    self.parts[name]["rows"].append(row)
                    self.write()
        except Cut:
            state, reason = "cut off", f"after {seconds:.0f} s"
        except Exception as error:  # of torch, its compiler and drivers: the other parts go on
            state, reason = "failed", describe(error)
        self.parts[name]["seconds"] = round(time.monotonic() - start, 1)
        self.end(name, state, reason)

    def end(self, name: str, state: str, reason: str) -> None:
        """Write how a part has ended, to the JSON and to the log."""
        part = self.parts.setdefault(name, {"rows": []})
        part |= {"state": state, "reason": reason}
        line = f"{name}: {' '.join(filter(None, (state, reason)))}, {len(part['rows'])} rows"
        with self.log.open("a") as log:
            for text in (line, *(f"  {json.dumps(row, default=str, ensure_ascii=False)}" for row in part["rows"])):
                log.write(f"{text}\n")
        print(line, file=sys.stderr)
        self.write()

    def write(self) -> None:
        about = {"machine": machine(), "devices": torch.cuda.device_count(), "cuda": torch.version.cuda}
        about |= {"device": self.args.device, "size": self.args.size, "libraries": library_versions()}
        about |= {"date": date.today().isoformat(), "parts": self.parts}
        write_atomically(self.file, (json.dumps(about, indent=1, default=str, ensure_ascii=False) + "\n").encode())


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", default=default_device(), help="cuda or cpu (default: a GPU when there is one)")
    add("--size", choices=("full", "toy"), default="full", help="of the models with random weights (default: full)")
    add("--folders", default=",".join(MODELS), metavar="F,F,…", help="model folders (default: all four)")
    add("--only", default="", metavar="PART,…", help="run these parts, also those that are done")
    add("--seconds", type=float, default=520, help="for all parts together (default: 520)")
    add("--patience", type=float, default=1, metavar="F", help="multiplies the budgets of the parts (default: 1)")
    add("--backend", default="inductor", help="of torch.compile (default: inductor)")
    text = "for gpu-day.json and gpu-day.log (default: runs/gpu-day)"
    add("--out", type=Path, default=ROOT / "runs" / "gpu-day", help=text)
    args = parser.parse_args(arguments)
    args.folders = [name.strip("/") for name in args.folders.split(",")]
    unknown = [name for name in args.folders if name not in MODELS]
    if unknown:
        raise UserError(f"--folders {','.join(unknown)}: choose from {', '.join(MODELS)}")
    if checked_device(args.device).type == "cpu" and args.size == "full":
        raise UserError("--size full needs a GPU: use --size toy, which any machine can run")
    args.only = [name for name in args.only.split(",") if name]
    known = dict.fromkeys(name.split(",")[0] for name in parts_of(args))
    unknown = [name for name in args.only if name not in known]
    if unknown:
        raise UserError(f"--only {','.join(unknown)}: choose from {', '.join(known)}")
    args.out = ensure_writable(args.out)
    return args


def main():
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    day = Day(parse_arguments())
    day.run()
    rows = [row for part in day.parts.values() for row in part["rows"] if "method" in row]
    if rows:
        print(bench_latency.table(rows))
    print(day.file)


if __name__ == "__main__":
    run_program(main)
