"""Calibrate plans, for speed-ups or for values of λ, and store them where the model folder's run.sh finds them.

    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --speedups 1.5,2,3,5
    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --thresholds 0.05,0.1,0.2
    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --model black-forest-labs/FLUX.1-dev --speedups 2
    .venv/bin/accelerate launch --num_processes 4 scripts/calibrate.py ERTACache4FLUX --model … --speedups 2,3

--effort quick, normal, thorough or a number of minutes (for each of the two kinds of plans) says what it may cost. An
interrupted run resumes after its last finished batch (or rollout) when the same command is given again, and keeps the
best budget plan so far.

accelerate starts one process per GPU; they share the batches of prompts and make the plan that one process would make,
in one folder that all of them see. Without GPUs add --multi_gpu all the same; otherwise accelerate starts one process.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from functools import partial
from pathlib import Path

from ertacache import UserError
from ertacache.calibration.from_folder import (
    PlainFolder,
    PlanRequest,
    PlanStore,
    announce,
    calibrate_budgets,
    calibrate_thresholds,
    open_session,
)
from ertacache.cli import folder_command
from ertacache.cli.arguments import ArgumentParser, parse_list
from ertacache.demos.model_folder import load_model_folder
from ertacache.plans.names import budget_of, check_speedups
from ertacache.plans.threshold import check_threshold
from ertacache.utils import parallel
from ertacache.utils.errors import run_program


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("--thresholds", metavar="λ,λ,…", default="", help="threshold plans, the paper's")
    parser.add_argument("--speedups", metavar="S,S,…", default="", help="budget plans: exactly T/S computed steps")
    parser.add_argument("--out", type=Path, help="folder for the plans (default: the model folder's cache/local/)")
    args, rest = parser.parse_known_args()
    sampler = load_model_folder(args.folder)
    without = (*folder_command.OF_A_RUN, "seed", "fps")
    options = folder_command.parse_arguments(sampler, rest, "normal", without)
    if not args.thresholds and not args.speedups:
        raise UserError("give --thresholds λ,λ,… or --speedups S,S,…")
    if options.site and not args.thresholds:
        raise UserError(f"--site {options.site}: only threshold plans have one, leave it out or give --thresholds")
    if options.target and not args.speedups:
        raise UserError(f"--target {options.target}: only budget plans have one, leave it out or give --speedups")
    for flag, given in (("--prompt", options.prompt), ("--prompts", options.prompts)):
        if given:
            raise UserError(f"{flag}: those of the calibration are given with --calibration-prompts FILE")
    thresholds = parse_list(args.thresholds, "--thresholds") if args.thresholds else []
    speedups = parse_list(args.speedups, "--speedups", "2,3") if args.speedups else []
    check_speedups(speedups)
    for threshold in thresholds:
        check_threshold(threshold, "--thresholds")
    options.device = parallel.device(options.device)
    calibration = folder_command.calibration_options(options)
    pipe = folder_command.open_pipeline(sampler, options)
    settings = folder_command.checked_settings(sampler, pipe, options)
    store = PlainFolder(args.out) if args.out else PlanStore(sampler, pipe, settings)
    session_of = partial(open_session, sampler, pipe, settings, options.model, calibration, store.folder)
    site, target = options.site or "output", options.target or "reference"
    budgets = list(dict.fromkeys(budget_of(settings["steps"], speedup, "--speedups") for speedup in speedups))
    model = (options.model, settings["steps"])

    def say(requests: list[PlanRequest]) -> None:
        for request in requests:
            announce(f"calibrating {request}", calibration.effort, str(store.path(request.name)))

    plans, effort = [], calibration.effort
    if thresholds:
        requests = [PlanRequest(*model, threshold=threshold, site=site) for threshold in thresholds]
        plans += calibrate_thresholds(session_of, effort, thresholds, site, store, partial(say, requests))
    if budgets:
        requests = [PlanRequest(*model, budget=budget, target=target) for budget in budgets]
        plans += calibrate_budgets(session_of, effort, budgets, target, store, partial(say, requests))
    for plan, path in plans if parallel.is_main() else ():
        calls = f"{plan.nfe} of {plan.steps} calls ({plan.speedup:.2f}×)"
        print(f"{plan.title}: {calls}, {plan.provenance['calibration']['chosen']} → {path}")


if __name__ == "__main__":
    run_program(lambda: parallel.run_on_all_ranks(main))
