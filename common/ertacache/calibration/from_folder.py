"""Plans of a model folder: finds the stored plan that a run asks for, or calibrates it."""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.effort import effort_of
from ertacache.calibration.search import Interrupted, goes_on, is_finished, keep_unfinished
from ertacache.calibration.session import CalibrationSession, recorded
from ertacache.calibration.threshold import ThresholdCalibration
from ertacache.demos.model_folder import Sampler, draws_captions
from ertacache.plans.names import (
    budget_name,
    budget_of,
    check_budget,
    check_speedups,
    threshold_name,
    with_settings,
)
from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Requirements
from ertacache.plans.schema import check_levels
from ertacache.plans.threshold import check_threshold
from ertacache.utils import parallel
from ertacache.utils.errors import UserError
from ertacache.utils.files import read_prompts, writable
from ertacache.utils.provenance import fingerprint


@dataclass(frozen=True)
class PlanRequest:
    """The plan that a run asks for: by λ, by a number of computed steps, or by its file. Checked when it is made.

    Args:
        model: "demo", a directory or a Hub id, as the run loads it.
        steps: T, steps of the uncached run.
        threshold: λ > 0 of a threshold plan.
        site: Cache site of a threshold plan, "output" or "blocks".
        budget: N of a budget plan, from 2 to T.
        speedup: T/N in place of `budget`, at least 1.
        target: Of a budget plan, "reference" or "exact".
        file: Of a plan, in place of the others.

    Raises:
        UserError: A number out of range; the message names the flag.
    """

    model: str
    steps: int
    threshold: float | None = None
    site: str = "output"
    budget: int | None = None
    speedup: float | None = None
    target: str = "reference"
    file: Path | None = None

    def __post_init__(self):
        if [self.threshold, self.budget, self.speedup, self.file].count(None) != 3:
            raise UserError("ask for a plan in one way: --threshold λ, --speedup S, --budget N or --plan FILE")
        if self.threshold is not None:
            check_threshold(self.threshold, "--threshold")
        if self.speedup is not None:
            check_speedups([self.speedup], "--speedup")
        if self.computed is not None:
            check_budget(self.computed, self.steps, "--budget" if self.speedup is None else "--speedup", self.speedup)

    @property
    def computed(self) -> int | None:
        """N of the budget plan that is asked for."""
        return self.budget if self.speedup is None else budget_of(self.steps, self.speedup)

    @property
    def name(self) -> str:
        """File name of the plan in a model folder's cache/."""
        if self.threshold is not None:
            return threshold_name(self.model, self.steps, self.threshold, self.site)
        return budget_name(self.model, self.steps, self.computed, self.target)

    def __str__(self) -> str:
        if self.threshold is not None:
            return f"λ = {self.threshold:g}"
        return f"{self.computed} of {self.steps} steps" + (", exact target" if self.target == "exact" else "")


@dataclass(frozen=True)
class CalibrationOptions:
    """How a plan is calibrated that is not stored yet. Checked when it is made.

    Args:
        prompts: File with one prompt per line; None for the model folder's own.
        batch_size: Prompts per call, at least 1.
        effort: quick, normal, thorough or a number of minutes (effort.py).
    """

    prompts: Path | None = None
    batch_size: int = 4
    effort: str | float = "quick"

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: give a whole number of at least 1")
        effort_of(self.effort, "--effort")


def find_plan(
    sampler: Sampler, pipe, settings: dict[str, Any], request: PlanRequest, options: CalibrationOptions
) -> tuple[Plan, Path]:
    """Return the plan that a run asks for, and its path: named by the request, stored, or calibrated now.

    Args:
        sampler: The model folder.
        pipe: Its pipeline.
        settings: The run's, of `sampler.settings_of`.
        request: Which plan.
        options: Of the calibration, where none is stored.

    Raises:
        PlanError: The plan was made for another model, scheduler or number of steps.
    """
    path, remedy = request.file, "make one with --threshold or --speedup instead of --plan"
    if path is None:
        shipped, store = sampler.FOLDER / "cache" / request.name, PlanStore(sampler, pipe, settings)
        path, remedy = store.path(request.name), f"make one for them with scripts/calibrate.py {sampler.FOLDER.name}"
        if not _is_plan(path):
            if not _is_plan(shipped):
                return _calibrate(sampler, pipe, settings, request, options, store)
            path = shipped
    plan = Plan.load(path)
    plan.check(Requirements.of(pipe, settings["steps"], recorded(pipe, settings)), remedy)
    weights, present = plan.provenance.get("weights"), fingerprint(pipe)
    if weights != present and "offloaded" not in (weights, present):
        warnings.warn(f"the plan was calibrated on other weights ({weights}, now {present}): {remedy}", stacklevel=2)
    return plan, path


def _is_plan(path: Path) -> bool:
    """Return whether a finished plan is there."""
    return path.exists() and is_finished(Plan.load(path))


def _calibrate(
    sampler: Sampler,
    pipe,
    settings: dict[str, Any],
    request: PlanRequest,
    options: CalibrationOptions,
    store: "PlanStore",
) -> tuple[Plan, Path]:
    """Calibrate the plan of a request into the store."""
    text = f"no plan for {request} yet: calibrating one"
    say = partial(announce, text, options.effort, f"{store.path(request.name)}, once")
    session_of = partial(open_session, sampler, pipe, settings, request.model, options, store.folder)
    if request.threshold is not None:
        return calibrate_thresholds(session_of, options.effort, [request.threshold], request.site, store, say)[0]
    return calibrate_budgets(session_of, options.effort, [request.computed], request.target, store, say)[0]


def announce(what: str, effort: str | float, where: str) -> None:
    """Say, before the first model call, what is calibrated and in which file the plan will be."""
    if parallel.is_main():
        how = f"({effort_of(effort).name}) into {where}"
        print(f"{what} {how}; Ctrl-C and the same command again go on", file=sys.stderr)


class PlanStore:
    """The plans that runs of a model folder have made, in its cache/local/; their names say for which settings.

    The plans that it ships lie in cache/ and stay as they are.

    Args:
        sampler: The model folder.
        pipe: Its pipeline.
        settings: The run's.
    """

    def __init__(self, sampler: Sampler, pipe, settings: dict[str, Any]):
        self.folder = sampler.FOLDER / "cache" / "local"
        self.settings, self.weights = recorded(pipe, settings), fingerprint(pipe)

    def path(self, name: str) -> Path:
        """Return the path of a plan, by its name without settings."""
        return self.folder / with_settings(name, self.settings, self.weights)


class PlainFolder:
    """A folder of plans whose names do not say the settings, as those that a model folder ships.

    Args:
        folder: It.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path:
        """Return the path of a plan, by its name."""
        return self.folder / name


def open_session(
    sampler: Sampler,
    pipe,
    settings: dict[str, Any],
    model: str,
    options: CalibrationOptions,
    work: Path,
    most: int | None = None,
) -> CalibrationSession:
    """Return a session on the prompts of the options, or on the folder's own.

    Args:
        sampler: The model folder.
        pipe: Its pipeline.
        settings: The run's.
        model: As the run loads it.
        options: Of the calibration.
        work: Folder for its checkpoints.
        most: Number of prompts to use, the first of them; None for all.
    """
    default = "calibration-demo.txt" if draws_captions(sampler, model) else "calibration.txt"
    prompts = read_prompts(options.prompts or sampler.FOLDER / "prompts" / default)[:most]
    return CalibrationSession(
        sampler,
        pipe,
        prompts,
        range(len(prompts)),
        settings=settings,
        batch_size=options.batch_size,
        work=work,
        model_id=model,
    )


def calibrate_thresholds(
    session_of: Callable[[int | None], CalibrationSession],
    effort: str | float,
    thresholds: Sequence[float],
    site: str,
    store: PlanStore | PlainFolder,
    announce: Callable[[], None] = lambda: None,
) -> list[tuple[Plan, Path]]:
    """Calibrate a threshold plan for each λ and store it.

    Args:
        session_of: session_of(most) opens the session on so many prompts, the first of them; None for all.
        effort: quick, normal, thorough or a number of minutes.
        thresholds: λ of each plan.
        site: "output" or "blocks".
        store: For the plans.
        announce: Called before the first model call, once nothing stands in its way.
    """
    session = session_of(effort_of(effort).threshold_prompts)
    paths = [store.path(threshold_name(session.model, session.steps, threshold, site)) for threshold in thresholds]
    with writable(session.work), goes_on(), session.exclusive() as waited:
        if waited and all(map(_is_plan, paths)):
            return [(Plan.load(path), path) for path in paths]
        check_levels(session.inputs(0).sigmas.tolist(), session.requirements.scheduler)
        calibration = ThresholdCalibration(session, site)
        announce()
        return _save(calibration, calibration.plans(thresholds, effort), paths)


def calibrate_budgets(
    session_of: Callable[[int | None], CalibrationSession],
    effort: str | float,
    budgets: Sequence[int],
    target: str,
    store: PlanStore | PlainFolder,
    announce: Callable[[], None] = lambda: None,
) -> list[tuple[Plan, Path]]:
    """Calibrate a budget plan for each number of computed steps and store it; one trajectory serves all.

    Ctrl-C stores the best plan so far of the one in progress. Arguments: as of `calibrate_thresholds`, and the target.
    """
    session = session_of(effort_of(effort).prompts)
    paths = {budget: store.path(budget_name(session.model, session.steps, budget, target)) for budget in budgets}
    try:
        with writable(session.work), goes_on(), session.exclusive() as waited:
            if waited and all(map(_is_plan, paths.values())):
                return [(Plan.load(path), path) for path in paths.values()]
            calibration = BudgetCalibration(session, target)
            announce()
            return _save(calibration, calibration.each_plan(list(paths), effort), list(paths.values()))
    except Interrupted as stop:
        if parallel.is_main():
            keep_unfinished(stop.plan, paths[stop.plan.nfe])
        raise


def _save(calibration, plans: Iterable[Plan], paths: Sequence[Path]) -> list[tuple[Plan, Path]]:
    """Save each plan once it is there, by rank 0 (all ranks have the same plans); then delete the checkpoints."""
    saved = []
    for plan, path in zip(plans, paths, strict=True):
        saved.append((plan, path))
        if parallel.is_main():
            plan.save(path)
    calibration.finish()
    return saved
