"""Calibrate plans, for speed-ups or for values of λ, and store them in a model folder's cache/.

    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --speedups 1.5,2,3,5
    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --thresholds 0.05,0.1,0.2
    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --model black-forest-labs/FLUX.1-dev --thresholds 0.6
    .venv/bin/accelerate launch --num_processes 4 scripts/calibrate.py ERTACache4FLUX --model … --speedups 2,3

A run that was killed goes on from its last finished batch (or replay) when the same command is given again. A
threshold plan takes about 8·T + 7·NFE model calls a prompt, some of them shared by all λ. Budget plans take T calls a
prompt once, and then up to 5·N for each budget, because five schedules are tried.

accelerate starts one process a GPU; they share the batches of prompts and make the plan that one would make, on one
folder that all of them see. Without GPUs add --multi_gpu all the same, accelerate starts one process otherwise.
"""

from pathlib import Path

from ertacache import UserError
from ertacache.calibration import from_folder
from ertacache.cli import model_folder
from ertacache.demos.model_folder import load_program
from ertacache.plans.names import budget_of, check_speedups
from ertacache.utils import parallel
from ertacache.utils.errors import ArgumentParser, run_program


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("--thresholds", metavar="λ,λ,…", default="", help="threshold plans, the paper's")
    parser.add_argument("--speedups", metavar="S,S,…", default="", help="budget plans: exactly T/S computed steps")
    parser.add_argument("--out", type=Path, help="folder for the plans (default: cache/ of the model folder)")
    args, rest = parser.parse_known_args()
    program = load_program(args.folder)
    options = model_folder.parse_arguments(program, rest)
    if not args.thresholds and not args.speedups:
        raise UserError("give --thresholds λ,λ,… or --speedups S,S,…")
    thresholds, speedups = (model_folder.parse_list(text) if text else [] for text in (args.thresholds, args.speedups))
    check_speedups(speedups)
    options.device = parallel.device(options.device)
    pipe = model_folder.load(program, options)
    settings = model_folder.checked_settings(program, pipe, options)
    found = from_folder.calibrate_plans(program, pipe, options, settings, thresholds, args.out) if thresholds else []
    if speedups:
        budgets = [budget_of(settings["steps"], speedup) for speedup in speedups]
        found += from_folder.calibrate_budgets(program, pipe, options, settings, budgets, args.out)
    for plan, path in found if parallel.is_main() else ():
        calls = f"{plan.nfe} of {plan.steps} calls ({plan.steps / plan.nfe:.2f}×)"
        print(f"{plan.title}: {calls}, {plan.provenance['calibration']['chosen']} → {path}")


if __name__ == "__main__":
    run_program(lambda: parallel.together(main))
