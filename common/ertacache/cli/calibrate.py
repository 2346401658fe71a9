"""`ertacache calibrate`: plans from the pipeline's own call, as files."""

import shlex
import sys
from pathlib import Path

import typer

from ertacache.calibration.from_pipeline import calibrate
from ertacache.cli import model_folder
from ertacache.cli.request import Request, prompts_of
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.names import budget_of, check_speedups, short_name
from ertacache.utils import parallel
from ertacache.utils.errors import UserError
from ertacache.utils.files import ensure_writable


def run(request: Request, out: Path, speedups: str, prompt, prompts_file, seed, batch_size, search, force) -> None:
    """In one process, or in each of several that a launcher has started."""

    def main():
        prompts, wanted = prompts_of(prompt, prompts_file), model_folder.parse_list(speedups)
        check_speedups(wanted)
        paths = plan_paths(request, out, wanted)
        there = [path for path in paths.values() if path.exists()]
        if there and not force:
            raise UserError(f"{there[0]} is there already: give --force to write over it, or another --out")
        ensure_writable(out)
        options = {"seed": seed, "batch_size": batch_size, "search": search, "work": out, **request.arguments}
        pipe = request.load()
        with request.calling():
            plans = calibrate(pipe, prompts, list(paths), **options)
        if parallel.is_main():
            for speedup, path in paths.items():
                print(told(plans[speedup], plans[speedup].save(path)))
            print(f"next: {next_command(request, next(iter(paths.values())), prompts[0])}")

    try:
        parallel.together(main)
    except KeyboardInterrupt as stop:
        print("interrupted; the same command goes on from its last finished batch", file=sys.stderr)
        raise typer.Exit(130) from stop


def plan_paths(request: Request, out: Path, speedups: list[float]) -> dict[float, Path]:
    """Speed-up → NAME-N-of-T.json; of speed-ups with one N the first."""
    path = Path(request.source)
    name = short_name(path.resolve() if path.is_dir() else path)
    budgets = {budget_of(request.steps, speedup): speedup for speedup in reversed(speedups)}
    found = {speedup: out / f"{name}-{budget}-of-{request.steps}.json" for budget, speedup in budgets.items()}
    return {speedup: found[speedup] for speedup in speedups if speedup in found}


def told(plan: BudgetPlan, path: Path) -> str:
    """One line about a plan that has been made."""
    held_out = "none held out" if plan.held_out_error is None else f"held out {plan.held_out_error:.2e}"
    calls = f"{plan.nfe} of {plan.steps} calls ({plan.steps / plan.nfe:.2f}×)"
    return f"{calls}, mean squared error of the final latents {plan.predicted_error:.2e} ({held_out}) → {path}"


def next_command(request: Request, path: Path, prompt: str) -> str:
    words = ["ertacache", "generate", request.model, "--plan", str(path), *request.words()]
    return shlex.join([*words, "--prompt", prompt, "--compare"])
