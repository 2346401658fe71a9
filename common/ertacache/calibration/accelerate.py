"""Plans without files: `ertacache.accelerate(pipe, speedup=2)` finds one for the pipeline, or makes it once."""

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from ertacache.calibration.effort import Effort, effort_of, serves
from ertacache.calibration.from_pipeline import calibration_prompts, check_call, make_plans, requirements_of
from ertacache.calibration.paused_call import arguments_of_call, prompt_argument
from ertacache.calibration.session import digest_of
from ertacache.pipelines.enable import check_on_drift, enable
from ertacache.plans import Plan, PlanSet
from ertacache.plans.names import budget_of
from ertacache.plans.store import WORK, PlanStore
from ertacache.utils import parallel
from ertacache.utils.checkpoints import digest
from ertacache.utils.errors import UserError
from ertacache.utils.files import writable
from ertacache.utils.locks import exclusive
from ertacache.utils.provenance import fingerprint


def accelerate(
    pipe,
    speedup: float | Sequence[float] = 2,
    prompts: Sequence | None = None,
    *,
    effort: str | float = "quick",
    batch_size: int = 1,
    on_drift: str = "warn",
    **call_kwargs,
) -> Plan | PlanSet:
    """Have a pipeline make its results with fewer model calls: by a plan of the user's store, or one made now, once.

    A plan is for exactly these weights, this scheduler, number of steps and settings, so give the arguments that later
    calls will have. Making one costs as much as 24 uncached results with "quick" (for the first speed-up, 16 more for
    each further one), which it says before it begins; it is stored, and the next process finds it. A second process
    that wants the same plan waits for it. After an interruption the same call goes on.

    Args:
        pipe: A diffusers pipeline that plans work in.
        speedup: T/N, from 1 to T/2; or several, between which `ertacache.speedup(pipe, …)` switches.
        prompts: Like those to come, as in `calibrate`. By default those that ship with the package; a plan that was
            made on others is taken too.
        effort: "quick", "normal", "thorough" or a number of minutes, as in `ertacache.calibrate`. A stored plan of less
            effort is made anew; one that was made in minutes counts as "quick", and for fewer minutes.
        batch_size: Prompts per call of the calibration.
        on_drift: As in `ertacache.enable`.
        **call_kwargs: Arguments of the pipeline's call (num_inference_steps, height, guidance_scale, …).

    Returns:
        The plan that the pipeline follows now; of several speed-ups all, of which it follows the least.

    Raises:
        UserError: An argument out of range, or a pipeline that no plan can follow.

    Example:
        >>> ertacache.accelerate(pipe, speedup=2, num_inference_steps=30)
        >>> image = pipe("a lighthouse in a storm", num_inference_steps=30).images[0]
    """
    check_on_drift(on_drift)
    plans = find_plans(pipe, speedup, prompts, effort=effort, batch_size=batch_size, call_kwargs=call_kwargs)
    enable(pipe, plans, on_drift=on_drift)
    return plans.first if isinstance(speedup, int | float) else plans


def find_plans(
    pipe,
    speedup: float | Sequence[float],
    prompts: Sequence | None = None,
    *,
    effort: str | float = "quick",
    batch_size: int = 1,
    call_kwargs: Mapping[str, Any],
) -> PlanSet:
    """Return the plans of `accelerate` from the user's store; those that are not there are calibrated into it."""
    speedups = [speedup] if isinstance(speedup, int | float) else speedup
    limits = effort_of(effort)
    given = None if prompts is None else calibration_prompts(pipe, prompts, "give some, or leave prompts out")
    steps = check_call(pipe, speedups, batch_size, call_kwargs, "speedup")
    if given is None and prompt_argument(pipe) != "prompt":
        text = f"a {type(pipe).__name__} takes no prompt, so that those that ship with ertacache say nothing to it"
        raise UserError(f"{text}: give prompts, a list of values of {prompt_argument(pipe)}")
    store = PlanStore()
    entry = store.entry(requirements_of(pipe, steps, call_kwargs), weights_of(pipe))
    budgets = {number: budget_of(steps, number, "speedup") for number in speedups}

    def known() -> dict[float, Plan]:
        """Return what the store has, on all ranks what rank 0 finds."""
        found = {number: store.find(entry, budget) for number, budget in budgets.items()} if parallel.is_main() else {}
        return {number: plan for number, plan in parallel.share(found).items() if plan and _serves(plan, given, limits)}

    found = known()
    if len(found) < len(budgets):
        with _place_for(entry) as (folder, is_stored), exclusive(folder / "lock", "making the same plan"):
            found = known()  # made by the process that this one has waited for
            missing = [number for number in budgets if number not in found]
            if missing:
                texts = shipped_prompts(pipe) if given is None else given

                def save(plans: PlanSet) -> None:
                    if is_stored:
                        for plan in plans.members:
                            _store(store, entry, plan)

                options = {"seed": 0, "batch_size": batch_size, "effort": effort, "work": folder / WORK}
                options["argument"] = "speedup"
                options["announce"] = partial(_announce, pipe, steps, missing, limits, folder if is_stored else None)
                found |= make_plans(pipe, texts, missing, save, **options, call_kwargs=call_kwargs)
                with contextlib.suppress(OSError):  # what lies in it belongs to another calibration
                    (folder / WORK).rmdir()
    return PlanSet(found)


def shipped_prompts(pipe) -> list[str]:
    """Return the calibration prompts that ship with the package, for images or for videos."""
    return packaged_prompts("num_frames" in arguments_of_call(pipe)[0])


def packaged_prompts(videos: bool, held_out: bool = False) -> list[str]:
    """Return prompts that ship with the package: 16 to calibrate on, or 8 others to measure on."""
    name = f"{'held-out-' * held_out}{'videos' if videos else 'images'}.txt"
    return (files("ertacache") / "prompts" / name).read_text("utf-8").splitlines()


def weights_of(pipe) -> str:
    """Return the name of the store's folder for a pipeline's weights: their fingerprint, or where it came from."""
    found = fingerprint(pipe)
    return found if found != "offloaded" else f"offloaded-{digest(str(getattr(pipe, 'name_or_path', '')))[:16]}"


def _serves(plan: Plan, prompts: list | None, effort: Effort) -> bool:
    """Return whether a stored plan is what is asked for: made with no less effort, on the prompts that are given."""
    recorded = plan.provenance.get("calibration", {}).get("effort")
    try:
        made = effort_of(recorded)
    except UserError:  # imported, or of another version
        return False
    if not serves(made, effort):
        return False
    used = None if prompts is None else digest_of(prompts[: made.prompts])
    return used in (None, plan.provenance.get("prompts", {}).get("sha256"))


@contextlib.contextmanager
def _place_for(entry: Path) -> Iterator[tuple[Path, bool]]:
    """Yield where to calibrate, and whether it is the store: one that cannot be written is done without."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(writable(entry))
        except UserError as error:
            warnings.warn(f"{error}; the plan will not be stored", stacklevel=5)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ertacache-"))
            yield Path(parallel.share(folder)), False
            return
        yield entry, True


def _announce(pipe, steps: int, speedups: Sequence[float], effort: Effort, entry: Path | None) -> None:
    if parallel.is_main():
        numbers = " and ".join(f"{number:g}×" for number in speedups)
        where = "" if entry is None else f"; it is kept in {entry}, and found there from then on"
        what = f"no plan yet for this {type(pipe).__name__} at {steps} steps, {numbers}"
        print(f"{what}: calibrating one ({effort.name}), only this once{where}", file=sys.stderr)


def _store(store: PlanStore, entry: Path, plan: Plan) -> None:
    """Store a plan; where that fails, it is still good for this process."""
    try:
        store.add(entry, plan)
    except UserError as error:
        warnings.warn(f"{error}; the plan is not stored", stacklevel=2)
