"""Calibrate plans for a list of λ and store them in a model folder's cache/.

    python scripts/calibrate.py ERTACache4FLUX --thresholds 0.05,0.1,0.2
    python scripts/calibrate.py ERTACache4FLUX --model black-forest-labs/FLUX.1-dev --thresholds 0.6 --site blocks

A run that was killed goes on from its last finished batch when the same command is given again. common/docs/results.md
says how long it takes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from ertacache import UserError, cli
from ertacache.errors import ArgumentParser, run_program
from ertacache.programs import load_program


def parse_list(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"--thresholds {text}: give numbers with commas between them, like 0.05,0.1") from error
    if not values:
        raise UserError("--thresholds is empty: give at least one λ, like 0.1")
    return values


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    parser.add_argument("--thresholds", required=True, metavar="λ,λ,…")
    parser.add_argument("--out", type=Path, help="folder for the plans (default: cache/ of the model folder)")
    args, rest = parser.parse_known_args()
    program = load_program(args.folder)
    options = cli.parse_arguments(program, rest)
    thresholds = parse_list(args.thresholds)
    pipe = cli.load(program, options)
    settings = program.settings_of(pipe, options.steps, options.guidance, options.height, options.width)
    for plan, path in cli.calibrate_plans(program, pipe, options, settings, thresholds, args.out):
        chosen = plan.provenance["calibration"]["chosen"]
        print(
            f"λ={plan.threshold:g}: {plan.nfe} of {plan.steps} calls ({plan.steps / plan.nfe:.2f}×), {chosen} → {path}"
        )


if __name__ == "__main__":
    run_program(main)
