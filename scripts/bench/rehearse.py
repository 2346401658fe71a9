"""What a user does with a real checkpoint, rehearsed on one with random weights: seconds, memory, disk, exit codes.

    .venv/bin/python scripts/bench/rehearse.py ERTACache4OpenSora1.2
    .venv/bin/python scripts/bench/rehearse.py ERTACache4FLUX --size toy --only checkpoint,speedup,generate

`parts/published.py` writes the checkpoint in the published layout: at the published sizes (`full`), or tiny (`toy`).
Every further step is a process of its own, at the smallest size that the model takes and few steps: run.sh by λ and by
speed-up, interrupted and resumed; `ertacache calibrate`, `generate` and `evaluate`; `ertacache.accelerate`; offload;
the paper's tables. Steps that are done are not repeated; --only STEP,… repeats those that it names. A step passes if
its exit code is the expected one and no traceback is in what it prints (logs/STEP.log). The results are in
rehearsal.json and rehearsal.md of the work folder; CPU seconds depend less than seconds on what else the machine does.
Weights are random, so nothing here says anything about quality.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from ertacache.cli.arguments import ArgumentParser
from ertacache.plans.names import short_name
from ertacache.utils.errors import UserError, run_program
from ertacache.utils.files import ensure_writable, of_earlier_run, write_atomically
from ertacache.utils.provenance import library_versions, measured_with
from ertacache.utils.tables import markdown
from parts import published

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.05  # seconds between two looks at a process
OPEN_SORA = "ERTACache4OpenSora1.2"
SMALLEST = {  # settings of the smallest run
    "ERTACache4FLUX": {"height": 32, "width": 32},
    "ERTACache4Wan2.1": {"height": 16, "width": 16, "frames": 5},
    "ERTACache4CogVideoX-2B": {"height": 16, "width": 16, "frames": 9},
    OPEN_SORA: {"height": 16, "width": 16, "frames": 17},
}
TABLES = {  # the paper's tables that a model is in
    "ERTACache4FLUX": (2, 3, 4),
    "ERTACache4Wan2.1": (1, 3),
    "ERTACache4CogVideoX-2B": (1,),
    OPEN_SORA: (1, 4),
}
PROMPTS = ("a lighthouse in a storm", "two dogs run along the beach", "an old bicycle by a wall", "a red kite")
LIBRARY = """
import json, sys, torch, ertacache
model, kind, call, prompts, dtype, device, offload = json.loads(sys.argv[1])
if kind == "OpenSoraPipeline":
    from opensora12 import OpenSoraPipeline as Pipeline
else:
    from diffusers import DiffusionPipeline as Pipeline
pipe = Pipeline.from_pretrained(model, dtype=getattr(torch, dtype))
pipe.enable_model_cpu_offload(device=device) if offload else pipe.to(device)
ertacache.accelerate(pipe, speedup=2, prompts=prompts, **call)
pipe(prompts[0], **call)
print(ertacache.summary(pipe))
"""


@dataclass(frozen=True)
class Step:
    """A command of the rehearsal.

    Attributes:
        name, title: Of the step.
        command: Its words.
        environment: In addition to the process's own.
        folder: Where it runs.
        expected: Exit code.
        watched: Folder whose size is observed, the disk that a calibration takes.
        interrupt: Whether it is sent SIGINT once a checkpoint lies in `watched`, which is emptied before.
    """

    name: str
    title: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT
    expected: int = 0
    watched: Path | None = None
    interrupt: bool = False


class Rehearsal:
    """The steps of one model folder.

    Args:
        args: Of the command line.
    """

    def __init__(self, args: Namespace):
        self.args, self.work = args, args.work
        self.checkpoints, self.tree = args.work / "checkpoints", args.work / "tree"
        names = published.WRITERS[args.folder.name][1]
        self.is_opensora = args.folder.name == OPEN_SORA
        self.model = self.checkpoints if self.is_opensora else self.checkpoints / names[0]
        self.pipeline = args.work / "converted" if self.is_opensora else self.model  # in diffusers' format
        self.prompts = args.work / "prompts.txt"
        self.settings = {"steps": args.steps, **SMALLEST[args.folder.name]}
        if args.guidance is not None:
            self.settings["guidance"] = args.guidance

    # --- the steps ---------------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Return the steps, in their order."""
        program = (sys.executable, str(Path(__file__).resolve()))
        options = [str(self.args.folder), "--size", self.args.size, "--work", str(self.work)]
        steps = [Step("checkpoint", "writes the checkpoint", (*program, *options, "--write"))]
        if self.is_opensora:
            words = (sys.executable, "-m", "opensora12.convert", str(self.model), str(self.pipeline))
            steps += [Step("convert", "opensora12.convert", (*words, "--dtype", "bfloat16"), self.opensora_path())]
        steps += [
            self.run_sh("lambda", "run.sh by λ", LAMBDA="0.3"),
            self.run_sh("blocks", "run.sh by λ, site blocks", LAMBDA="0.3", SITE="blocks"),
            self.run_sh("interrupt", "run.sh by speed-up, interrupted", SPEEDUP="2", expected=130, interrupt=True),
            self.run_sh("speedup", "run.sh by speed-up, resumed", SPEEDUP="2"),
            self.run_sh("again", "run.sh by speed-up, plan stored", SPEEDUP="2", COMPARE="no"),
        ]
        on_cpu = self.args.device == "cpu"
        steps += [self.run_sh("offload", "run.sh, OFFLOAD=model", SPEEDUP="2", OFFLOAD="model", expected=2 * on_cpu)]
        return [*steps, *self.of_command_line(), *self.of_library(), *self.of_tables()]

    def run_sh(self, name: str, title: str, expected: int = 0, interrupt: bool = False, **variables) -> Step:
        folder = self.tree / self.args.folder.name
        steps = {"STEPS": str(self.args.steps), "BATCH": "1", "REPEATS": "1", "PROMPT": PROMPTS[0]}
        if self.args.guidance is not None:
            steps["GUIDANCE"] = f"{self.args.guidance:g}"
        environment = {"MODEL": str(self.model), "OUT": str(self.work / "out" / name), **steps, **variables}
        words = [word for flag, value in SMALLEST[folder.name].items() for word in (f"--{flag}", str(value))]
        command = ("sh", "run.sh", "--calibration-prompts", str(self.prompts), *words, *self.loaded())
        return Step(name, title, command, environment, folder, expected, folder / "cache" / "local", interrupt)

    def of_command_line(self) -> list[Step]:
        """Return `ertacache calibrate`, `generate`, `evaluate`; Open-Sora's pipeline is none that they know."""
        out, steps = self.work / "plans", self.args.steps
        plan = out / f"{short_name(self.pipeline)}-{steps // 2}-of-{steps}.json"
        flags = [word for flag, value in self.settings.items() for word in (f"--{flag}", str(value))]
        about = [str(self.pipeline), "--prompts", str(self.prompts), *flags, *self.loaded()]
        images = ["--plan", str(plan), "--out", str(self.work / "out" / "generate"), "--compare"]
        words = {
            "calibrate": ["--out", str(out), "--speedups", "2", "--effort", "quick", "--force"],
            "generate": images,
            "evaluate": ["--plan", str(plan), "--repeats", "1", "--json", str(self.work / "rows.json")],
        }
        expected, start = (2 if self.is_opensora else 0), (sys.executable, "-m", "ertacache")
        more = {"folder": self.work, "expected": expected, "watched": out}
        return [Step(n, f"ertacache {n}", (*start, n, *about, *given), **more) for n, given in words.items()]

    def of_library(self) -> list[Step]:
        """Return `ertacache.accelerate` on the stock pipeline, and on one that is offloaded."""
        names = {"steps": "num_inference_steps", "frames": "num_frames", "guidance": "guidance_scale"}
        call = {names.get(name, name): value for name, value in self.settings.items()}
        kind, home = "OpenSoraPipeline" if self.is_opensora else "", str(self.work / "home")
        steps = []
        for name, title, offload in (
            ("accelerate", "ertacache.accelerate", False),
            ("accelerate-offload", "ertacache.accelerate, model offload", True),
        ):
            about = [str(self.pipeline), kind, call, self.texts(), self.args.dtype, self.args.device, offload]
            environment = {"ERTACACHE_HOME": f"{home}-{name}", **self.opensora_path()}
            command = (sys.executable, "-c", LIBRARY, json.dumps(about))
            watched = Path(environment["ERTACACHE_HOME"])
            steps.append(Step(name, title, command, environment, self.work, watched=watched))
        return steps

    def of_tables(self) -> list[Step]:
        """Return the scripts of the paper's tables, with MODEL=full."""
        environment = {"MODEL": "full", "CHECKPOINTS": str(self.checkpoints), "PROMPTS": str(self.prompts)}
        environment |= {"FOLDERS": self.args.folder.name, "REPEATS": "1"}
        flags = [word for flag, value in self.settings.items() for word in (f"--{flag}", str(value))]
        flags += ["--calibration-prompts", str(self.prompts), "--work", str(self.work / "runs"), *self.loaded()]
        flags += ["--effort", "quick"]
        steps = []
        for number in TABLES[self.args.folder.name]:
            script, out = f"scripts/reproduce/table{number}.sh", {"OUT": str(self.work / f"table{number}")}
            steps.append(Step(f"table{number}", f"table{number}.sh", ("sh", script, *flags), environment | out))
        return steps

    def loaded(self) -> list[str]:
        return ["--device", self.args.device, "--dtype", self.args.dtype]

    def opensora_path(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT / OPEN_SORA), os.environ.get("PYTHONPATH"))))
        return {"PYTHONPATH": path} if self.is_opensora else {}

    # --- running them ------------------------------------------------------------------------------------------------

    def texts(self) -> list[str]:
        return list(PROMPTS[: self.args.prompts])

    def prepare(self) -> None:
        """Write the prompts, and copy the model folder: what a rehearsal calibrates must not be in the user's own.

        The copy shares .venv, which is set up here, so that no step sets it up for the copy.
        """
        subprocess.run(["sh", str(ROOT / "scripts" / "setup.sh")], check=True)
        write_atomically(self.prompts, ("\n".join(self.texts()) + "\n").encode())
        folder = self.tree / self.args.folder.name
        ignored = shutil.ignore_patterns("demo", "cache", "sample", "__pycache__")
        shutil.copytree(self.args.folder, folder, ignore=ignored, dirs_exist_ok=True)
        for name in (".venv", "scripts", "pyproject.toml", "constraints.txt"):
            link = self.tree / name
            if not link.is_symlink():
                link.symlink_to(ROOT / name)

    def run(self, only: Sequence[str]) -> list[dict]:
        """Run the steps that are not done, or those that are named. Returns the results of all, in their order."""
        self.prepare()
        steps, done = {step.name: step for step in self.steps()}, self.results()
        for name in only or [name for name in steps if not done.get(name, {}).get("passed")]:
            done[name] = run_step(steps[name], self.work / "logs" / f"{name}.log")
            print(json.dumps(done[name], ensure_ascii=False), file=sys.stderr)
            self.write([done[name] for name in steps if name in done])
        return [done[name] for name in steps if name in done]

    def results(self) -> dict[str, dict]:
        """Return what earlier runs have measured, by step."""
        file = self.work / "rehearsal.json"
        return of_earlier_run(file, lambda found: {row["step"]: row for row in found["steps"]}, {})

    def write(self, rows: list[dict]) -> None:
        about = {"folder": self.args.folder.name, "size": self.args.size, "dtype": self.args.dtype}
        about |= {"device": self.args.device, "settings": self.settings, "prompts": self.args.prompts}
        about |= {"checkpoint_mib": mib(size_of(self.checkpoints)), "machine": measured_with()}
        about |= {"libraries": library_versions(), "date": date.today().isoformat(), "steps": rows}
        write_atomically(
            self.work / "rehearsal.json", (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode()
        )
        text = f"{table(rows)}\n\n{about['folder']}, {about['size']}, {about['dtype']}, {self.settings}, "
        text += f"{self.args.prompts} calibration prompts; {about['machine']}; {about['date']}\n"
        write_atomically(self.work / "rehearsal.md", text.encode())


def run_step(step: Step, log: Path) -> dict:
    """Run a step. Returns its row: seconds, peak memory, most bytes in the watched folder, exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if step.interrupt:
        shutil.rmtree(step.watched, ignore_errors=True)  # else its plan may be there
    start, disk, sent = time.monotonic(), 0, False
    with log.open("wb") as file:
        environment = {**os.environ, **step.environment}
        options = {"env": environment, "cwd": step.folder, "stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
        options |= {"start_new_session": True, "preexec_fn": hear_interrupts}
        process = subprocess.Popen(step.command, **options)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)  # usage: of this process and its children
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            disk = max(disk, size_of(step.watched) if step.watched else 0)
            if step.interrupt and not sent and any(step.watched.glob("*.partial/*.safetensors")):
                process.send_signal(signal.SIGINT)
                sent = True
            time.sleep(POLL)
    said = log.read_text("utf-8", "replace").strip().splitlines() or [""]
    code, traceback = process.returncode, any(line.startswith("Traceback") for line in said)
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "step": step.name,
        "title": step.title,
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_mib": round(memory),
        "disk_mib": mib(disk) if step.watched else None,
        "exit_code": code,
        "expected": step.expected,
        "passed": code == step.expected and not traceback,
        "said": said[-1].split("\r")[-1][:300],
    }


def hear_interrupts() -> None:
    """Let SIGINT end the process: a shell has what it starts in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, including files that vanish meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def mib(size: float) -> float:
    return round(size / 2**20, 2)


def table(rows: Sequence[dict]) -> str:
    """Return the rows as a Markdown table."""
    head = ["step", "what", "s", "CPU s", "peak memory, MiB", "disk, MiB", "exit code", "as expected"]
    names = ("step", "title", "seconds", "cpu_seconds", "peak_memory_mib", "disk_mib", "exit_code")
    cells = [[row.get(name) for name in names] for row in rows]
    lines = [["–" if cell is None else cell for cell in line] for line in cells]
    lines = [[*line, "yes" if row["passed"] else "no"] for line, row in zip(lines, rows, strict=True)]
    return markdown(head, lines, ["---", "---", *["--:"] * 5, "---"])


def parse_arguments(arguments: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, help=f"model folder: {', '.join(published.WRITERS)}")
    add("--size", choices=("full", "toy"), default="full", help="of the checkpoint (default: full)")
    add("--work", type=Path, help="folder for checkpoint and results (default: runs/rehearse/FOLDER-SIZE)")
    add("--only", default="", metavar="STEP,…", help="run these steps, also those that are done")
    add("--steps", type=int, default=6, help="T (default: 6)")
    add("--prompts", type=int, default=2, help=f"calibration prompts, 1 to {len(PROMPTS)} (default: 2)")
    add("--guidance", type=float, help="guidance scale (default: the model's)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default=dtypes[0], help=f"in which it is loaded (default: {dtypes[0]})")
    add("--write", action="store_true", help="only write the checkpoint, in this process")
    args = parser.parse_args(arguments)
    args.folder = args.folder.resolve()
    if args.folder.name not in published.WRITERS:
        raise UserError(f"{args.folder.name} is no model folder: choose from {', '.join(published.WRITERS)}")
    if not 1 <= args.prompts <= len(PROMPTS):
        raise UserError(f"--prompts {args.prompts}: give a number from 1 to {len(PROMPTS)}")
    if args.steps < 6:
        raise UserError(f"--steps {args.steps}: give at least 6, which the speed-ups of the paper's tables need")
    args.work = (args.work or ROOT / "runs" / "rehearse" / f"{args.folder.name}-{args.size}").resolve()
    args.only = [name for name in args.only.split(",") if name]
    known = [step.name for step in Rehearsal(args).steps()]
    unknown = [name for name in args.only if name not in known]
    if unknown:
        raise UserError(f"--only {','.join(unknown)}: choose from {', '.join(known)}")
    ensure_writable(args.work)
    return args


def main():
    args = parse_arguments()
    rehearsal = Rehearsal(args)
    if args.write:
        sys.path.insert(0, str(ROOT / OPEN_SORA))  # for its package opensora12
        print(published.write(args.folder.name, rehearsal.checkpoints, args.size))
        return
    rows = rehearsal.run(args.only)
    print(table(rows))
    failed = [row["step"] for row in rows if not row["passed"]]
    if failed:
        raise UserError(f"{', '.join(failed)} failed: read {args.work}/logs/{failed[0]}.log")


if __name__ == "__main__":
    run_program(main)
