"""Changed files of shipped plans, and what each of them must lead to."""

import hashlib
import io
import json
import random
import resource
import shutil
import struct
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file, save

import ertacache
from ertacache import Plan, UserError
from ertacache.cli.inspect import as_values, drawn
from parts.campaign import steering
from parts.flux_demo import FOLDER, SHIPPED, latents, pipeline

SLOW, LARGE = 2.0, 300.0  # seconds of a stage, MiB that it may add
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


def stages(pipe, path: Path, runs: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what is done with a plan's file, in order; a later stage needs the earlier ones."""
    found = {}

    def load():
        found["plan"] = Plan.load(path)

    def inspect():
        console = Console(file=io.StringIO(), width=100, highlight=False)
        console.print(drawn(found["plan"], 100))
        json.dumps(as_values(found["plan"]))
        problem = steering(console.file.getvalue())
        assert problem is None, problem

    def card():
        text = str(found["plan"].generate_model_card(repo_id="someone/plan"))
        body = text.split("---\n", 2)[2]
        assert "<script" not in body.split("```")[0] and steering(body) is None
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


def mutants(count: int, seed: int) -> tuple[str, list[tuple]]:
    """Try mutants; return the line of the table, and the faults."""
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
                if len(text.splitlines()) != 1 or steering(text) or len(text) > 1100:
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
    if slowest[0] > SLOW or largest > LARGE:
        faults.append((slowest[2], slowest[1], f"{slowest[0]:.1f} s, {largest:.0f} MiB"))
    kinds = ", ".join(f"{name} {number}" for name, number in sorted(outcomes.items()))
    return f"{count} ({kinds}); slowest stage {slowest[0]:.1f} s, largest {largest:.0f} MiB", faults


def peak_memory() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
