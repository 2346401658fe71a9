"""The plans in a model folder's cache/: finds the one that a run asks for, and calibrates what is not there."""

import math
import sys
import warnings
from pathlib import Path

from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.threshold import Calibration
from ertacache.plans.names import budget_name, budget_of, check_speedups, plan_name
from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Conditions
from ertacache.utils import parallel
from ertacache.utils.errors import UserError
from ertacache.utils.files import ensure_writable, read_prompts
from ertacache.utils.provenance import fingerprint


def find_plan(program, pipe, args, settings) -> tuple[Plan, Path]:
    """The plan to run with, and its path: a file that is named, one stored for λ or a budget, or one calibrated now."""
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    recorded = {k: v for k, v in settings.items() if k != "steps"} | {"dtype": dtype}
    run = Conditions.of(pipe, settings["steps"], recorded)
    if args.plan:
        path, remedy = Path(args.plan), "make one with --threshold or --speedup instead of --plan"
    else:
        name, what = _wanted(args, settings["steps"])
        path = program.FOLDER / "cache" / name
        remedy = f"delete {path} to calibrate it anew under these conditions"
        if not path.exists():
            if parallel.is_main():
                print(f"no stored plan for {what}: calibrating one (once)", file=sys.stderr)
            if args.threshold is not None:
                return calibrate_plans(program, pipe, args, settings, [args.threshold])[0]
            return calibrate_budgets(program, pipe, args, settings, [_budget(args, settings["steps"])])[0]
    plan = Plan.load(path)
    plan.check(run, remedy)
    made_for, found = plan.provenance.get("weights"), fingerprint(pipe)
    if made_for != found and "offloaded" not in (made_for, found):
        warnings.warn(f"the plan was calibrated on other weights ({made_for}, now {found}): {remedy}", stacklevel=2)
    return plan, path


def _wanted(args, steps: int) -> tuple[str, str]:
    """File name of the plan that the arguments ask for, and the words for it."""
    if args.threshold is None:
        budget = _budget(args, steps)
        exact = ", exact target" if args.target == "exact" else ""
        return budget_name(args.model, steps, budget, args.target), f"{budget} of {steps} steps{exact}"
    if not (math.isfinite(args.threshold) and args.threshold > 0):
        raise UserError(f"--threshold {args.threshold}: λ must be a finite number above 0, for example 0.1")
    return plan_name(args.model, steps, args.threshold, args.site), f"λ = {args.threshold:g}"


def _budget(args, steps: int) -> int:
    if args.speedup is None:
        budget, flag = args.budget, f"--budget {args.budget}"
    else:
        check_speedups([args.speedup], "--speedup")
        budget, flag = budget_of(steps, args.speedup), f"--speedup {args.speedup:g}"
    if not 2 <= budget <= steps:
        raise UserError(f"{flag}: give a number of computed steps from 2 to {steps}")
    return budget


def open_calibration(program, pipe, args, settings, work: Path, kind=Calibration, **options):
    """A calibration on the prompts that the arguments name, or on the folder's own; its ledger lies in `work`."""
    default = "calibration-demo.txt" if args.model == "demo" else "calibration.txt"
    prompts = read_prompts(args.calibration_prompts or program.FOLDER / "prompts" / default)
    options |= {"settings": settings, "batch_size": args.batch_size, "model_id": args.model}
    return kind(program, pipe, prompts, range(len(prompts)), work=ensure_writable(work), **options)


def calibrate_plans(program, pipe, args, settings, thresholds, folder=None):
    """Calibrate a threshold plan for each λ: (plan, path) pairs. Stored in `folder`, by default the `cache/`."""
    folder = ensure_writable(folder or program.FOLDER / "cache")
    calibration = open_calibration(program, pipe, args, settings, folder, site=args.site)
    found = []
    for threshold in thresholds:
        plan = calibration.plan(threshold)
        path = folder / plan_name(args.model, plan.steps, plan.threshold, plan.site)
        found.append((plan, _save(plan, path)))
    calibration.finish()
    return found


def calibrate_budgets(program, pipe, args, settings, budgets, folder=None):
    """Calibrate a budget plan for each number of computed steps: (plan, path) pairs. One reference pass serves all."""
    folder = ensure_writable(folder or program.FOLDER / "cache")
    calibration = open_calibration(program, pipe, args, settings, folder, BudgetCalibration, target=args.target)
    plans = calibration.plans(budgets, args.search)
    found = [(p, _save(p, folder / budget_name(args.model, p.steps, p.nfe, p.target))) for p in plans.values()]
    calibration.finish()
    return found


def _save(plan: Plan, path: Path) -> Path:
    """Written by main; the other processes have the same plan."""
    return plan.save(path) if parallel.is_main() else path
