"""Calibrate plans for a list of λ and store them in a model folder's cache/.

    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --thresholds 0.05,0.1,0.2
    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --speedups 1.5,2,3
    .venv/bin/python scripts/calibrate.py ERTACache4FLUX --model black-forest-labs/FLUX.1-dev --thresholds 0.6

A run that was killed goes on from its last finished batch when the same command is given again. It makes
about 8·T + 7·NFE model calls a prompt and λ; the passes that do not depend on λ are shared.
"""

from pathlib import Path

from ertacache import UserError, cli
from ertacache.errors import ArgumentParser, run_program
from ertacache.programs import load_program


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("--thresholds", metavar="λ,λ,…", default="")
    parser.add_argument("--speedups", metavar="S,S,…", default="", help="the λ whose T/NFE is nearest")
    parser.add_argument("--out", type=Path, help="folder for the plans (default: cache/ of the model folder)")
    args, rest = parser.parse_known_args()
    program = load_program(args.folder)
    options = cli.parse_arguments(program, rest)
    if not args.thresholds and not args.speedups:
        raise UserError("give --thresholds λ,λ,… or --speedups S,S,…")
    thresholds, speedups = (cli.parse_list(text) if text else [] for text in (args.thresholds, args.speedups))
    cli.check_speedups(speedups)
    pipe = cli.load(program, options)
    settings = cli.checked_settings(program, pipe, options)
    for plan, path in cli.calibrate_plans(program, pipe, options, settings, thresholds, speedups, args.out):
        chosen = plan.provenance["calibration"]["chosen"]
        print(
            f"λ={plan.threshold:g}: {plan.nfe} of {plan.steps} calls ({plan.steps / plan.nfe:.2f}×), {chosen} → {path}"
        )


if __name__ == "__main__":
    run_program(main)
