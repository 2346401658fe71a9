"""A campaign against plans, calibrations and runs: what breaks, and whether it breaks well.

    .venv/bin/python scripts/bench/reliability.py                                    # all parts, as in the docs
    .venv/bin/python scripts/bench/reliability.py mutants --count 500 --seed 7
    .venv/bin/python scripts/bench/reliability.py kills --count 10

- mutants: files of shipped plans are changed: bytes; types, depth and sizes of fields; shapes, dtypes and values of
  arrays; most with a valid checksum. Each is loaded, inspected, made a card of, enabled, and every third one followed.
  Expected: refused in one line, or followed to finite latents; no other exception, no stage before the run over 2 s of
  CPU time, no memory over 300 MiB.
- kills: a calibration, by each of three ways, alone or with another process at the same work, is killed (SIGKILL) at
  random moments, then repeated to its end. Expected: the plans of an undisturbed calibration, bit for bit, and no file
  left over.
- soak: generations with plans switched at random, exceptions and interrupts in callbacks, wrong numbers of steps.
  Expected: every result equal to that of a fresh pipeline, and no growth of memory, threads or descriptors.
- disk: files that cannot grow, as on a full disk; a file where the folder should be; a folder that vanishes. Expected:
  one line, and no half-written plan.

Each part prints a line of the table. The figures are in common/docs/results/reliability.md.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts

import contextlib
import gc
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.numpy import load_file, save

import ertacache
from ertacache import Plan, UserError
from ertacache.cli.arguments import ArgumentParser, check_counts
from ertacache.cli.inspect import as_values, drawn
from ertacache.evaluation.table import facts
from ertacache.utils.checks import check_seed
from ertacache.utils.errors import run_program
from ertacache.utils.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ERTACache4FLUX"
SHIPPED = ("demo-30-budget-6", "demo-30-budget-15", "demo-30-budget-10-exact", "demo-30-0.17", "demo-30-0.1-blocks")
CALL = {"num_inference_steps": 30, "height": 64, "width": 64, "guidance_scale": 3.5, "max_sequence_length": 16}
SLOW, LARGE = 2.0, 300.0  # seconds of a stage, MiB that it may add


def pipeline():
    """Return the FLUX demo in a stock pipeline."""
    from diffusers import FluxPipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipe = FluxPipeline.from_pretrained(FOLDER / "demo", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, prompt: str = "a rocket", seed: int = 0, **changes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="latent", **{**CALL, **changes}).images


# --- mutants -------------------------------------------------------------------------------------------------------

ODD = [  # values for any field
    *(None, True, -1, 0, 1, 2**31, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "x", "\x1b[31m\n", "\ud800"),
    *([], {}, [[]], {"a": {"b": []}}, ["1", 2], [0, 0], [3, 1], "../../x", "a" * 5000, list(range(3000))),
    {"__import__('os')": 1, 'x")\nimport os #': 2, "<script>": "](javascript:0)"},
]


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def mutated_field(rng: random.Random, fields: dict) -> None:
    """Change, remove, add or rename something in the fields, at any depth."""
    whole = fields
    while True:
        key = rng.choice(list(whole)) if isinstance(whole, dict) else rng.randrange(len(whole))
        part = whole[key]
        if not (isinstance(part, dict | list) and part) or rng.random() < 0.5:
            break
        whole = part
    kind = rng.randrange(6)
    if kind == 0:
        del whole[key]
    elif kind == 1 and isinstance(whole, dict):
        whole[rng.choice(["extra", key + "s", "\x07"])] = whole[key]
    elif kind == 2 and isinstance(whole[key], int | float) and abs(whole[key]) < 10**300:
        whole[key] = rng.choice([whole[key] + 1, -whole[key], whole[key] * 1e30, float(whole[key]), str(whole[key])])
    elif kind == 3 and isinstance(whole[key], list) and whole[key]:
        place = rng.randrange(len(whole[key]))
        whole[key][place] = rng.choice([*ODD, whole[key][place - 1]])
    elif kind == 4:
        whole[key] = nested(rng.choice([3, 13, 500]))
    else:
        whole[key] = rng.choice(ODD)


def mutated_array(rng: random.Random, arrays: dict[str, np.ndarray]) -> None:
    """Change shape, dtype, size or values of an array, or remove or add one."""
    name = rng.choice(list(arrays))
    array, kind = arrays[name], rng.randrange(9)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[rng.choice(["extra", "predictor", "sigmas", "k", "start_weights"])] = array
    elif kind == 2:
        arrays[name] = array.astype(rng.choice(["float32", "float16", "int64", "bool", "complex64", "uint8"]))
    elif kind == 3:
        arrays[name] = array.reshape(rng.choice([(-1,), (1, -1), (-1, 1), (1, 1, -1)]))
    elif kind == 4:
        arrays[name] = np.zeros(rng.choice([(0,), (0, 5), (3 * 10**8, 0), (10**6, 0), (1, 1, 1, 1), (2000,)]))
    elif kind == 5:
        arrays[name] = array[: max(0, len(array) - rng.choice([1, 2]))] if array.ndim else array
    elif kind == 6 and array.size and array.dtype == np.float64:
        flat = array.copy().ravel()
        flat[rng.randrange(flat.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e300, 1e5, 1e3, -1.0, 0.0, 1e-300])
        arrays[name] = flat.reshape(array.shape)
    elif kind == 7:
        arrays[name] = array.astype(np.float64) * rng.choice([0.0, -1.0, 1e3, 1e10, 1e-10, np.nan])
    else:
        arrays[name] = np.sort(array, axis=None).reshape(array.shape)


def written(rng: random.Random, name: str, folder: Path) -> Path:
    """Write a mutant of a shipped plan and return its path."""
    path, arrays_path = folder / "plan.json", folder / "plan.safetensors"
    text, tensors = ((FOLDER / "cache" / f"{name}.{end}").read_bytes() for end in ("json", "safetensors"))
    kind = rng.randrange(10)
    if kind == 0:  # bytes of one of the two files
        pair = [text, tensors]
        which = rng.randrange(2)
        pair[which] = mutated_bytes(rng, pair[which])
        path.write_bytes(pair[0])
        arrays_path.write_bytes(pair[1])
        return path
    fields, arrays = json.loads(text), load_file(FOLDER / "cache" / f"{name}.safetensors")
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if rng.random() < 0.6 and fields:
            mutated_field(rng, fields)
        elif arrays:
            mutated_array(rng, arrays)
    tensors = save({key: np.ascontiguousarray(array) for key, array in arrays.items()})
    if kind == 1:  # the header of the arrays' file
        size = struct.unpack("<Q", tensors[:8])[0]
        header = json.loads(tensors[8 : 8 + size])
        if header:
            shapes = [[3 * 10**8, 0], [0], [2**40], [-1], [1, 2, 3], "x"]
            header[rng.choice(list(header))]["shape"] = rng.choice(shapes)
        words = json.dumps(header).encode()
        tensors = struct.pack("<Q", rng.choice([len(words), len(words), 2**40])) + words + tensors[8 + size :]
    fields.pop("checksum", None)
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode(errors="surrogatepass") + tensors).hexdigest()
    path.write_text(json.dumps({**fields, "checksum": digest}), "utf-8")
    arrays_path.write_bytes(tensors)
    return path


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3, 20])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.3 else changed)


def check_text(text: str) -> str | None:
    """Return what is wrong with what is shown of a plan."""
    lines = text.splitlines()
    steering = [c for line in lines for c in line if not c.isprintable()]
    return f"control character {steering[0]!r}" if steering else None


def stages(pipe, path: Path, runs: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what is done with a plan's file, in order; a later stage needs the earlier ones."""
    found = {}

    def load():
        found["plan"] = Plan.load(path)

    def inspect():
        console = Console(file=io.StringIO(), width=100, highlight=False)
        console.print(drawn(found["plan"], 100))
        json.dumps(as_values(found["plan"]))
        problem = check_text(console.file.getvalue())
        assert problem is None, problem

    def card():
        text = str(found["plan"].generate_model_card(repo_id="someone/plan"))
        body = text.split("---\n", 2)[2]
        assert "<script" not in body.split("```")[0] and check_text(body) is None
        compile(body.split("```python\n")[1].split("```")[0], "card", "exec")

    def enable():
        ertacache.enable(pipe, found["plan"])

    def run():
        if not latents(pipe).isfinite().all():
            raise AssertionError("latents that are not finite")

    yield "load", load
    yield "inspect", inspect
    yield "card", card
    yield "enable", enable
    if runs:
        yield "run", run


def mutants(count: int, seed: int) -> tuple[str, int]:
    """Try mutants; return the line of the table."""
    rng, pipe = random.Random(seed), pipeline()
    outcomes, faults = Counter(), []
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    for _, do in stages(pipe, FOLDER / "cache" / f"{SHIPPED[0]}.json", runs=True):
        do()  # what is imported at the first use is no plan's doing
    slowest, largest = (0.0, "", 0), 0.0
    for number in range(count):
        path = written(rng, SHIPPED[number % len(SHIPPED)], folder)
        last = "followed"
        for stage, do in stages(pipe, path, runs=number % 3 == 0):
            memory, start = peak_memory(), time.process_time()
            try:
                do()
            except UserError as error:
                last = f"refused at {stage}"
                text = str(error)
                if len(text.splitlines()) != 1 or check_text(text) or len(text) > 1100:
                    faults.append((number, stage, f"message: {text[:80]!r}"))
            except Exception as error:
                last = "fault"
                faults.append((number, stage, f"{type(error).__name__}: {str(error)[:80]!r}"))
            seconds = time.process_time() - start
            if stage != "run" and seconds > slowest[0]:  # a run takes what it takes
                slowest = seconds, stage, number
            largest = max(largest, peak_memory() - memory)
            if last != "followed":
                break
        ertacache.disable(pipe)
        outcomes[last] += 1
    shutil.rmtree(folder)
    for fault in faults[:20]:
        print("fault:", *fault, file=sys.stderr)
    if slowest[0] > SLOW or largest > LARGE:
        faults.append((slowest[2], slowest[1], f"{slowest[0]:.1f} s, {largest:.0f} MiB"))
        print("fault:", *faults[-1], file=sys.stderr)
    kinds = ", ".join(f"{name} {number}" for name, number in sorted(outcomes.items()))
    return f"{count} ({kinds}); slowest stage {slowest[0]:.1f} s, largest {largest:.0f} MiB", len(faults)


def peak_memory() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- kills ---------------------------------------------------------------------------------------------------------

PROMPTS = ["a red apple", "a rocket", "a sailing boat", "a fruit"]
SCRIPT = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from reliability import CALL, PROMPTS, pipeline
import ertacache
torch.set_num_threads(1)
plans = ertacache.calibrate(pipeline(), PROMPTS, [2, 3], batch_size=2, work="work", effort="quick",
                            **{{**CALL, "num_inference_steps": 8}})
for speedup, plan in plans.items():
    plan.save(f"plans/{{speedup}}.json")
"""


def ways() -> dict[str, list[str]]:
    """Return the commands that calibrate, by name; they write into plans/ of the current folder."""
    python, flags = sys.executable, ["--steps", "8", "--batch-size", "2", "--effort", "quick"]
    call = ["--height", "64", "--width", "64", "--guidance", "3.5", "--set", "max_sequence_length=16"]
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    command = [python, "-m", "ertacache", "calibrate", str(FOLDER / "demo"), *prompts, *flags, *call]
    script = [python, str(ROOT / "scripts/calibrate.py"), str(FOLDER), *flags, "--calibration-prompts", "prompts.txt"]
    return {
        "ertacache.calibrate": [python, "-c", SCRIPT],
        "ertacache calibrate": [*command, "--speedups", "2,3", "--out", "plans"],
        "scripts/calibrate.py": [*script, "--speedups", "2,3", "--thresholds", "0.2", "--out", "plans"],
    }


def started(command: list[str], folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "common")}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **options)


def ended(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=600)
    if process.returncode:
        raise AssertionError(f"exit code {process.returncode}: {said.strip().splitlines()[-1:]}")


def plan_files(folder: Path) -> dict[str, bytes]:
    """Return the plans of a folder; the date of the calibration does not count."""
    plans = {}
    for path in sorted((folder / "plans").glob("*.json")):
        plan = Plan.load(path)
        plans[path.name] = json.dumps({**as_values(plan), "provenance": {**plan.provenance, "date": ""}}).encode()
    return plans


def kills(count: int, seed: int) -> tuple[str, int]:
    """Kill calibrations at random moments; return the line of the table."""
    rng, faults, done = random.Random(seed), [], 0
    commands = ways()
    references, seconds = {}, {}
    with tempfile.TemporaryDirectory() as root:
        for name, command in commands.items():
            folder = prepared(Path(root) / "reference" / name.replace("/", "-"))
            start = time.monotonic()
            ended(started(command, folder))
            references[name], seconds[name] = plan_files(folder), time.monotonic() - start
        campaign = 0
        while done < count:
            name = list(commands)[campaign % len(commands)]
            folder = prepared(Path(root) / f"campaign-{campaign}")
            together = campaign % 4 == 3
            for _ in range(rng.choice([1, 2, 4])):
                processes = [started(commands[name], folder) for _ in range(2 if together else 1)]
                time.sleep(rng.uniform(0.3, 1.0) * seconds[name] * (2 if together else 1))
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    process.stderr.close()
                    done += 1
            try:
                if name == "ertacache calibrate" and plan_files(folder) == references[name]:
                    continue  # it was killed after its end, and would say that the plans are there
                ended(started(commands[name], folder))
                problem = differences(folder, references[name])
                if problem:
                    raise AssertionError(problem)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                faults.append((campaign, name, str(error)))
            finally:
                campaign += 1
                shutil.rmtree(folder)
    for fault in faults[:20]:
        print("fault:", *fault, file=sys.stderr)
    return f"{done} kills in {campaign} calibrations", len(faults)


def prepared(folder: Path) -> Path:
    """Return an empty folder to calibrate in."""
    (folder / "plans").mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def differences(folder: Path, reference: dict[str, bytes]) -> str | None:
    """Return what is wrong after a calibration's end: another plan, or a file left over."""
    found = plan_files(folder)
    if found != reference:
        return f"other plans: {[name for name in reference if found.get(name) != reference[name]]}"
    expected = {"prompts.txt", *(f"plans/{name}" for name in reference)}
    expected |= {str(Path("plans", name).with_suffix(".safetensors")) for name in reference}
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    left = [name for name in left if name not in expected]
    return f"left over: {left[:3]}" if left else None


# --- soak ----------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def soak(count: int, seed: int) -> tuple[str, int]:
    """Generate with plans switched at random, and disturbances; return the line of the table."""
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
    for fault in faults[:20]:
        print("fault:", *fault, file=sys.stderr)
    kinds = ", ".join(f"{name} {number}" for name, number in sorted(disturbed.items()))
    growth = ", ".join(f"{name} {before[name]} → {after[name]}" for name in after) if before else ""
    return f"{count} generations ({kinds}); {growth}", len(faults)


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


# --- disk ----------------------------------------------------------------------------------------------------------


def disk(count: int, seed: int) -> tuple[str, int]:
    """Calibrate where the disk is full, read-only or vanishes; return the line of the table."""
    rng, faults, tried = random.Random(seed), [], Counter()
    commands = ways()
    with tempfile.TemporaryDirectory() as root:
        folder = prepared(Path(root) / "reference")
        ended(started(commands["ertacache calibrate"], folder))
        reference = plan_files(folder)
        for number in range(count):
            name = rng.choice(list(commands))
            kind = ("full", "read-only", "vanishes")[number % 3]
            folder = prepared(Path(root) / f"{number}")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "common")}
            limit = rng.choice([1, 4, 16, 64]) * 1024 if kind == "full" else None

            def before(limit=limit):
                if limit is not None:  # files beyond this size fail, as on a full disk
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            if kind == "read-only":
                shutil.rmtree(folder / "plans")
                (folder / "plans").write_text("a file where the folder should be")
                (folder / "work").write_text("the same")
            options = {"cwd": folder, "env": environment, "stderr": subprocess.PIPE, "text": True, "preexec_fn": before}
            process = subprocess.Popen(commands[name], stdout=subprocess.DEVNULL, **options)
            if kind == "vanishes":
                time.sleep(rng.uniform(3, 9))
                for work in [*folder.glob("work"), *folder.glob("plans")]:
                    shutil.rmtree(work, ignore_errors=True)
            _, said = process.communicate(timeout=600)
            tried[kind] += 1
            last = (said.strip().splitlines() or [""])[-1]
            is_line = last.startswith("error: ") or "UserError: " in last  # a script of one's own shows the type
            if process.returncode and not is_line:
                faults.append((number, kind, name, last[:120]))
            if not process.returncode and kind == "read-only":
                faults.append((number, kind, name, "no error"))
            for path in folder.glob("plans/*.json") if (folder / "plans").is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    Plan.load(path)
            shutil.rmtree(folder)
    assert reference
    for fault in faults[:20]:
        print("fault:", *fault, file=sys.stderr)
    kinds = ", ".join(f"{name} {number}" for name, number in sorted(tried.items()))
    return f"{sum(tried.values())} calibrations ({kinds})", len(faults)


def run_parts(description: str, parts: Mapping[str, tuple[Callable[[int, int], tuple[str, int]], int]]) -> None:
    """Run the parts of a campaign that the command line names, and print their table; exit code 1 after a fault.

    Args:
        description: Of the program.
        parts: By name, part(count, seed) → (what was tried, faults), and the count by default.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--count", type=int, help="of what a part tries")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_counts(args, "count")
    check_seed(args.seed)
    unknown = [name for name in args.parts if name not in parts]
    if unknown:
        raise UserError(f"{unknown[0]}: choose from {', '.join(parts)}")
    lines, wrong = [], 0
    for name in args.parts or parts:
        part, count = parts[name]
        start = time.monotonic()
        text, faults = part(args.count or count, args.seed)
        wrong += faults
        lines.append([name, text, faults, f"{(time.monotonic() - start) / 60:.0f}"])
        print(f"{name}: {text}; {faults} faults", file=sys.stderr, flush=True)
    print(f"{markdown(['part', 'tried', 'faults', 'minutes'], lines)}\n\n{facts(f'seed {args.seed}')}")
    sys.exit(1 if wrong else 0)


def main() -> None:
    parts = {"mutants": (mutants, 10_000), "kills": (kills, 100), "soak": (soak, 1_000), "disk": (disk, 30)}
    run_parts(__doc__, parts)


if __name__ == "__main__":
    run_program(main)
