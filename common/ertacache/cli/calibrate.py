"""`ertacache calibrate`: plans from the pipeline's own call, as files."""

import contextlib
import os
import shlex
import sys
from pathlib import Path

from ertacache.calibration.effort import effort_of
from ertacache.calibration.from_pipeline import make_plans
from ertacache.cli.arguments import parse_list
from ertacache.cli.request import Request
from ertacache.plans import BudgetPlan
from ertacache.plans.names import budget_of, check_speedups, short_name
from ertacache.utils import parallel
from ertacache.utils.checks import check_seed
from ertacache.utils.errors import UserError
from ertacache.utils.files import writable, write_atomically

SAVING = ".saving-plans-"


def run(request: Request, out: Path, speedups: str, seed: int, effort: str, force: bool) -> None:
    """Calibrate and save, in one process or in each of several that a launcher has started."""
    check_seed(seed)
    effort_of(effort, "--effort")
    paths: dict[float, Path] = {}

    def save(plans: dict[float, BudgetPlan]) -> None:
        """Save all plans; a note says which, so that the same command goes on if it is killed in between."""
        note = out / f"{SAVING}{os.getpid()}"
        write_atomically(note, "\n".join(path.name for path in paths.values()).encode())
        for speedup, path in paths.items():
            plans[speedup].save(path)
        for note in notes(out):  # earlier ones too
            with contextlib.suppress(OSError):  # of somebody else
                note.unlink()

    def main() -> None:
        nonlocal paths
        targets = parse_list(speedups, "--speedups", "2,3")
        check_speedups(targets)
        paths = plan_paths(request, out, targets)
        written = "\n".join(note.read_text("utf-8", "replace") for note in notes(out)).splitlines()
        existing = [path for path in paths.values() if path.exists() and path.name not in written]
        if existing and not force:
            raise UserError(f"{existing[0]} is there already: give --force to write over it, or another --out")
        options = {"seed": seed, "batch_size": request.batch_size, "effort": effort, "work": out}

        def announce() -> None:
            if parallel.is_main():
                print(f"calibrating {', '.join(map(str, paths.values()))}", file=sys.stderr)

        options |= {"announce": announce, "call_kwargs": request.arguments}
        with writable(out):
            pipe = request.load()
            with request.calling():
                plans = make_plans(pipe, request.prompts, list(paths), save, **options)
        if parallel.is_main():
            for speedup, path in paths.items():
                print(line_about(plans[speedup], path))
            print(f"next: {next_command(request, next(iter(paths.values())))}")

    parallel.run_on_all_ranks(main)


def notes(folder: Path) -> list[Path]:
    """Return the notes in a folder that say which plans a process was saving, of this process and of killed ones."""
    return [path for path in folder.glob(f"{SAVING}*") if path.is_file()]


def plan_paths(request: Request, out: Path, speedups: list[float]) -> dict[float, Path]:
    """Return {speedup: NAME-N-of-T.json}; of speed-ups with one N only the first."""
    source = Path(request.source)
    name = short_name(source.resolve() if source.is_dir() else source)
    paths: dict[float, Path] = {}
    for speedup in speedups:
        path = out / f"{name}-{budget_of(request.steps, speedup, '--speedups')}-of-{request.steps}.json"
        if path not in paths.values():
            paths[speedup] = path
    return paths


def line_about(plan: BudgetPlan, path: Path) -> str:
    """Return one line about a plan that has been calibrated."""
    held_out = "none held out" if plan.held_out_error is None else f"held out {plan.held_out_error:.2e}"
    calls = f"{plan.nfe} of {plan.steps} calls ({plan.speedup:.2f}×)"
    return f"{calls}, error of the final latents {plan.predicted_error:.2e} ({held_out}) → {path}"


def next_command(request: Request, path: Path) -> str:
    """Return the command that compares the plan with the uncached run."""
    words = ["ertacache", "generate", request.model, "--plan", str(path), *request.words()]
    return shlex.join([*words, "--prompt", request.prompts[0], "--compare"])
