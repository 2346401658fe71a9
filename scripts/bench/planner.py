"""How much a budget plan depends on luck: the closed-form problem from smooth to hard, with several sets of prompts.

    .venv/bin/python scripts/bench/planner.py --steps 30 --guidances 3.5 --widths 0.1,0.3 --draws 2 --out planner.json

A cell is T, the guidance g, the width b of the problem (scripts/bench/closed_form) and a speed-up. Each draw calibrates
on 8 other captions and noises, half of the captions open; all are measured on the same 32 held-out ones. Methods, all
with as many model calls:

| method | |
|---|---|
| quick, normal, thorough | budget plans, by effort |
| fewer steps | of Euler, on the problem's own grid |
| … tuned | on that grid or shift that comes nearest to the uncached run on the calibration captions |
| OSS | Euler on the steps that dynamic programming finds on its own trajectory (arXiv 2503.21774) |
| least squares | each skipped velocity predicted from three computed ones, uniform schedule |
| threshold plan | the paper's, at the λ whose number of calls comes nearest, on the uncached run |

With Euler as the solver, least squares is at once a uniform schedule with jumps fitted on the uncached run.

PSNR of the latents in dB to the uncached run, with 2 as peak: of each draw the mean over the captions and the 10th
percentile. The table has the mean of both over the draws, the worst draw's mean, and of each effort the least lead that
it has over the best other method of the same draw. The same command goes on after the last finished problem, and with
more --draws after the draws that it has.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from ertacache.calibration import planner
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.effort import EFFORTS, effort_of
from ertacache.calibration.session import CalibrationSession
from ertacache.calibration.threshold import ThresholdCalibration
from ertacache.cli.arguments import ArgumentParser, check_counts, parse_list
from ertacache.demos.model_folder import check_steps, load_model_folder
from ertacache.evaluation.rivals.rollouts import optimal_steps
from ertacache.evaluation.table import facts as facts_line
from ertacache.numerics import ode
from ertacache.numerics.multistep import first_order_matrix, predicted_jumps
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.names import budget_of, check_speedups
from ertacache.utils.errors import UserError, run_program
from ertacache.utils.files import of_earlier_run, writable_files, write_atomically
from ertacache.utils.provenance import library_versions, machine
from ertacache.utils.tables import markdown

FOLDER = Path(__file__).resolve().parent / "closed_form"
FITTED, MEASURED = 8, 32  # captions of a draw, and held-out ones


def captions(sampler, count: int, seed: int, held_out: bool) -> list[str]:
    """Return captions, every second one open."""
    halves = (sampler.grammar.sample_captions(count // 2, seed, held_out, leave_open) for leave_open in (False, True))
    return [caption for pair in zip(*halves, strict=True) for caption in pair]


class Cell:
    """One problem, and the uncached results that all methods are measured against.

    Args:
        sampler: The closed-form model folder.
        steps: T.
        guidance: g.
        width: b.
    """

    def __init__(self, sampler, steps: int, guidance: float, width: float):
        self.sampler, self.pipe = sampler, sampler.load(f"b={width:g}")
        self.settings = {"steps": steps, "guidance": guidance}
        self.prompts = captions(sampler, MEASURED, 100, held_out=True)
        self.uncached = sampler.denoise(self.pipe, self.inputs())

    def inputs(self, **changes):
        """Return the inputs of the held-out captions."""
        return self.sampler.prepare(self.pipe, self.prompts, range(1000, 1000 + MEASURED), **self.settings | changes)

    def quality(self, plan=None, inputs=None) -> dict[str, float]:
        """Return mean and 10th percentile of the PSNR of a plan's run, or of an uncached one with other inputs."""
        found = self.sampler.denoise(self.pipe, inputs or self.inputs(), plan)
        psnr = 10 * torch.log10(4 / (found - self.uncached).square().flatten(1).mean(1).clamp_min(1e-20))
        return {"mean": psnr.mean().item(), "p10": psnr.quantile(0.1).item()}

    def draw(self, number: int, speedups: list[float], efforts: list[str], work: str) -> dict[str, dict[str, dict]]:
        """Calibrate all methods on one set of captions. Returns {speedup: {method: quality}}."""
        prompts = captions(self.sampler, FITTED, number, held_out=False)
        seeds = range(10_000 + 100 * number, 10_000 + 100 * number + FITTED)
        options = {"settings": self.settings, "batch_size": FITTED, "work": work, "progress": False}
        session = CalibrationSession(self.sampler, self.pipe, prompts, seeds, **options)
        calibration, thresholds = BudgetCalibration(session), ThresholdCalibration(session)
        found = {}
        for speedup in speedups:
            budget = budget_of(self.settings["steps"], speedup)
            methods = {name: self.quality(calibration.plans([budget], name)[budget]) for name in efforts}
            found[f"{speedup:g}"] = methods | self.rivals(calibration, thresholds, budget)
        calibration.finish()
        thresholds.finish()
        return found

    def rivals(self, calibration, thresholds, budget: int) -> dict[str, dict[str, float]]:
        """Return the quality of other methods with as many calls."""
        steps, gram, session = self.settings["steps"], calibration.trajectories(), calibration.session
        native, uniform = calibration.native_sigmas, planner.uniform_schedule(steps, budget)

        def plan(schedule, weights) -> BudgetPlan:
            rows = tuple(tuple(row) for row in np.asarray(weights).tolist())
            return BudgetPlan(session.requirements, tuple(schedule), rows, tuple(native.tolist()))

        euler = [calibration.first_order(i, i + 1) for i in range(steps)]
        oss = optimal_steps(calibration, budget)
        fitted = planner.fitted_predictor(gram, 3)
        predicted = predicted_jumps(first_order_matrix(euler), uniform, fitted)[0]
        shift, fewer = calibration.tuned_shift(budget), self.inputs(steps=budget)
        threshold = thresholds.threshold_for(budget)
        return {
            "fewer steps": self.quality(inputs=fewer),
            "fewer steps, tuned": self.quality(
                inputs=fewer if shift is None else fewer.on(ode.shifted_grid(native, budget, shift))
            ),
            "OSS": self.quality(plan(oss, planner.euler_weights(native.numpy(), oss, 1))),
            "least squares": self.quality(plan(uniform, predicted)),
            "threshold plan": self.quality(thresholds.plan(threshold)),
        }


def table(rows: list[dict]) -> str:
    """Return a Markdown table of PSNRs: means over the draws of mean and 10th percentile, and the worst draw's mean."""
    methods = list(dict.fromkeys(name for row in rows for name in row["draws"][0]))
    ours = [name for name in methods if name in EFFORTS]
    lines = []
    for row in rows:
        means = {name: [draw[name]["mean"] for draw in row["draws"]] for name in methods}
        tails = {name: np.mean([draw[name]["p10"] for draw in row["draws"]]) for name in methods}
        cells = [f"{np.mean(means[name]):.1f} / {tails[name]:.1f} / {min(means[name]):.1f}" for name in methods]
        best = np.max([means[name] for name in methods if name not in ours], axis=0)
        leads = " / ".join(f"{np.min(np.array(means[name]) - best):+.1f}" for name in ours)
        facts = (f"{row['steps']}", f"{row['guidance']:g}", f"{row['width']:g}", f"{row['speedup']}×")
        lines.append([*facts, *cells, leads.replace("-", "−")])
    return markdown(["T", "g", "b", "speed-up", *methods, f"least lead: {' / '.join(ours)}"], lines)


def earlier_rows(found: dict) -> tuple[dict[tuple, dict], set[str]]:
    """Return the rows of an earlier run by (T, g, b, speed-up), and the efforts of their draws."""
    rows = {(row["steps"], row["guidance"], row["width"], row["speedup"]): row for row in found["rows"]}
    return rows, {name for row in rows.values() for draw in row["draws"] for name in draw if name in EFFORTS}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default="30,50", metavar="T,T,…", help="numbers of steps")
    parser.add_argument("--guidances", default="1,3.5,5", metavar="G,G,…", help="guidance scales")
    parser.add_argument("--widths", default="0.05,0.1,0.3,1", metavar="B,B,…", help="of points: smaller is harder")
    parser.add_argument("--speedups", default="2,3,5", metavar="S,S,…", help="of the plans")
    parser.add_argument("--efforts", default=",".join(EFFORTS), metavar="NAME,…", help="of the calibrations")
    parser.add_argument("--draws", type=int, default=8, help="sets of calibration captions")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each cell")
    args = parser.parse_args()
    check_counts(args, "draws")
    speedups, efforts = parse_list(args.speedups, "--speedups", "2,3"), args.efforts.split(",")
    check_speedups(speedups)
    all_steps, widths = parse_list(args.steps, "--steps", "30,50", int), parse_list(args.widths, "--widths")
    guidances = parse_list(args.guidances, "--guidances", "1,3.5")
    for steps in all_steps:
        check_steps(steps)
        for speedup in speedups:
            budget_of(steps, speedup, "--speedups")
    for name in efforts:
        effort_of(name, "--efforts", in_minutes=False)
    sampler = load_model_folder(FOLDER)
    with writable_files(args.out):
        by_cell, others = of_earlier_run(args.out, earlier_rows, ({}, set()))
        if others and others != set(efforts):
            text = f"--efforts {args.efforts}: {args.out} has rows of {','.join(n for n in EFFORTS if n in others)}"
            raise UserError(f"{text}, give these or another --out")
    rows = list(by_cell.values())
    for steps, guidance, width in itertools.product(all_steps, guidances, widths):
        for speedup in speedups:
            row = {"steps": steps, "guidance": guidance, "width": width, "speedup": f"{speedup:g}", "draws": []}
            by_cell.setdefault((steps, guidance, width, f"{speedup:g}"), row)
        here = [by_cell[steps, guidance, width, f"{speedup:g}"] for speedup in speedups]
        finished = min(len(row["draws"]) for row in here)
        if finished >= args.draws:
            continue
        cell = Cell(sampler, steps, guidance, width)
        with tempfile.TemporaryDirectory() as work:
            draws = [cell.draw(number, speedups, efforts, work) for number in range(finished, args.draws)]
        for row in here:
            row["draws"] = row["draws"][:finished] + [draw[row["speedup"]] for draw in draws]
        rows = [row for row in by_cell.values() if row["draws"]]
        facts = {"machine": machine(), "libraries": library_versions(), "rows": rows}
        write_atomically(args.out, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
        print(table(here), flush=True)
    print(f"\n{table(rows)}\n\n{facts_line(f'{MEASURED} held-out captions', f'{args.draws} draws')}")


if __name__ == "__main__":
    run_program(main)
