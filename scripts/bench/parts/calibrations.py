"""Calibrations that are killed, run beside another one, or find no room on the disk."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ertacache import Plan
from ertacache.cli.inspect import as_values
from parts.flux_demo import FOLDER, PROMPTS, ROOT

SCRIPT = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "scripts" / "bench")!r})
from parts.flux_demo import CALL, PROMPTS, pipeline
import ertacache
torch.set_num_threads(1)
plans = ertacache.calibrate(pipeline(), PROMPTS, [2, 3], batch_size=2, work="work", effort="quick",
                            **{{**CALL, "num_inference_steps": 8}})
for speedup, plan in plans.items():
    plan.save(f"plans/{{speedup}}.json")
"""
Fault = tuple  # where it was, and what


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


@dataclass
class Way:
    """One of the ways to calibrate, and what comes of it undisturbed.

    Attributes:
        name: Of the way.
        command: That calibrates.
        plans: The files that it leaves, by name.
        seconds: That it takes.
    """

    name: str
    command: list[str]
    plans: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    def start(self, folder: Path, before: Callable[[], None] | None = None) -> subprocess.Popen:
        """Start it in a folder. before: called in its process first."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "common")}
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "preexec_fn": before}
        return subprocess.Popen(self.command, cwd=folder, env=environment, **options)

    def check_end(self, process: subprocess.Popen, folder: Path) -> None:
        """Wait for its end. Raises AssertionError: a failure, other plans, or a file left over."""
        _, said = process.communicate(timeout=600)
        if process.returncode:
            raise AssertionError(f"exit code {process.returncode}: {last_line(said)}")
        found = plan_files(folder)
        if found != self.plans:
            raise AssertionError(f"other plans: {[name for name in self.plans if found.get(name) != self.plans[name]]}")
        expected = {"prompts.txt", *(f"plans/{name}" for name in self.plans)}
        expected |= {str(Path("plans", name).with_suffix(".safetensors")) for name in self.plans}
        left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        left = [name for name in left if name not in expected]
        if left:
            raise AssertionError(f"left over: {left[:3]}")

    def check_again(self, folder: Path) -> None:
        """Repeat it, undisturbed, where it was broken off."""
        if self.name == "ertacache calibrate" and plan_files(folder) == self.plans:
            return  # it had come to its end, and would say that the plans are there
        self.check_end(self.start(folder), folder)


def undisturbed(root: Path) -> list[Way]:
    """Return the ways, each having run once."""
    found = []
    for name, command in ways().items():
        way, folder, start = Way(name, command), prepared(root / name.replace("/", "-")), time.monotonic()
        process = way.start(folder)
        _, said = process.communicate(timeout=600)
        assert not process.returncode, said
        way.plans, way.seconds = plan_files(folder), time.monotonic() - start
        found.append(way)
    return found


def last_line(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1]


def plan_files(folder: Path) -> dict[str, bytes]:
    """Return the plans of a folder; the date of the calibration does not count."""
    plans = {}
    for path in sorted((folder / "plans").glob("*.json")):
        plan = Plan.load(path)
        plans[path.name] = json.dumps({**as_values(plan), "provenance": {**plan.provenance, "date": ""}}).encode()
    return plans


def prepared(folder: Path) -> Path:
    """Return an empty folder to calibrate in."""
    (folder / "plans").mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


# --- the parts -----------------------------------------------------------------------------------------------------


def kills(count: int, seed: int) -> tuple[str, list[Fault]]:
    """Kill calibrations at random moments; return the line of the table, and the faults."""
    rng, faults, done, campaign = random.Random(seed), [], 0, 0
    with tempfile.TemporaryDirectory() as root:
        found = undisturbed(Path(root))
        while done < count:
            way, folder = found[campaign % len(found)], prepared(Path(root) / f"campaign-{campaign}")
            number = 2 if campaign % 4 == 3 else 1
            for _ in range(rng.choice([1, 2, 4])):
                processes = [way.start(folder) for _ in range(number)]
                time.sleep(rng.uniform(0.3, 1.0) * way.seconds * number)
                for process in processes:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    process.stderr.close()
                    done += 1
            try:
                way.check_again(folder)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                faults.append((campaign, way.name, str(error)))
            campaign += 1
            shutil.rmtree(folder)
    return f"{done} kills in {campaign} calibrations, {campaign // 4} of them with two processes", faults


def together(count: int, seed: int) -> tuple[str, list[Fault]]:
    """Make the same calibration twice at once; return the line of the table, and the faults."""
    rng, faults, waited = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as root:
        found = undisturbed(Path(root))
        for number in range(count):
            way, folder = found[number % len(found)], prepared(Path(root) / f"{number}")
            first = way.start(folder)
            time.sleep(rng.uniform(0, 0.6) * way.seconds)
            second = way.start(folder)
            said = [process.communicate(timeout=600)[1] for process in (first, second)]
            waited += any("waiting for it" in text for text in said)
            for process, text in zip((first, second), said, strict=True):
                if process.returncode and not is_refusal(text):
                    faults.append((number, way.name, f"exit code {process.returncode}: {last_line(text)[:120]}"))
            try:
                if first.returncode and second.returncode:
                    raise AssertionError("neither came to its end")
                way.check_end(first if not first.returncode else second, folder)
            except AssertionError as error:
                faults.append((number, way.name, str(error)))
            shutil.rmtree(folder)
    return f"{count} pairs of calibrations, in {waited} of which one waited", faults


def is_refusal(said: str) -> bool:
    """Return whether a command ended in one line; a script of one's own shows the error's type."""
    return last_line(said).startswith("error: ") or "UserError: " in last_line(said)


@contextlib.contextmanager
def file_system(folder: Path, size: str) -> Iterator[bool]:
    """Mount a file system of its own on a new folder; yields whether this process may."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    may = shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode
    try:
        yield may
    finally:
        if may:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def limit_files(size: int) -> Callable[[], None]:
    """Return a function after which the process cannot write files of more bytes."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def disk(count: int, seed: int) -> tuple[str, list[Fault]]:
    """Calibrate where there is no room or no folder, then where there is; return the line of the table, and faults."""
    rng, faults, tried = random.Random(seed), [], Counter()
    kinds = ("full disk", "read-only disk", "file limit", "a file in the way", "folder vanishes")
    with tempfile.TemporaryDirectory() as root:
        found = undisturbed(Path(root))
        for number in range(count):
            way, kind, mounted = rng.choice(found), kinds[number % len(kinds)], Path(root) / f"{number}"
            with file_system(mounted, f"{rng.choice([16, 64, 128])}k" if kind == "full disk" else "16m") as may:
                if not may and kind.endswith("disk"):
                    tried[f"{kind}: not tried, mounting needs root"] = 1
                    continue
                folder, before = prepared(mounted / "room"), None
                work, plans = folder / "work", folder / "plans"
                if kind == "read-only disk":
                    remount(mounted, "ro")
                if kind == "file limit":
                    before = limit_files(rng.choice([1, 4, 16, 64]) * 1024)
                if kind == "a file in the way":
                    plans.rmdir()
                    plans.write_text("a file where the folder should be")
                    work.write_text("the same")
                process = way.start(folder, before)
                if kind == "folder vanishes":
                    time.sleep(rng.uniform(0.2, 0.9) * way.seconds)
                    for path in (work, plans):
                        shutil.rmtree(path, ignore_errors=True)
                said = process.communicate(timeout=600)[1]
                tried[kind] += 1
                if process.returncode and not is_refusal(said):
                    faults.append((number, kind, way.name, last_line(said)[:120]))
                if not process.returncode and kind in ("read-only disk", "a file in the way"):
                    faults.append((number, kind, way.name, "no error"))
                if kind.endswith("disk"):
                    remount(mounted, "rw,size=16m")
                if kind == "a file in the way":
                    plans.unlink()
                    work.unlink()
                plans.mkdir(exist_ok=True)
                try:
                    way.check_again(folder)
                except AssertionError as error:
                    faults.append((number, kind, way.name, f"then: {error}"))
    outcomes = ", ".join(f"{kind} {number}" for kind, number in sorted(tried.items()))
    return f"{sum(tried.values())} calibrations, and again with room ({outcomes})", faults
