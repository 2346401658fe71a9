"""A scheduler that follows a plan in a stock diffusers pipeline.

The pipeline runs its T steps as always: same timesteps, step numbers, callbacks and windows. On the steps that the plan
skips its denoisers are not called (denoiser.py), and the scheduler steps by what the plan makes of the calls before.
"""

import functools
import inspect
import logging
import warnings

import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ertacache.numerics.schedulers import check_scheduler
from ertacache.pipelines.denoiser import put_back
from ertacache.pipelines.enabled import Enabled
from ertacache.pipelines.run import PlannedRun
from ertacache.pipelines.stand_in import EqualToItsOriginal, kind_for
from ertacache.pipelines.summary import summary_of

LOG = logging.getLogger("ertacache")


class PlannedScheduler(metaclass=EqualToItsOriginal):
    """Stands in for a pipeline's original scheduler, to which it delegates whatever is not defined here.

    To `isinstance` and `save_pretrained` its class is the original's; `is_planned` distinguishes them. The state of a
    run begins with `set_timesteps`, so that no other call, finished or not, can reach into it.

    Args:
        own: The original scheduler.
        enabled: Shared with the denoisers' stand-ins.
        in_use: Whether the original shows the grid of a run, as that of a copy made during a call does.
    """

    OWN = ("own", "enabled", "run", "in_use", "signature", "step", "set_timesteps", "__module__")

    def __new__(cls, own, *_, **__):
        return super().__new__(kind_for(PlannedScheduler, type(own)))

    def __init__(self, own, enabled: Enabled, in_use: bool = False):
        check_scheduler(own)
        self.own, self.enabled, self.run, self.in_use = own, enabled, None, in_use
        self.signature = inspect.signature(type(own).step)
        self.set_timesteps, self.step = _like(own.set_timesteps, self._set_timesteps), _like(own.step, self._step)
        self.__module__ = type(own).__module__  # save_pretrained writes it

    @property
    def __class__(self):
        return type(self.own)

    @property
    def plan(self):
        """The plan that it follows."""
        return self.enabled.plan

    def __reduce__(self):
        return PlannedScheduler, (self.own, self.enabled, self.run is not None or self.in_use)

    def __getattr__(self, name: str):
        if (name.startswith("__") and name.endswith("__")) or name == "own":
            raise AttributeError(name)
        return getattr(self.own, name)

    def __setattr__(self, name: str, value) -> None:
        if name in self.OWN:
            vars(self)[name] = value
        else:
            setattr(self.own, name, value)

    def __delattr__(self, name: str) -> None:
        if name in ("step", "set_timesteps"):  # a hook is taken off
            vars(self)[name] = _like(getattr(self.own, name), getattr(self, f"_{name}"))
        else:
            delattr(self.own, name)

    def _set_timesteps(self, *args, **kwargs) -> None:
        """Set the original scheduler's T steps, and begin a run on them."""
        with np.errstate(all="ignore"):  # a grid that comes to nothing is refused in one line
            self.own.set_timesteps(*args, **kwargs)
        self.begin(shown=False)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which step the call begins, also to a scheduler that does not ask for it, as PNDM's."""
        if hasattr(self.own, "set_begin_index"):
            self.own.set_begin_index(begin_index)
        elif self.run is not None:
            self.run.due = begin_index

    def begin(self, shown: bool) -> None:
        """Begin a run, unless the plan is for other steps or another scheduler."""
        self.enabled.check(self.own)
        put_back(self.enabled)
        self.run = PlannedRun(self.own, self.enabled, shown)

    def _step(self, model_output, timestep, sample, *args, **kwargs):
        """Make one step. Same arguments as the original scheduler's."""
        given = self.signature.bind(self.own, model_output, timestep, sample, *args, **kwargs).arguments
        return_dict = given.pop("return_dict", True)
        known = self.signature.parameters
        options = {n: value for n, value in list(given.items())[4:] if not _is_default(value, known[n].default)}
        if self.run is None:
            self.begin(shown=self.in_use)
        x = self.run.step(sample, model_output, timestep, options)
        if self.run.missed:
            text = f"no model call was skipped at step {self.run.next - 1}, as the plan has it"
            self.warn("missed", f"{text}: was the model put in after ertacache.enable? Call it again")
        if self.run.next == self.run.course.end:
            self.warn_of_drift()
        if self.run.course.is_over:
            self.report()
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    # --- warnings, each kind once ------------------------------------------------------------------------------------

    def warn(self, kind: str, text: str) -> None:
        if kind not in self.enabled.warned:
            self.enabled.warned.add(kind)
            warnings.warn(text, stacklevel=5)

    def warn_of_drift(self) -> None:
        """Warn of a run that is unlike those of the plan's calibration."""
        monitor = self.run.course.monitor
        if self.enabled.on_drift == "warn" and monitor is not None and "drift" not in self.enabled.warned:
            unusual = monitor.unusual(self.enabled.drift_limit)
            if unusual is not None:
                least, largest = monitor.calibrated.min(), monitor.calibrated.max()
                text = f"drift {unusual:.2g}, on the calibration prompts {least:.2g} to {largest:.2g}: the plan was not"
                remedy = "calibrate one with prompts and settings like these, or enable it with on_drift='compute'"
                self.warn("drift", f"{text} made for a run like this one, quality may be lower; {remedy}")

    def report(self) -> None:
        """Log what the call has done, and warn where its plan has skipped nothing."""
        course = self.run.course
        if course.plan is None:
            return
        if LOG.isEnabledFor(logging.INFO):
            LOG.info("%s", summary_of(course, self.enabled).last_call)
        if course.skipped == 0 and course.plan.speedup > 1 and not course.added:
            text = f"the plan has skipped no step of this call, which began at step {course.begin} of {course.steps}"
            self.warn("nothing", f"{text}: calibrate one for such calls")


def is_planned(scheduler) -> bool:
    """Return whether a scheduler is a stand-in."""
    return issubclass(type(scheduler), PlannedScheduler)


def _like(original, replacement):
    """Return the replacement with the signature of the original, which pipelines look at."""

    @functools.wraps(original)
    def call(*args, **kwargs):
        return replacement(*args, **kwargs)

    return call


def _is_default(value, default) -> bool:
    return value is None or value is default or (isinstance(value, (int, float, str, bool)) and value == default)
