"""`ertacache import`: a schedule that was found elsewhere, as a plan."""

from pathlib import Path

from ertacache.calibration.released import import_schedule, read_schedule
from ertacache.cli.request import Request
from ertacache.utils.errors import UserError
from ertacache.utils.files import writable_files

LONGEST_WORD = 20  # characters of a computed step


def run(request: Request, schedule: str, out: Path, prompt: str, force: bool) -> None:
    """Make the plan of a released list, of a file, or of steps with commas between them, and save it."""
    if out.suffix != ".json":
        raise UserError(f"--out {out}: give the name of a .json file, for example plans/imported.json")
    if out.exists() and not force:
        raise UserError(f"{out} is there already: give --force to write over it, or another --out")
    words = schedule.split(",")
    is_list = all(word.strip().isdecimal() and len(word) < LONGEST_WORD for word in words)
    source = [int(word) for word in words] if is_list else schedule
    read_schedule(source)  # refused before the weights are loaded, as the arguments of the call are
    arguments = request.arguments
    with writable_files(out):
        pipe = request.load()
        with request.calling():
            plan = import_schedule(pipe, source, prompt=prompt, **arguments)
        plan.save(out)
    print(f"{plan.nfe} of {plan.steps} calls ({plan.speedup:.2f}×), the output reused between them → {out}")
