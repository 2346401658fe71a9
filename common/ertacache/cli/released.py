"""`ertacache import`: a schedule that was found elsewhere, as a plan."""

from pathlib import Path

from ertacache.calibration.released import import_schedule
from ertacache.cli.request import Request
from ertacache.utils.errors import UserError
from ertacache.utils.files import check_file


def run(request: Request, schedule: str, out: Path, force: bool) -> None:
    """Make the plan of a released list, of a file, or of steps with commas between them, and save it."""
    if out.suffix != ".json":
        raise UserError(f"--out {out}: give the name of a .json file, for example plans/imported.json")
    if out.exists() and not force:
        raise UserError(f"{out} is there already: give --force to write over it, or another --out")
    check_file(out)
    words = schedule.split(",")
    source = [int(word) for word in words] if all(word.strip().isdecimal() for word in words) else schedule
    pipe = request.load()
    with request.calling():
        plan = import_schedule(pipe, source, prompt=request.prompts[0], **request.arguments)
    plan.save(out)
    print(f"{plan.nfe} of {plan.steps} calls ({plan.speedup:.2f}×), the output reused between them → {out}")
