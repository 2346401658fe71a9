"""What every calibration needs: prompts in batches, progress, checkpoints, provenance."""

import contextlib
import hashlib
import json
import math
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ertacache.calibration.choice import CHOICE_METRIC
from ertacache.calibration.effort import Effort
from ertacache.demos.model_folder import StepwiseSampler
from ertacache.pipelines.conditions import watching
from ertacache.plans.requirements import Requirements
from ertacache.utils import parallel
from ertacache.utils.checkpoints import Checkpoints, digest
from ertacache.utils.checks import steps_problem
from ertacache.utils.denoisers import denoiser_of
from ertacache.utils.errors import UserError
from ertacache.utils.locks import exclusive
from ertacache.utils.progress import Progress, duration
from ertacache.utils.provenance import fingerprint, library_versions
from ertacache.utils.words import counted


class CalibrationSession:
    """One sampler, pipeline and set of prompts, shared by the calibrations of any kind of plan.

    Args:
        sampler: Of a model folder, or a paused pipeline call.
        pipe: The pipeline.
        prompts: Calibration prompts, texts or what a pipeline takes in their place.
        seeds: One seed per prompt.
        settings: Keyword arguments of `sampler.prepare`, with `steps`.
        batch_size: Prompts per call.
        work: Folder for checkpoints, of T + 1 float32 latents per prompt; emptied by `finish` of a calibration.
        model_id: The model's name in a plan's provenance.
        progress: Whether to show a progress bar.

    Raises:
        UserError: No prompts, another number of seeds, or a number of steps that no plan has.
    """

    def __init__(
        self,
        sampler: StepwiseSampler,
        pipe,
        prompts: Sequence,
        seeds: Sequence[int],
        *,
        settings: dict[str, Any],
        batch_size: int,
        work: str | Path,
        model_id: str = "",
        progress: bool = True,
    ):
        if not prompts:
            raise UserError("no calibration prompts: give a file with one prompt a line")
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} calibration prompts but {len(seeds)} seeds: give one seed per prompt")
        self.steps = settings["steps"]
        problem = steps_problem(self.steps)
        if problem:
            raise UserError(problem)
        self.sampler, self.pipe, self.settings = sampler, pipe, dict(settings)
        self.prompts, self.seeds = list(prompts), list(seeds)
        self.batch_size, self.work = batch_size, Path(work)
        self.starts = range(0, len(prompts), batch_size)
        self.requirements = Requirements.of(pipe, self.steps, recorded(pipe, settings))
        self.identity = {
            "model": model_id,
            "weights": fingerprint(pipe),
            "prompts": {"count": len(prompts), "sha256": digest_of(prompts)},
            "seeds": self.seeds,
            "batch_size": batch_size,
        }
        self.silent = not (progress and parallel.is_main())
        self.progress = Progress("call", self.silent)
        self.conditions: dict[str, Any] = {}
        self.until = math.inf  # when the calibration is to end, on the clock of time.monotonic
        self.clock: list[tuple[float, int]] = []  # of the first and the latest model calls: when, and calls until then

    @property
    def model(self) -> str:
        """The model's name."""
        return self.identity["model"]

    @property
    def batches(self) -> int:
        """Number of batches that the prompts go through in."""
        return len(self.starts)

    def checkpoints(self, purpose: Any) -> Checkpoints:
        """Return the checkpoints of one purpose; another model, setting or set of prompts has others."""
        bound = [self.steps, self.requirements.model, self.requirements.scheduler, self.requirements.settings]
        return Checkpoints(self.work, [purpose, self.identity, bound], "calibration-", ".partial")

    def exclusive(self) -> AbstractContextManager[bool]:
        """Return a context in which no other process makes the same calibration; it says whether it had to wait."""
        return exclusive(self.checkpoints("lock").folder.with_suffix(".lock"), "calibrating the same plan")

    def inputs(self, batch: int, **changes):
        """Return the inputs of a batch of prompts, on the native grid. changes: of the settings."""
        part = slice(self.starts[batch], self.starts[batch] + self.batch_size)
        with np.errstate(all="ignore"):  # a grid that comes to nothing is refused in one line
            return self.sampler.prepare(self.pipe, self.prompts[part], self.seeds[part], **self.settings | changes)

    def run(
        self, checkpoints: Checkpoints, key: str, calls: int, sums_of: Callable[[int], dict[str, Any]]
    ) -> dict[str, np.ndarray]:
        """Sum `sums_of(batch)` over all batches, resuming from the checkpoints.

        Args:
            checkpoints: Of the calibration.
            key: Names the pass.
            calls: Model calls per batch, of those announced.
            sums_of: Runs one batch.
        """
        if checkpoints.finished(key) == self.batches and not checkpoints.has_value("conditions"):
            checkpoints.forget(key)  # damaged, or killed in between: a model call shows them
        self.spare(calls * len(parallel.mine(checkpoints.finished(key))))
        with watching(self.pipe) as seen:
            sums = checkpoints.sums(key, self.batches, sums_of)
        self.conditions = checkpoints.value("conditions", lambda: seen)
        return sums

    @property
    def calibrated(self) -> Requirements:
        """The requirements of a plan, with the conditions that the first model call has shown."""
        return replace(self.requirements, settings={**self.requirements.settings, **self.conditions})

    def announce(self, calls: int, effort: Effort, least: int) -> None:
        """Say what is to come, before it begins; from now on the effort's minutes count.

        Args:
            calls: The most model calls per batch.
            effort: Of the calibration.
            least: Model calls per batch without which there is no plan.
        """
        self.until, timed = time.monotonic() + 60 * effort.minutes, effort.minutes < math.inf
        calls = least if timed else calls
        self.progress.begin("calibration, uncached runs")
        self.progress.expect(self.of_this_process(calls))
        if not self.silent:
            size = min(self.batch_size, len(self.prompts))
            runs = calls * len(self.prompts) / self.steps
            text = f"{calls * self.batches} model calls with {counted(size, 'prompt')} each"
            text += f", the cost of {runs:.0f} uncached results"
            text = f"{text}, then a search, at most {effort.name} in all" if timed else f"at most {text}"
            print(f"calibration: {text}; Ctrl-C and the same again go on", file=sys.stderr)

    def of_this_process(self, calls: int) -> int:
        """Return how many model calls this process makes. calls: per batch."""
        return calls * len(parallel.mine(self.batches))

    def called(self, calls: int = 1) -> None:
        """Count model calls of this process; after the second one, say how long what was announced may take.

        Raises:
            UserError: Longer than the effort's minutes, at the least.
        """
        self.progress.update(calls)
        earlier = len(self.clock)
        self.clock = [*self.clock[:1], (time.monotonic(), self.progress.n)]
        calls_left = self.progress.total - self.progress.n
        if earlier != 1 or calls_left <= 0:
            return
        now, seconds = self.clock[1][0], calls_left * self.seconds_per_call
        if self.until < math.inf:
            time_left = self.until - now
            if seconds > time_left:
                text = f"the calibration takes at least {duration(seconds)} more, with {duration(time_left)} left"
                raise UserError(f"{text}: give a longer time, or fewer prompts or steps")
            self.progress.expect(int((time_left - seconds) / max(self.seconds_per_call, 1e-6)))
            seconds = time_left
        if not self.silent:
            print(f"calibration: at most {duration(seconds)}", file=sys.stderr)

    @property
    def seconds_per_call(self) -> float:
        """Seconds between the model calls so far, in the mean; 0 before the second one."""
        (began, first), (now, latest) = self.clock[:1] + self.clock[-1:] or [(0.0, 0)] * 2
        return (now - began) / max(1, latest - first)

    def allowance(self, calls: int, plans: int) -> tuple[int, float]:
        """Return what may be spent on the next one of so many plans: model calls per batch, and until when.

        Args:
            calls: The most per batch that its effort allows.
            plans: That are still to be made, which share the time.
        """
        if self.until == math.inf:
            return calls, self.until
        now = time.monotonic()
        time_left = max(0.0, self.until - now) / plans
        if self.seconds_per_call:
            calls = min(calls, int(time_left / max(1, self.of_this_process(1)) / self.seconds_per_call))
            self.progress.expect(self.progress.n + plans * self.of_this_process(calls) - self.progress.total)
        return parallel.share((calls, now + time_left))

    def spare(self, calls: int) -> None:
        """Take back announced model calls of this process that are not needed."""
        self.progress.expect(-calls)

    def require_finite(self, z: torch.Tensor, batch: int, step: int, source: str = "the model gave") -> None:
        """Refuse a model output, or latents, [B, …] with a non-finite value; the message names source and prompt."""
        finite = z.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            prompt = self.prompts[self.starts[batch] + finite.index(False)]
            text = f"{source} a non-finite value at step {step} of {prompt!r}"
            remedy = "try --dtype float32, in Python dtype=torch.float32, or other settings of the scheduler"
            raise UserError(f"{text}: {remedy}")

    def provenance(self, checkpoints: Checkpoints, chosen: str, errors: dict[str, float]) -> dict[str, Any]:
        """Return a plan's provenance: what it was learned from, and which candidates were tried.

        Args:
            checkpoints: Of the calibration; they keep the day on which it began.
            chosen: Name of the chosen candidate.
            errors: Of each candidate, by which they were compared.
        """
        return {
            **self.identity,
            "libraries": library_versions(),
            "date": checkpoints.value("date", lambda: date.today().isoformat()),
            "calibration": {"metric": CHOICE_METRIC, "chosen": chosen, "errors": errors},
        }

    def finish(self, checkpoints: Checkpoints) -> None:
        """Close the progress bar and delete the checkpoints; call it once the plans are saved."""
        self.progress.close()
        checkpoints.remove()


def existing(path: Path) -> Path:
    """Return the path of a checkpoint, unless another calibration with the same checkpoints has removed it."""
    if not path.exists():
        raise UserError(f"{path.parent} vanished, another calibration of the same model used it: start again")
    return path


def as_json(value: Any) -> Any:
    """Return a value as JSON has it; of what is none of its types, the type and a hash."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        name = type(value).__name__
        with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):  # local functions
            name += f" {hashlib.sha256(pickle.dumps(value)).hexdigest()[:16]}"
        return name


def digest_of(prompts: Sequence) -> str:
    """Return a hash of prompts."""
    return digest("\n".join(prompt if isinstance(prompt, str) else str(as_json(prompt)) for prompt in prompts))


def recorded(pipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that a plan records: all but the steps, and the dtype."""
    others = {name: value for name, value in settings.items() if name != "steps"}
    return {**others, "dtype": str(denoiser_of(pipe).dtype).removeprefix("torch.")}
