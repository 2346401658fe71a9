"""Measure caching methods against the uncached run: quality on held-out prompts, cost, and interleaved latency.

    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods fewer-steps,teacache,magcache,budget --speedups 2,3
    .venv/bin/python scripts/evaluate.py ERTACache4FLUX ERTACache4Wan2.1 --methods all --speedups 2,3,5 --json rows.json
    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods ertacache --thresholds 0.05,0.1,0.2 --sites blocks
    .venv/bin/accelerate launch --num_processes 4 scripts/evaluate.py … (batches are split over processes, one per GPU)

Every number is measured by the run that prints it: quality against the uncached run with the same seeds and against the
finely integrated solution, latency as the ratio of medians of alternating runs (A B A B …) on the first prompts. Plans
are calibrated on the calibration prompts, never on the evaluation prompts; a plan stored in cache/ is used as it is.
Other caches run in the stock pipeline, each at the value of its own parameter whose FLOPs come nearest to the
speed-up. Finished rows are stored in runs/ (--work): the same command resumes after the last of them.
common/docs/reference/rows.md describes the rows. Further flags are those of generate.py.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import argparse
import csv
import io
import itertools
import json
import os
import sys
from pathlib import Path

from ertacache import UserError
from ertacache.caches.registry import CACHES
from ertacache.calibration.effort import effort_of
from ertacache.cli import folder_command
from ertacache.cli.arguments import ArgumentParser, check_counts, check_step_seconds, parse_list, prompts_of
from ertacache.demos.model_folder import check_steps, draws_captions, load_model_folder
from ertacache.evaluation import table
from ertacache.evaluation.methods import BUDGET_METHODS, METHODS, SEVERAL, THRESHOLD_METHODS, MethodRows
from ertacache.evaluation.rivals.methods import RIVALS
from ertacache.evaluation.rows import Row
from ertacache.evaluation.runner import Evaluation
from ertacache.plans.names import budget_of, check_speedups
from ertacache.plans.threshold import check_threshold
from ertacache.utils import parallel
from ertacache.utils.errors import run_program
from ertacache.utils.files import ensure_writable, writable_files, write_atomically
from ertacache.utils.tables import planned

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = (*folder_command.OF_A_RUN, "prompt")
COUNT = 64  # held-out captions
LARGEST_COUNT = 100_000  # of captions
ALL = (
    "fewer-steps",
    "fewer-steps-tuned",
    "fewer-steps-ab2",
    "least-squares",
    "uniform",
    "ertacache",
    *RIVALS,
    *CACHES,
    "budget",
)


def csv_text(rows: list[Row]) -> str:
    """Return the rows as CSV, without nested fields."""
    columns = [
        name for name in rows[0] if name not in ("settings", "timeline", "libraries", "samples", "sample_prompts")
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_outputs(args, rows) -> None:
    """Write the files that the flags name, with what has been measured so far."""
    if not parallel.is_main():
        return
    if args.json:
        base = args.json.resolve().parent
        relative = [{**row, "samples": [os.path.relpath(path, base) for path in row["samples"]]} for row in rows]
        write_atomically(args.json, (json.dumps(relative, indent=1, ensure_ascii=False) + "\n").encode())
    if args.csv:
        write_atomically(args.csv, csv_text(rows).encode())


def parse_arguments():
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("folders", nargs="+", help="model folders, for example ERTACache4FLUX")
    add("--methods", default="fewer-steps,uniform,ertacache", help=f"all, or of {', '.join(METHODS)}")
    add("--speedups", metavar="S,S,…", default="", help="measure each method where it is about S times faster")
    add("--thresholds", metavar="λ,λ,…", default="", help="threshold plans for these λ, in place of --speedups")
    add("--sites", default="", help="where threshold plans cache: output, blocks or output,blocks (default: --site)")
    add("--count", type=int, help=f"held-out captions, where no --prompts are given (default: {COUNT})")
    text = "full: captions that name all they can; open: that leave something open; full,open: both, apart"
    add("--captions", default="full", help=text)
    add("--by-speedup", action="store_true", help="print one line per speed-up and one column per method")
    add("--json", type=Path, help="where to write the rows")
    add("--csv", type=Path, help="where to write the rows as a table")
    add("--latency-repeats", type=int, default=5, help="alternating runs; 0 leaves the latency out")
    add("--latency-prompts", type=int, help="prompts of the timed batch (default: --batch-size)")
    text = "also measure the distance to the finely integrated solution, which takes 6 runs or more (default: --exact)"
    add("--exact", action=argparse.BooleanOptionalAction, default=True, help=text)
    add(
        "--samples",
        type=int,
        default=0,
        help="images or videos of each row that are kept, for scripts/report/report.py",
    )
    add("--clip", metavar="MODEL", help="hub id or directory of a CLIP model, for clip_similarity and clip_score")
    add("--plans", type=Path, help="folder of the stored plans (default: cache/ of the model folder)")
    add("--store", action="store_true", help="keep the plans that are calibrated here")
    add("--dry-run", action="store_true", help="say how many rows and model calls it would be, and measure nothing")
    add("--step-seconds", type=float, help="of a step of the uncached run, for --dry-run: also say how many hours")
    add("--work", type=Path, default=ROOT / "runs", help="where finished rows are kept (default: runs)")
    args, rest = parser.parse_known_args()
    args.methods = list(ALL) if args.methods == "all" else args.methods.split(",")
    unknown = [m for m in args.methods if m not in METHODS]
    if unknown:
        raise UserError(f"--methods {','.join(unknown)}: choose from all, {', '.join(METHODS)}")
    if bool(args.thresholds) == bool(args.speedups):
        raise UserError("give either --speedups S,S,… or --thresholds λ,λ,…")
    swept = {*BUDGET_METHODS, *RIVALS, *CACHES} & set(args.methods)
    if args.thresholds and swept:
        raise UserError(f"--thresholds has no meaning for {', '.join(sorted(swept))}: give --speedups")
    check_counts(args, "count", "latency_prompts", most=LARGEST_COUNT)
    check_counts(args, "latency_repeats", "samples", least=0)
    args.captions = list(dict.fromkeys(args.captions.split(",")))
    if not set(args.captions) <= {"full", "open"}:
        raise UserError(f"--captions {','.join(args.captions)}: choose full, open or full,open")
    if args.by_speedup and not args.speedups:
        raise UserError("--by-speedup without --speedups: give them")
    args.speedups = parse_list(args.speedups, "--speedups", "2,3") if args.speedups else []
    args.thresholds = parse_list(args.thresholds, "--thresholds") if args.thresholds else []
    check_speedups(args.speedups)
    for threshold in args.thresholds:
        check_threshold(threshold, "--thresholds")
    check_step_seconds(args)
    if args.json and args.samples and not args.work.resolve().is_relative_to(args.json.resolve().parent):
        raise UserError(f"--json {args.json} with --samples: give a file in a folder that holds --work {args.work} too")
    return args, rest


def open_folder(args, sampler, options, captions: str) -> MethodRows:
    """Return the rows of one model folder, with its pipeline, prompts and settings."""
    if not options.prompts and not draws_captions(sampler, options.model):
        raise UserError("--prompts FILE is needed for a model other than the demo: one evaluation prompt a line")
    sites = args.sites.split(",") if args.sites else [options.site or "output"]
    if any(site not in ("output", "blocks") for site in sites):
        raise UserError(f"--sites {args.sites}: choose from output, blocks")
    options.device = parallel.device(options.device)
    pipe = folder_command.open_pipeline(sampler, options)
    settings = folder_command.checked_settings(sampler, pipe, options)
    if options.prompts:
        prompts, captions = prompts_of(None, options.prompts), None
    else:
        sample = sampler.grammar.sample_captions
        prompts = sample(args.count or COUNT, seed=100, held_out=True, leave_open=captions == "open")
    seeds = range(options.seed, options.seed + len(prompts))
    measured = {"repeats": args.latency_repeats, "timed": args.latency_prompts, "exact": args.exact}
    measured |= {"samples": args.samples, "clip": args.clip, "work": ensure_writable(args.work)}
    measured |= {"model": options.model, "captions": captions, "batch_size": options.batch_size}
    measured |= {"fps": getattr(options, "fps", None)}
    evaluation = Evaluation(sampler, pipe, prompts, seeds, settings, **measured)
    calibration = folder_command.calibration_options(options)
    folder, target = args.plans or sampler.FOLDER / "cache", options.target or "reference"
    return MethodRows(evaluation, calibration, sites, folder, target, args.store)


def announced(args, options, folder: str) -> str:
    """Return a line on the rows of one model folder, and about how many steps they take over all prompts."""
    prompts = len(prompts_of(None, options.prompts)) if options.prompts else args.count or COUNT
    steps, sites = options.steps, (args.sites or options.site or "output").count(",") + 1
    others = sum(SEVERAL.get(name, 1) for name in args.methods if name not in THRESHOLD_METHODS)
    ours = sites * sum(SEVERAL.get(name, 1) for name in args.methods if name in THRESHOLD_METHODS)
    rates = [1.0] + args.speedups * (others + ours) + [2.0] * len(args.thresholds) * ours
    timed = args.latency_repeats * (args.latency_prompts or options.batch_size)
    calls = sum(steps / rate * (prompts + timed) + steps * timed * (rate > 1) for rate in rates)
    calls += 6 * steps * prompts * args.exact
    text = planned(folder, len(rates), prompts, calls, args.step_seconds)
    return f"{text}; calibration of plans that are not stored, and the search for other caches' settings, come on top"


def main():
    args, rest = parse_arguments()
    samplers = [load_model_folder(folder) for folder in args.folders]
    chosen = [options_for(args, sampler, rest) for sampler in samplers]
    if args.dry_run:
        for sampler, options in zip(samplers, chosen, strict=True):
            print(announced(args, options, sampler.FOLDER.name))
        return
    with writable_files(args.json, args.csv):
        evaluate(args, list(zip(samplers, chosen, strict=True)))


def options_for(args, sampler, rest: list[str]):
    """Return the flags of generate.py for one model folder. Refuses speed-ups that its number of steps cannot have."""
    options = folder_command.parse_arguments(sampler, rest, "normal", WITHOUT)
    check_steps(options.steps)
    effort_of(options.effort, "--effort", in_minutes=False)  # rivals search with as many model calls
    if options.prompts and args.count:
        raise UserError(f"--count {args.count}: the prompts are all those of {options.prompts}, leave it out")
    if options.prompts and len(args.captions) > 1:
        raise UserError("--captions full,open with --prompts: those are the demo's, give one of the two")
    for speedup in args.speedups:
        budget_of(options.steps, speedup, "--speedups")
    return options


def evaluate(args, folders: list) -> None:
    """Measure, write the files and print the tables. folders: (sampler, options) of each model folder."""
    every_row = []
    for (sampler, options), captions in itertools.product(folders, args.captions):
        folder = open_folder(args, sampler, options, captions)
        rows = []
        for row in folder.rows(args.methods, args.speedups, args.thresholds):
            rows.append(row)
            write_outputs(args, every_row + rows)
            if parallel.is_main():
                print(f"{sampler.FOLDER.name}: {row['label']}, {row['speedup_nfe']:.2f}×", file=sys.stderr)
        every_row += rows
        if parallel.is_main() and not args.by_speedup:
            sort = f", {captions} captions" if rows[0]["captions"] else ""
            print(f"## {sampler.FOLDER.name}{sort}\n\n{table.one_line_each(rows)}\n\n{table.facts_of(rows)}\n")
    if parallel.is_main() and args.by_speedup:
        print(f"{table.by_speedup(every_row)}\n\n{table.facts_of(every_row)}")


if __name__ == "__main__":
    run_program(lambda: parallel.run_on_all_ranks(main))
