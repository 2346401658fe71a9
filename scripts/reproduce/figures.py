"""Figures 2, 3 and 5 of the paper, drawn from what is measured here; the numbers lie beside each as CSV and JSON.

    .venv/bin/python scripts/reproduce/figures.py figure2 --folders ERTACache4Wan2.1
    .venv/bin/python scripts/reproduce/figures.py figure3 --count 3
    .venv/bin/python scripts/reproduce/figures.py figure5 --counts 2,4,8,16
    .venv/bin/python scripts/reproduce/figures.py figure5 --model full --prompts coco.txt \\
        --calibration-prompts coco-train.txt --counts 20,30,1000

Figure 2: (a) how far a step's result is from the one before it, and what TeaCache expects; (b) trajectories with and
without timestep adjustment. Figure 3: first and last frames of each method. Figure 5: quality of the threshold plan,
with timestep adjustment and rectification, against the number of calibration prompts. Demos are asked for the paper's
greatest speed-up on that model, --model full for its λ. --dry-run, with --step-seconds S, says how much that would be.
Flags that are not listed go to evaluate.py (figures 3 and 5) or are those of generate.py (figure 2).
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import csv
import io
import json
from fnmatch import fnmatchcase
from pathlib import Path

import imageio.v2 as imageio
import numpy as np

from ertacache import UserError
from ertacache.caches.fitting import PipelineUnderTest
from ertacache.calibration.from_folder import open_session
from ertacache.calibration.threshold import ThresholdCalibration
from ertacache.cli import folder_command
from ertacache.cli.arguments import check_counts, check_step_seconds, parse_list
from ertacache.demos.model_folder import load_model_folder
from ertacache.evaluation.trajectories import distances, on_plane, trajectory
from ertacache.plans.names import check_speedups
from ertacache.utils import media
from ertacache.utils.errors import run_program
from ertacache.utils.files import read_prompts, write_atomically
from ertacache.utils.provenance import library_versions, machine
from ertacache.utils.tables import planned
from tables import ROOT, evaluate, fastest, folder_flags, open_parser, paper, parse_arguments

RECTIFIED = "policy + time (*) + rectification"
QUALITY = {"psnr": "PSNR (dB)", "psnr_p10": "10th percentile (dB)", "psnr_worst": "worst (dB)", "ssim": "SSIM"}
QUALITY |= {"clip_score": "CLIP score", "prompt_accuracy": "prompt accuracy"}
DISTANCES = {  # a column of figure 2a: what it is called, and its colour and line
    "residual": ("cached residual to computed one (Eq. 12)", "tab:blue", "-"),
    "output": ("cached output to computed one", "tab:green", "--"),
    "teacache": ("output's, as TeaCache expects it", "tab:orange", "-."),
}
PATHS = {  # a run of figure 2b
    "uncached": ("uncached", "black", "-"),
    "policy": ("cached", "tab:blue", "--"),
    "policy + time (velocity)": ("cached, time adjusted (by velocity)", "tab:green", "-."),
    "policy + time (difference)": ("cached, time adjusted (Eq. 13)", "tab:orange", ":"),
}
GAP = 4  # white pixels between the first and the last frame


def save(path: Path, figure, rows: list[dict], about: dict) -> None:
    """The figure as `path`.png, its numbers as .csv, and with what they are about and their provenance as .json."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path.with_suffix(".csv"), text.getvalue().encode())
    whole = {**about, "machine": machine(), "libraries": library_versions(), "rows": rows}
    write_atomically(path.with_suffix(".json"), (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path.with_suffix(".png"), buffer.getvalue())
    print(path.with_suffix(".png"))


def axes(count: int):
    """A figure without a display, with `count` panels side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"figures are drawn by matplotlib ({error}): sh scripts/setup.sh report") from error

    figure = Figure(figsize=(6 * count, 4), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


# --- figure 2 --------------------------------------------------------------------------------------------------------


def draw_distances(rows: list[dict]):
    """The mean over prompts and the range from the least to the greatest, by step."""
    figure, (panel,) = axes(1)
    steps = sorted({row["step"] for row in rows})
    for column, (label, colour, line) in DISTANCES.items():
        values = np.array([[row[column] for row in rows if row["step"] == i] for i in steps])
        panel.plot(steps, values.mean(1), line, color=colour, label=label)
        panel.fill_between(steps, values.min(1), values.max(1), color=colour, alpha=0.2, linewidth=0)
    panel.set(xlabel="step", ylabel="relative ℓ1 distance")
    panel.legend()
    return figure


def draw_paths(rows: list[dict]):
    figure, (panel,) = axes(1)
    for name, (label, colour, line) in PATHS.items():
        path = np.array([[row["along"], row["across"]] for row in rows if row["run"] == name])
        if len(path):
            panel.plot(*path.T, line, color=colour, label=label, marker=".", markersize=4)
    panel.set(xlabel="from noise (0) to image (1)", ylabel="across, in the direction of the cached run's drift")
    panel.legend()
    return figure


def figure2(args) -> None:
    folder, sampler, options = read_options(args)
    if args.dry_run:
        print(announced(args, folder, options))
        return
    pipe = folder_command.open_pipeline(sampler, options)
    settings = folder_command.checked_settings(sampler, pipe, options)
    session = open_session(
        sampler, pipe, settings, options.model, folder_command.calibration_options(options), args.out
    )
    calibration = ThresholdCalibration(session, options.site or "output")
    prompts = read_prompts(args.prompts)[: args.count] if args.prompts else captions(sampler, args.count, held_out=True)
    inputs = [sampler.prepare(pipe, [p], [options.seed + n], **settings) for n, p in enumerate(prompts)]
    about = {"folder": folder, "model": options.model, "settings": settings, "prompts": prompts}

    coefficients = PipelineUnderTest(pipe, settings, session.prompts, options.batch_size, options.model).polynomial
    measured = (distances(sampler, pipe, one, coefficients) for one in inputs)
    rows = [{"prompt": number, **row} for number, steps in enumerate(measured) for row in steps]
    save(args.out / "figure2a", draw_distances(rows), rows, {**about, "polynomial": coefficients})

    threshold = asked_threshold(args, folder, calibration)
    plans = calibration.candidates(threshold)[0]
    plans = {name: plan for name, plan in plans.items() if name in PATHS and plan.cached}
    if not plans:
        raise UserError(f"λ = {threshold:g} caches no step of {folder}: give a greater --speedup")
    paths = {name: trajectory(sampler, pipe, inputs[0], plan) for name, plan in {"uncached": None, **plans}.items()}
    calls = {name: plan.nfe for name, plan in plans.items()}
    rows = []
    for name, points in on_plane(paths).items():
        sigmas = (plans[name].grid(inputs[0].sigmas) if name in plans else inputs[0].sigmas).tolist()
        for i, (sigma, (along, across)) in enumerate(zip(sigmas, points.tolist(), strict=True)):
            rows.append({"run": name, "step": i, "sigma": sigma, "along": along, "across": across})
    end = paths["uncached"][-1]
    apart = {name: float(np.linalg.norm(path[-1] - end) / np.linalg.norm(end)) for name, path in paths.items()}
    about |= {"lambda": threshold, "computed": calls, "relative ℓ2 distance at the end": apart}
    save(args.out / "figure2b", draw_paths(rows), rows, about)
    calibration.finish()


def asked_threshold(args, folder: str, calibration) -> float:
    """The paper's λ for the real checkpoint, else the one whose policy comes nearest to the asked speed-up."""
    printed = fastest(folder, "ertacache")
    if args.model == "full" and args.speedup is None:
        return float(printed["lambda"])
    return calibration.threshold_for(round(calibration.steps / (args.speedup or float(printed["speedup"]))))


def announced(args, folder: str, options) -> str:
    """Return a line on the rows of figure 2, and about how many steps they take."""
    steps = options.steps
    prompts = min(args.count, len(read_prompts(args.prompts))) if args.prompts else args.count
    rows = prompts * (steps - 1) + len(PATHS) * (steps + 1)
    text = planned(f"{folder}, figure 2", rows, prompts, (prompts + len(PATHS)) * steps, args.step_seconds)
    return f"{text}; what TeaCache and the plan learn on the calibration prompts comes on top"


def read_options(args):
    """The first asked folder, its program, and the options of its command line."""
    folder = (args.folders or ["ERTACache4FLUX"])[0]
    sampler = load_model_folder(ROOT / folder)
    calibration = ["--calibration-prompts", str(args.calibration_prompts)] if args.calibration_prompts else []
    words = [*folder_flags(args, folder), *calibration, *args.rest]
    options = folder_command.parse_arguments(sampler, words, without=(*folder_command.OF_A_RUN, "prompt", "fps"))
    return folder, sampler, options


def captions(sampler, count: int, held_out: bool) -> list[str]:
    """Return captions of the demo's grammar, held-out ones (as evaluate.py takes them) or those of training."""
    return sampler.grammar.sample_captions(count, seed=100 if held_out else 7, held_out=held_out)


# --- figure 3 --------------------------------------------------------------------------------------------------------


def first_and_last(path: Path) -> np.ndarray:
    """A image, or the first and the last frame of a video side by side: float [H, W, 3] in [0, 1]."""
    frames = imageio.mimread(path, memtest=False) if path.suffix == ".mp4" else [imageio.imread(path)]
    ends = [frames[0], frames[-1]] if len(frames) > 1 else frames
    line = np.full((len(ends[0]), GAP, 3), 255, np.uint8)
    parts = [part for frame in ends for part in (line, frame[..., :3])][1:]
    return np.concatenate(parts, axis=1) / np.float32(255)


def title(row: dict) -> str:
    """What stands above a column, in ASCII: the method, and how much faster it is."""
    if row["method"] == "none":
        return f"uncached, {row['steps']} steps"
    speedup = row["speedup_latency"] or row["speedup_nfe"]
    psnr = "" if row["psnr"] is None else f", {row['psnr']:.1f} dB"
    return f"{row['method']}, {speedup:.2f}x{psnr}"


def figure3(args) -> None:
    for folder in args.folders or paper("models"):
        printed = [fastest(folder, method) for method in ("teacache", "ertacache")]
        rows = []
        for row in printed:
            by_threshold = args.model == "full" and "lambda" in row
            flag, key = ("--thresholds", "lambda") if by_threshold else ("--speedups", "speedup")
            more = ["--samples", str(args.count), "--work", str(args.out)]
            more += [] if args.prompts else ["--count", str(args.count)]
            request = (row["method"], flag, str(row[key]))
            rows += evaluate(args, folder, request, f"figure3-{folder}-{row['method']}", more)
        if args.dry_run:
            continue
        rows = [row for i, row in enumerate(rows) if row["method"] != "none" or i == 0]
        columns = {title(r): np.stack([first_and_last(args.out / path) for path in r["samples"]]) for r in rows}
        media.save_png(args.out / f"figure3-{folder}.png", media.sheet(rows[0]["sample_prompts"], columns))
        print(args.out / f"figure3-{folder}.png")


# --- figure 5 --------------------------------------------------------------------------------------------------------


def calibration_files(args, folder: str) -> dict[int, Path]:
    """A file with the first N calibration prompts, for each asked N."""
    most = max(args.counts)
    if args.calibration_prompts:
        prompts = read_prompts(args.calibration_prompts)
        if len(prompts) < most:
            raise UserError(f"--counts {most}: {args.calibration_prompts} has {len(prompts)} prompts, give fewer")
    elif args.model == "full":
        raise UserError("--model full needs --calibration-prompts FILE (CALIBRATION=FILE): one prompt a line")
    else:
        prompts = captions(load_model_folder(ROOT / folder), most, held_out=False)
    files = {count: args.out / f"calibration-{folder}-{count}.txt" for count in args.counts}
    for count, file in files.items():
        write_atomically(file, ("\n".join(prompts[:count]) + "\n").encode())
    return files


def figure5(args) -> None:
    folder = (args.folders or ["ERTACache4FLUX"])[0]
    printed, rows = fastest(folder, "ertacache"), []
    by_threshold = args.model == "full" and args.speedup is None
    flag, value = ("--thresholds", printed["lambda"]) if by_threshold else ("--speedups", printed["speedup"])
    for count, file in calibration_files(args, folder).items():
        more = ["--calibration-prompts", str(file), "--latency-repeats", "0"]
        more += [] if args.prompts else ["--count", str(args.count)]
        request = ("ablation", flag, str(args.speedup or value))
        measured = evaluate(args, folder, request, f"figure5-{folder}-{count}", more)
        if args.dry_run:
            continue
        row = next((row for row in measured if fnmatchcase(row["method"], RECTIFIED)), None)
        if row is None:
            raise UserError(f"{flag} {request[2]} caches no step of {folder}: give a greater --speedup")
        rows.append({"calibration_prompts": count, "nfe": row["nfe"], **{name: row[name] for name in QUALITY}})
    if args.dry_run:
        return
    shown = {name: label for name, label in QUALITY.items() if all(row[name] is not None for row in rows)}
    figure, panels = axes(len(shown))
    for panel, (name, label) in zip(panels, shown.items(), strict=True):
        panel.plot([row["calibration_prompts"] for row in rows], [row[name] for row in rows], "o-", color="tab:blue")
        panel.set(xscale="log", xlabel="calibration prompts", ylabel=label)
        panel.set_xticks(args.counts, [str(count) for count in args.counts], minor=False)
        panel.minorticks_off()
    save(args.out / "figure5", figure, rows, {"folder": folder, "method": row["method"], "prompts": row["prompts"]})


# --- the command line ------------------------------------------------------------------------------------------------


def whole_numbers(flag: str, text: str) -> list[int]:
    return sorted(set(parse_list(text, flag, "2,4,8", int)))


def main():
    parser = open_parser(__doc__, ("figure2", "figure3", "figure5"), ("demo", "full"))
    parser.add_argument("--count", type=int, default=4, help="prompts that are measured, or shown (without --prompts)")
    parser.add_argument("--counts", default="2,4,8,16", metavar="N,N,…", help="calibration prompts, for figure 5")
    parser.add_argument("--speedup", type=float, help="for figures 2 and 5, in place of the paper's")
    parser.add_argument("--calibration-prompts", type=Path, help="for figures 2 and 5 (default: the folder's own)")
    parser.add_argument("--dry-run", action="store_true", help="say how many rows and steps it would be")
    parser.add_argument("--step-seconds", type=float, help="of a step, for --dry-run: also say how many hours")
    args = parse_arguments(parser)
    check_step_seconds(args)
    if args.dry_run and args.what != "figure2":  # they are measured by evaluate.py
        args.rest += ["--dry-run", *(["--step-seconds", str(args.step_seconds)] if args.step_seconds else [])]
    check_counts(args, "count")
    args.counts = whole_numbers("--counts", args.counts)
    if args.speedup is not None:
        check_speedups([args.speedup], "--speedup")
    {"figure2": figure2, "figure3": figure3, "figure5": figure5}[args.what](args)


if __name__ == "__main__":
    run_program(main)
