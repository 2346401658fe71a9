"""The paper's tables, measured: beside each number stands the paper's, in a column of its own.

    .venv/bin/python scripts/reproduce/tables.py table1 --count 16
    .venv/bin/python scripts/reproduce/tables.py table3 --folders ERTACache4FLUX --latency-repeats 0
    .venv/bin/python scripts/reproduce/tables.py table2 --model full --prompts coco.txt

The demos are asked for the speed-ups that the paper reports, because λ of a demo is another one; --model full takes
the real checkpoints and the paper's λ. Rows are measured by evaluate.py, which goes on with what an earlier run has
finished; --dry-run, with --step-seconds S, says how much that would be. Table 4 is about cost alone: without --model
full it is measured by bench/latency.py, whose real architectures have random weights (--model random: at full size, for
a GPU). Flags that are not listed here go to evaluate.py or bench/latency.py. figures.py draws the figures.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import json
import shlex
import subprocess
import sys
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path

from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser
from ertacache.evaluation.methods import METHODS
from ertacache.utils.errors import run_program
from ertacache.utils.files import ensure_writable, read_prompts, write_atomically
from ertacache.utils.tables import markdown
from ertacache.utils.words import counted

ROOT = Path(__file__).resolve().parents[2]
PAPER = Path(__file__).resolve().parent / "paper"
REAL = ("--site", "blocks", "--batch-size", "1")  # where the paper caches, one prompt a call as its latencies are
MEASURED = {  # of a printed column: its name, the field of a row that is measured beside it, and how that is written
    "speedup": ("speed-up", "speedup_end_to_end", "{:.2f}×"),
    "latency_s": ("latency (s)", "end_to_end_s", "{:.2f}"),
    "vbench": ("VBench (%)", None, ""),
    "clip": ("CLIP similarity to the uncached image", "clip_similarity", "{:.4f}"),
    "lpips": ("LPIPS", "lpips", "{:.4f}"),
    "ssim": ("SSIM", "ssim", "{:.4f}"),
    "psnr": ("PSNR (dB)", "psnr", "{:.2f}"),
    "memory_mib": ("memory (MiB)", "peak_memory_mib", "{:.0f}"),
}
LOOP = {**MEASURED, "latency_s": ("latency of the loop (s)", "latency_s", "{:.3f}")}  # all that bench/latency.py times
EXTRA_COLUMNS = {
    "10th percentile (dB)": ("psnr_p10", "{:.2f}"),
    "worst (dB)": ("psnr_worst", "{:.2f}"),
    "below 30 dB": ("below_30db", "{:.2f}"),
    "T/NFE": ("speedup_nfe", "{:.2f}×"),
    "prompt accuracy": ("prompt_accuracy", "{:.3f}"),
}  # not in the paper


def paper(name: str) -> dict:
    """Return what the paper prints, from paper/; numbers with a point are Decimals, so that 24.50 stays 24.50."""
    return json.loads((PAPER / f"{name}.json").read_text("utf-8"), parse_float=Decimal)


# --- asking for rows -------------------------------------------------------------------------------------------------


def asked(model: dict, row: dict) -> dict:
    """Return a printed row with what it is requested by: method, speedup and, for our plans, lambda."""
    return {**model.get("ask", {}), **row, **row.get("ask", {})}


def fastest(folder: str, method: str) -> dict:
    """Return the printed row of Table 1 or 2 with this method's greatest speed-up on a model."""
    models = [model for name in ("table1", "table2") for model in paper(name)["models"] if model["folder"] == folder]
    return max((row for row in models[0]["rows"] if row["method"] == method), key=lambda row: row["speedup"])


def requests(model: dict, full: bool, extra=()) -> list[tuple[str, str, str]]:
    """Return the (methods, flag, values) of evaluate.py for a table's rows of one model; equal values are grouped.

    full: request our plans by the paper's λ. extra: methods that the paper lacks, at the speed-ups of our plans.
    """
    values = {}
    for row in (asked(model, row) for row in model["rows"]):
        ours = "lambda" in row
        if row["method"] != "none":
            flag = ("--thresholds", "lambda") if full and ours else ("--speedups", "speedup")
            values.setdefault((row["method"], flag[0]), {})[str(row[flag[1]])] = None
        for name in extra if ours else ():
            values.setdefault((name, "--speedups"), {})[str(row["speedup"])] = None
    together = {}
    for (method, flag), numbers in values.items():
        together.setdefault((flag, ",".join(numbers)), []).append(method)
    return [(",".join(methods), *key) for key, methods in together.items()]


def run(script: str, *arguments: str) -> None:
    """Run one of our scripts; when it fails, its own line on stderr says why, and its exit code becomes ours."""
    print(f"$ {shlex.join([script, *arguments])}", file=sys.stderr)
    output = None if "--dry-run" in arguments else sys.stderr  # what a dry run says is the result
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / script), *arguments], stdout=output)
    if done.returncode:
        sys.exit(done.returncode)


def evaluate(args, folder: str, request: tuple[str, str, str], name: str = "", more=()) -> list[dict]:
    """Return the rows of one run of evaluate.py, stored in the output folder. more: further flags."""
    methods, flag, values = request
    file = args.out / f"{name or '-'.join([folder, methods.replace(',', '+'), flag.strip('-'), values])}.json"
    asked_for = ["--methods", methods, flag, values, "--json", str(file), "--no-exact"]
    run("evaluate.py", str(ROOT / folder), *asked_for, *folder_flags(args, folder), *more, *args.rest)
    return [] if "--dry-run" in args.rest else json.loads(file.read_text("utf-8"))


def folder_flags(args, folder: str) -> list[str]:
    """Return the flags that choose the checkpoint and the evaluation prompts of a model folder."""
    full = ["--model", checkpoint(args, folder), *REAL] if args.model == "full" else []
    return full + (["--prompts", str(args.prompts)] if args.prompts else [])


def checkpoint(args, folder: str) -> str:
    """Return the checkpoint of a model folder: its Hub id, or its directory in --checkpoints, named as on the Hub."""
    hub_id = paper("models")[folder]["checkpoint"]
    return hub_id if args.checkpoints is None else str(args.checkpoints / hub_id.split("/")[1])


def measure(args, model: dict) -> list[dict]:
    """Return all rows for one model of a table, with the uncached run once."""
    rows = []
    for request in requests(model, args.model == "full", args.extra):
        rows += evaluate(args, model["folder"], request)
    return [row for i, row in enumerate(rows) if row["method"] != "none" or i == 0]


def bench(args, model: dict) -> list[dict]:
    """Return the rows of bench/latency.py for one model of Table 4."""
    size = "full" if args.model == "random" else "small"
    file = args.out / f"{model['folder']}-bench-{size}.json"
    what = ["--size", size, "--compile", "no", "--methods", "baseline,teacache,threshold,budget"]
    run("bench/latency.py", str(ROOT / model["folder"]), *what, "--json", str(file), *args.rest)
    return [] if "--dry-run" in args.rest else json.loads(file.read_text("utf-8"))


# --- joining ---------------------------------------------------------------------------------------------------------


def belongs(row: dict, measured: dict) -> bool:
    """Return whether a measured row is the printed one: the same method, at the same λ or speed-up."""
    if not any(fnmatchcase(measured["method"], name) for name in row.get("rows", [row["method"]])):
        return False
    by_threshold = measured.get("asked") is None
    printed = row.get("lambda") if by_threshold else row.get("speedup")
    value = measured.get("settings", {}).get("threshold") if by_threshold else measured["asked"]
    return row["method"] == "none" or value is None or (printed is not None and float(printed) == float(value))


def join(model: dict, measured: list[dict]) -> list[tuple[dict | None, dict | None]]:
    """Return pairs of a printed and a measured row, in the paper's order, None where one has no partner."""
    pairs, left = [], list(measured)
    for row in model["rows"]:
        hits = [m for m in measured if belongs(asked(model, row), m)]
        pairs += [(row, hit) for hit in hits] or [(row, None)]
        left = [m for m in left if m not in hits]
    return pairs + [(None, m) for m in left]


def cell(row: dict | None, field: str | None, form: str) -> str:
    value = None if row is None or field is None else row.get(field)
    return "–" if value is None else form.format(value)


def table(columns: list[str], pairs, measured=MEASURED) -> str:
    """Return a Markdown table of the columns that the paper prints (keys of MEASURED) and of our own non-empty ones."""
    ours = {
        name: pair
        for name, pair in EXTRA_COLUMNS.items()
        if any(row and row.get(pair[0]) is not None for _, row in pairs)
    }
    head, lines = ["method", "measured as"], []
    for column in columns:
        name, field, _ = measured[column]
        head += [name] * (field is not None) + [f"{MEASURED[column][0]}, paper"]
    for printed, row in pairs:
        label = "label" if row and "label" in row else "method"
        line = [printed["name"] if printed else "not in the paper", cell(row, label, "{}")]
        for column in columns:
            _, field, form = measured[column]
            line += [cell(row, field, form)] * (field is not None)
            line += [cell(printed, column, "{}×" if column == "speedup" else "{}")]
        lines.append([*line, *(cell(row, *column) for column in ours.values())])
    return markdown([*head, *ours], lines)


def origin(rows: list[dict]) -> str:
    """Return where and on what the numbers of these rows were measured."""
    first = rows[0]
    places = sorted({row.get("machine") or row.get("device") or "unknown machine" for row in rows})
    dates = sorted({str(row.get("date", "undated")) for row in rows})
    count = f"{counted(first['prompts'], 'prompt')}, seeds from {first['seed']}, " if "prompts" in first else ""
    libraries = (f"{name} {version}" for name, version in first.get("libraries", {}).items())
    return ", ".join([f"{count}{', '.join(places)}", " to ".join(dict.fromkeys((dates[0], dates[-1]))), *libraries])


def make_table(args) -> None:
    printed, timed = paper(args.what), args.what == "table4" and args.model != "full"
    models = [model for model in printed["models"] if not args.folders or model["folder"] in args.folders]
    if not models:
        known = ", ".join(model["folder"] for model in printed["models"])
        raise UserError(f"--folders {','.join(args.folders)}: {args.what} is about {known}")
    parts, joined = [f"# Table {printed['table']}: {printed['title']}"], []
    for model in models:
        rows = bench(args, model) if timed else measure(args, model)
        if not rows:  # --dry-run
            continue
        pairs = join(model, rows)
        columns = model.get("columns") or printed["columns"]
        subject = {"demo": "the embedded demo", "random": "random weights", "full": rows[0].get("model")}[args.model]
        subject = "random weights at toy size" if timed and args.model == "demo" else subject
        parts += [f"## {paper('models')[model['folder']]['name']}", table(columns, pairs, LOOP if timed else MEASURED)]
        parts += [f"Measured: {subject}, {origin(rows)}. The paper's columns: {printed['machine']}."]
        joined += [{"folder": model["folder"], "paper": p, "measured": row} for p, row in pairs]
    text = "\n\n".join(parts) + "\n"
    if not joined:
        return
    write_atomically(args.out / f"{args.what}.md", text.encode())
    write_atomically(args.out / f"{args.what}.json", (json.dumps(joined, indent=1, default=float) + "\n").encode())
    print(text)


# --- the command line ------------------------------------------------------------------------------------------------


def open_parser(doc: str, what: tuple[str, ...], models: tuple[str, ...]) -> ArgumentParser:
    """Return a parser with the flags that tables and figures share."""
    parser = ArgumentParser(description=doc)
    parser.add_argument("what", choices=what)
    parser.add_argument("--model", choices=models, default="demo", help="what is measured")
    parser.add_argument("--prompts", type=Path, help="one prompt a line: VBench's or MS-COCO's; --model full needs it")
    text = "of --model full: a folder with directories named as on the Hub, FLUX.1-dev/ and so on (default: the Hub)"
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--out", type=Path, help="folder for what is made (default: runs/reproduce/WHAT-MODEL)")
    parser.add_argument("--folders", default="", metavar="F,F,…", help="model folders (default: the paper's)")
    return parser


def parse_arguments(parser: ArgumentParser):
    """Return the checked arguments; args.rest are the flags for the script that measures."""
    args, args.rest = parser.parse_known_args()
    if args.model == "full" and not args.prompts:
        raise UserError("--model full needs --prompts FILE (PROMPTS=FILE): one prompt a line, VBench's or MS-COCO's")
    if args.prompts:
        read_prompts(args.prompts)
    args.folders = [name.strip("/") for name in args.folders.split(",") if name]
    unknown = [name for name in args.folders if name not in paper("models")]
    if unknown:
        raise UserError(f"--folders {','.join(unknown)}: choose from {', '.join(paper('models'))}")
    check_checkpoints(args)
    args.out = ensure_writable(args.out or ROOT / "runs" / "reproduce" / f"{args.what}-{args.model}")
    return args


def check_checkpoints(args) -> None:
    """Refuse --checkpoints that are not used, or not there."""
    if args.checkpoints is None:
        return
    if args.model != "full":
        raise UserError(f"--checkpoints {args.checkpoints} is of --model full: leave it out with {args.model}")
    args.checkpoints = args.checkpoints.expanduser().resolve()
    for folder in args.folders:
        path = Path(checkpoint(args, folder))
        if not path.is_dir():
            download = f"hf download {paper('models')[folder]['checkpoint']} --local-dir {path}"
            raise UserError(f"--checkpoints {args.checkpoints}: no {path.name} in it; `{download}` puts it there")


def main():
    parser = open_parser(__doc__, ("table1", "table2", "table3", "table4"), ("demo", "random", "full"))
    parser.add_argument("--extra", default="fewer-steps,budget", metavar="M,M,…", help="methods that the paper lacks")
    args = parse_arguments(parser)
    args.extra = [name for name in args.extra.split(",") if name]
    unknown = [name for name in args.extra if name not in METHODS]
    if unknown:
        raise UserError(f"--extra {','.join(unknown)}: choose from {', '.join(METHODS)}")
    if args.model == "random" and args.what != "table4":
        raise UserError(f"--model random has no images, so no {args.what}: use demo or full")
    make_table(args)


if __name__ == "__main__":
    run_program(main)
