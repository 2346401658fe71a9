"""Which of diffusers' pipelines plans work in: each is built with tiny random models, calibrated, and run with plans.

    .venv/bin/python scripts/bench/census.py --json runs/census.json
    .venv/bin/python scripts/bench/census.py Flux StableDiffusionXL        # names that begin so
    .venv/bin/python scripts/bench/census.py --sample 8                    # others on each day
    .venv/bin/python scripts/bench/census.py --dtype bfloat16              # as real checkpoints are loaded

A pipeline works if `ertacache.calibrate` makes plans for it, if at 1× its result is the uncached one bit for bit, if at
2× and 3× its denoisers are called at the computed steps alone and the error is the one that was predicted, and if it is
as before after `disable`. It is refused if one line says so before its first model call. Rows of finished pipelines are
taken from the JSON file. The exit code is 1 if a pipeline neither works nor is refused.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts

import contextlib
import inspect
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

import torch

import ertacache
from ertacache import UserError
from ertacache.calibration.paused_call import arguments_of_call, prompt_argument, unchanged
from ertacache.cli.arguments import ArgumentParser, check_counts
from ertacache.evaluation.table import facts
from ertacache.numerics.schedulers import NOISE
from ertacache.pipelines.enable import originals
from ertacache.pipelines.enabled import enabled_of
from ertacache.pipelines.scheduler import is_planned
from ertacache.utils.denoisers import DENOISERS
from ertacache.utils.errors import run_program
from ertacache.utils.files import of_earlier_run, write_atomically
from ertacache.utils.tables import markdown

TESTS = Path(__file__).resolve().parents[2] / "common" / "tests"  # where the builders are
BUILDERS = ("census_images", "census_videos", "census_unets")
PROMPTS = ("a red star", "a blue sea", "a green cat on a chair", "an old tree")
FITTED = 3  # of them, which the weights are fitted on
SPEEDUPS = (1, 2, 3)
TOLERANCE = {"float32": 0.02, "bfloat16": 0.2}  # of the predicted error
LOADS = re.compile(r": pipe\.scheduler = diffusers\.(\w+)\.from_config\((?:\{.*?\}|[\w.]+)(?:, )?(.*)\)$")
WORKS, REFUSED, FAILS, NOT_BUILT = "works", "refused", "fails", "not built"


@dataclass
class Row:
    """What became of a pipeline.

    Attributes:
        name: Of its class.
        outcome: "works", "refused", "fails" or "not built".
        note: Why, and what to do.
        scheduler: Its class.
        calls: Denoiser calls of a run, uncached and at each speed-up.
        seconds: That the examination took.
    """

    name: str
    outcome: str
    note: str = ""
    scheduler: str = ""
    calls: tuple[int, ...] = ()
    seconds: float = 0.0


class Calls:
    """Counts the calls of a pipeline's denoisers by step while it follows a plan; uncached, all at step −1.

    Attributes:
        at: The number of calls by step.
        finals: While it follows a plan, what the scheduler's last step returns in each run, and which of the numbers
            the pipeline leaves to the scheduler.
    """

    def __init__(self, pipe):
        self.pipe, self.at, self.finals = pipe, Counter(), []
        parts = {name: part for name, part in originals(pipe).items() if name in DENOISERS}
        self.handles = [part.register_forward_pre_hook(self.note) for part in parts.values()]

    def note(self, *_):
        if not is_planned(self.pipe.scheduler):
            self.at[-1] += 1
            return
        course = self.pipe.scheduler.enabled.course
        if course is not None and not course.is_over:  # else it is a call before the loop, as of a prior
            self.at[course.step] += 1  # None before the first step

    def __enter__(self):
        if is_planned(self.pipe.scheduler):
            self.step, self.pipe.scheduler.step = self.pipe.scheduler.step, self.keep
            self.before = self.free = None
        return self

    def keep(self, *args, **kwargs):
        sample, output = kwargs.get("sample", args[2] if len(args) > 2 else None), self.step(*args, **kwargs)
        same = torch.ones_like(sample, dtype=bool) if self.before is None else unchanged(sample, self.before)
        self.free = same if self.free is None else self.free & same
        self.before = (output[0] if isinstance(output, tuple) else output.prev_sample).clone()
        run = self.pipe.scheduler.run
        if run.next == run.course.end:
            self.finals.append((self.before, self.free))
            self.before = self.free = None
        return output

    def __exit__(self, *_):
        if is_planned(self.pipe.scheduler):
            del self.pipe.scheduler.step
        if None in self.at:
            self.at[enabled_of(self.pipe).last.begin] += self.at.pop(None)
        for handle in self.handles:
            handle.remove()


class Unable(Exception):
    """A pipeline that does not run in a dtype."""


class Wrong(Exception):
    """A pipeline that neither works nor is refused."""


def examine(tiny, steps: int, tolerance: float) -> tuple[tuple[int, ...], str]:
    """Calibrate a pipeline and follow its plans.

    Returns:
        Denoiser calls uncached, and at each of SPEEDUPS; and what is peculiar.

    Raises:
        UserError: It is refused, before a model call.
        Wrong: It does not work.
    """
    pipe = tiny.pipe
    name = prompt_argument(pipe)
    prompts = [prompt_of(tiny, name, text) for text in PROMPTS]
    changes = [{name: [value] if isinstance(value, int) else value} if value is not None else {} for value in prompts]
    with Calls(pipe) as calls:
        plain = [tiny.run(steps, seed, **change) for seed, change in enumerate(changes)]
    uncached = calls.at.total() // len(prompts)
    arguments = {key: value for key, value in tiny.arguments.items() if key != name}
    if "num_inference_steps" in arguments_of_call(pipe)[0]:
        arguments["num_inference_steps"] = steps
    with Calls(pipe) as calls, tempfile.TemporaryDirectory() as work:
        try:
            options = {"effort": "quick", "progress": False, "work": work}
            plans = ertacache.calibrate(pipe, prompts, SPEEDUPS, **options, **arguments)
        except UserError as error:
            if calls.at.total():
                raise Wrong(f"refused after {calls.at.total()} model calls: {error}") from error
            raise
    ertacache.enable(pipe, plans, on_drift="ignore")
    per_step, counts, note = {}, [uncached], ""
    for speedup in SPEEDUPS:
        ertacache.speedup(pipe, speedup)
        plan, count = plans[speedup], FITTED if speedup < SPEEDUPS[-1] else 1
        with Calls(pipe) as calls:
            found = [tiny.run(steps, seed, **changes[seed]) for seed in range(count)]
        counts.append(calls.at.total() // count)
        if speedup == 1:
            per_step, finals = {step: made // count for step, made in calls.at.items()}, calls.finals
            if not all(map(torch.equal, found, plain)):
                raise Wrong(f"at 1× it is {(found[0] - plain[0]).abs().max():.2g} from the uncached result")
        else:
            others = set(calls.at).difference(plan.computed)
            planned = {step: made for step, made in calls.at.items() if step not in others}
            if planned != {step: count * per_step[step] for step in plan.computed} or len(others) > 1:
                raise Wrong(
                    f"at {speedup}× steps {sorted(calls.at)} were computed, of the plan's {list(plan.computed)}"
                )
            if others:
                note = f"step {others.pop()} is computed too, whose calls have other inputs than the one before"
        if not all(x.isfinite().all() for x in found):
            raise Wrong(f"at {speedup}× the result is not finite")
        if speedup == SPEEDUPS[1]:
            error = error_of(calls.finals, finals)
            if not abs(error / plan.predicted_error - 1) < tolerance:
                raise Wrong(f"at {speedup}× the error is {error:.3g}, predicted {plan.predicted_error:.3g}")
    ertacache.disable(pipe)
    if not torch.equal(tiny.run(steps, 0, **changes[0]), plain[0]):
        raise Wrong("after disable it is not as before")
    return tuple(counts), note


def error_of(found: list[tuple], expected: list[tuple]) -> float:
    """Return the geometric mean over runs of the mean squared error of `Calls.finals`."""
    pairs = [(x - y) * free for (x, _), (y, free) in zip(found, expected, strict=True)]
    return math.exp(sum(math.log(error.double().square().mean() + 1e-300) for error in pairs) / len(pairs))


def prompt_of(tiny, name: str, text: str):
    """Return what a pipeline takes in place of a text; where it takes none, what the builder gives."""
    if name == "class_labels":
        return len(text)
    return text if name in ("prompt", "content_prompt", "editing_prompt") else tiny.arguments.get(name)


def built(build: Callable, dtype: str):
    """Build a pipeline in a dtype.

    Raises:
        Unable: It does not run so, of itself or because the builder's stand-ins for encoders are of another dtype.
    """
    from tiny_pipelines import in_dtype

    tiny = build()
    if dtype != "float32":
        tiny = in_dtype(tiny, getattr(torch, dtype))
        try:
            tiny.run(2)
        except Exception as error:
            raise Unable(f"does not run in {dtype} here: {error}") from error
    return tiny


def row_of(name: str, build: Callable, steps: int, dtype: str = "float32") -> Row:
    """Build and examine a pipeline; one that is refused for its scheduler again with the one that the line loads."""
    start, row = time.perf_counter(), Row(name, NOT_BUILT)
    try:
        with quiet():
            tiny = built(build, dtype)
            scheduler = originals(tiny.pipe).get("scheduler")
            row.scheduler = type(scheduler).__name__
            try:
                (row.calls, row.note), row.outcome = examine(tiny, steps, TOLERANCE[dtype]), WORKS
            except UserError as error:
                row.outcome, row.note = REFUSED, str(error)
                line = str(error).rpartition(": pipe.scheduler = ")[2]
                if line != str(error):
                    row.calls = _with_scheduler(built(build, dtype), line, steps, TOLERANCE[dtype])
    except Unable as reason:
        row.note = str(reason)
    except Wrong as problem:
        row.outcome, row.note = FAILS, str(problem)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        row.note = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        row.outcome = FAILS if row.scheduler else NOT_BUILT
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _with_scheduler(tiny, code: str, steps: int, tolerance: float) -> tuple[int, ...]:
    """Examine a pipeline with the scheduler that an expression makes; () where it is refused too."""
    import diffusers

    tiny.pipe.scheduler = eval(code, {"pipe": tiny.pipe, "diffusers": diffusers})
    try:
        return examine(tiny, steps, tolerance)[0]
    except UserError:
        return ()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what diffusers has to say about models that are too small."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def pipelines() -> list[str]:
    """Return the names of diffusers' pipelines, without deprecated ones."""
    import diffusers

    known = []
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not inspect.isclass(kind) or not hasattr(kind, "from_pretrained"):
            continue
        is_old = "deprecated" in kind.__module__ or any(base.__name__.startswith("Deprecated") for base in kind.__mro__)
        is_here = kind.__module__.startswith(("diffusers.pipelines", "diffusers.modular_pipelines"))
        if not is_old and is_here and "__call__" in dir(kind) and name != "ModularPipeline":
            known.append(name)
    return known


def builders() -> tuple[dict[str, Callable], dict[str, str]]:
    """Return the builders by name of pipeline, and why others have none."""
    sys.path.insert(0, str(TESTS))
    build, cannot = {}, {}
    for module in map(import_module, BUILDERS):
        build |= module.PIPELINES
        cannot |= module.CANNOT
    return build, cannot


def answer(row: Row) -> str:
    """Return whether plans work in a pipeline, in a few words."""
    if row.outcome == WORKS:
        return f"yes; {row.note}" if row.note else "yes"
    loaded = LOADS.search(row.note)
    if row.calls and loaded:
        scheduler, changes = loaded.groups()
        return f"with `{changes if scheduler == row.scheduler else scheduler}`"
    if row.outcome == REFUSED:
        return "no: " + re.sub(r"^(the pipeline's|a) \w+ |, which no plan can follow.*$", "", row.note)
    return f"{row.outcome}: {row.note}"


def matrix(rows: list[Row]) -> str:
    """Return the rows as a Markdown table, whose last row counts them."""
    head = ["pipeline", "plans", "calls", "scheduler"]
    ordered = sorted(rows, key=lambda row: row.name)
    table = [
        (
            row.name.removesuffix("Pipeline"),
            answer(row),
            ", ".join(map(str, row.calls)),
            row.scheduler.removesuffix("Scheduler"),
        )
        for row in ordered
    ]
    built = [row for row in rows if row.outcome != NOT_BUILT]
    random = [row for row in built if row.outcome == REFUSED and NOISE in row.note]
    twins = [row for row in built if row.outcome == REFUSED and row.calls]
    works = [row for row in built if row.outcome == WORKS]
    all_of_them = (
        f"{len(works)} of the {len(built) - len(random)} that draw no noise work as they are, "
        f"{len(twins)} more pipelines with a change, {sum(row.outcome == FAILS for row in rows)} fail"
    )
    table.append((f"**{len(built)} that were built, of {len(rows)}**", f"**{all_of_them}**", "", ""))
    return f"{markdown(head, table)}\n\n{facts(f'{len(rows)} pipelines')}"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of names of pipelines; all without any")
    parser.add_argument("--steps", type=int, default=8, help="num_inference_steps")
    parser.add_argument("--sample", type=int, help="examine so many, others on each day")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32", help="of weights and text states")
    parser.add_argument("--json", type=Path, help="file that keeps the rows; one for each dtype")
    arguments = parser.parse_args()
    check_counts(arguments, "steps", "sample")
    build, cannot = builders()
    names = pipelines()
    if arguments.names:
        names = [name for name in names if name.startswith(tuple(arguments.names))]
        if not names:
            raise UserError(f"{', '.join(arguments.names)}: no pipeline of that name")
    if arguments.sample:
        names = [name for name in names if name in build]
        first = date.today().toordinal() * arguments.sample % len(names)
        names = (names * 2)[first : first + arguments.sample]
    kept = {}
    if arguments.json:
        kept = of_earlier_run(arguments.json, lambda rows: {row["name"]: Row(**row) for row in rows}, {})
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    rows = []
    for number, name in enumerate(names, 1):
        if name in build:
            row = kept.get(name) or row_of(name, build[name], arguments.steps, arguments.dtype)
        else:
            row = Row(name, NOT_BUILT, cannot.get(name, "no builder"))
        rows.append(row)
        print(f"{number}/{len(names)} {name}: {row.outcome} {row.note[:160]}".rstrip(), file=sys.stderr)
        if arguments.json:
            merged = kept | {row.name: row for row in rows}
            write_atomically(arguments.json, json.dumps([asdict(row) for row in merged.values()], indent=1).encode())
    print(matrix(rows))
    if any(row.outcome == FAILS for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
