"""A sampler that learns a plan from the images that a user makes, and follows it from then on.

Every run is uncached until the plan is there, and its result is what the user gets. Its trajectory is a lesson: latents
and velocities of all steps, in a file, and the model's conditioning, in memory. When there are enough lessons, each
further run of the model lends a number of extra calls to the library's calibration (calibration/budget.py), whose
prompts they are. The calibration runs in a thread of its own that waits for each model call, so that it can be left
between two images; model calls are made by the thread that samples. Lessons are of one process: conditioning is not
written to disk, and a process that ends before the plan is there begins anew.
"""

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.effort import effort_of
from ertacache.calibration.session import CalibrationSession
from ertacache.comfyui.grid import check_kind, check_levels, sigmas_of
from ertacache.comfyui.models import SCHEDULER
from ertacache.comfyui.samplers import sample_plan, sample_uncached, velocity
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.names import budget_of, check_speedups
from ertacache.plans.plan import Plan
from ertacache.utils.checkpoints import digest
from ertacache.utils.checks import steps_problem
from ertacache.utils.errors import PlanError, UserError, reason_of

LOG = logging.getLogger("ertacache")
THREAD = "ertacache-learning"  # name of the threads
OTHER_NAME = "give the plan another name to learn one for this"


class Pupil(Protocol):
    """What learning needs to know of a model, as a sampler function gets it (nodes.py for ComfyUI's)."""

    space: str
    """models.SPACES: what its latents are."""

    description: dict[str, Any]
    """Class and config of the model."""

    settings: dict[str, Any]
    """What of a run a plan records and what all lessons have in common: guidance, …"""

    parameters: list[torch.Tensor]
    """What the plan's fingerprint of the weights reads of the model."""

    dtype: torch.dtype

    unrepeatable: str | None
    """Why this run's model calls cannot be repeated with another run's conditioning; None where they can."""

    def keep(self) -> Any:
        """Return the conditioning of this run."""

    def given(self, kept: Any) -> AbstractContextManager:
        """Return a context in which the model has the conditioning that `keep` has returned in an earlier run."""


@dataclass(frozen=True)
class Lesson:
    """One uncached run.

    Attributes:
        path: File of the latents x_0 … x_T and velocities v_0 … v_{T−1}, named x0, …, v0, ….
        kept: Its conditioning.
        sigmas: Noise levels, float32 on the CPU, [T+1].
        device: Of the latents.
        name: A hash of the initial latents.
    """

    path: Path
    kept: Any
    sigmas: torch.Tensor
    device: torch.device
    name: str

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name).to(self.device)

    @property
    def latents(self) -> torch.Tensor:
        """Initial latents, [B, …]."""
        return self.read("x0")

    @property
    def times(self) -> torch.Tensor:
        """Noise level at each step, [T]."""
        return self.sigmas[:-1]


class Learner:
    """Learns one plan, and follows it.

    Args:
        path: The plan's file; one that is there is followed from the beginning.
        speedup: T/N of the plan, at least 1.
        images: Number of runs that it learns from; a quarter of them (none of fewer than four) measures the plan.
        extra_calls: Model calls that each further run makes for the rollouts, until the plan is there.
        good_enough: Mean squared error of the final latents, relative to their mean square, at which the search ends
            early; 0: never.
        effort: Limits the search, as in `ertacache.calibrate`: quick, normal or thorough.
        work: Folder for what is learned from, a temporary one by default.
        say: Called with each message.

    Attributes:
        plan: None until it is there.
        lessons: So far.

    Raises:
        UserError: An argument out of range, or a file that is no budget plan.
    """

    def __init__(
        self,
        path: str | Path,
        speedup: float,
        *,
        images: int = 8,
        extra_calls: int = 60,
        good_enough: float = 0.0,
        effort: str = "quick",
        work: str | Path | None = None,
        say: Callable[[str], None] = LOG.info,
    ):
        check_speedups([speedup], "speedup")
        for name, value in (("images", images), ("extra_calls", extra_calls)):
            if value < 1:
                raise UserError(f"{name} = {value}: give at least 1")
        effort_of(effort, in_minutes=False)
        self.path, self.speedup, self.images, self.extra_calls = Path(path), speedup, images, extra_calls
        self.good_enough, self.effort, self.say = good_enough, effort, say
        self.parent, self.work = work, None  # the folder is made for the first lesson
        self.plan: BudgetPlan | None = check_kind(Plan.load(path)) if self.path.exists() else None
        self.lessons: list[Lesson] = []
        self.common: dict[str, Any] | None = None  # what all lessons have in common
        self.study: Study | None = None
        self.failure: str | None = None  # of the calibration

    @property
    def busy(self) -> bool:
        """Whether the next run makes extra calls, if it is one that can teach."""
        return self.plan is None and self.failure is None and len(self.lessons) >= self.images - 1

    def sigmas(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the noise levels that the next run is sampled on: those given, or the plan's of them.

        Args:
            sigmas: Of the uncached run, [T+1].

        Raises:
            PlanError: Not those of the plan.
        """
        if self.plan is None:
            return sigmas
        if len(sigmas) - 1 != self.plan.steps:
            text = f"{self.path} is a plan for {self.plan.steps} steps, these are {len(sigmas) - 1}"
            raise PlanError(f"{text}: {OTHER_NAME}")
        check_levels(sigmas.tolist(), self.plan.native_sigmas, OTHER_NAME)
        return sigmas.new_tensor(sigmas_of(self.plan))

    def sample(self, model, x, sigmas, extra_args=None, callback=None, disable=None, *, pupil: Pupil) -> torch.Tensor:
        """Make one run: a sampler function, with what is known of the model.

        Args:
            model, x, extra_args, callback, disable: As in `samplers.sample_plan`.
            sigmas: Of `sigmas`.
            pupil: The model.

        Returns:
            The run's final latents, of the uncached run until the plan is there.
        """
        if self.plan is not None:
            return sample_plan(model, x, sigmas, extra_args, callback, disable, plan=self.plan)
        steps = len(sigmas) - 1
        if steps_problem(steps):
            raise UserError(steps_problem(steps))
        budget_of(steps, self.speedup, "speedup =")
        states: dict[str, torch.Tensor] = {}
        reason = self.failure or self.unfit(pupil, x, sigmas)
        takes = reason is None and len(self.lessons) < self.images

        def on_step(i: int, x: torch.Tensor, v: torch.Tensor) -> None:
            if takes:
                states[f"x{i}"], states[f"v{i}"] = x.cpu().contiguous(), v.cpu().contiguous()

        final = sample_uncached(model, x, sigmas, extra_args, callback, disable, on_step=on_step)
        if reason is not None:
            self.say(f"nothing learned from this image: {reason}")
            return final
        if takes:
            self.take(pupil, states | {f"x{steps}": final.cpu().contiguous()}, sigmas, x.device)
        if len(self.lessons) >= self.images:
            self.practise(model, x, final, extra_args, callback, pupil, steps)
        else:
            self.say(f"{len(self.lessons)} of {self.images} images to learn from")
        return final

    def unfit(self, pupil: Pupil, x: torch.Tensor, sigmas: torch.Tensor) -> str | None:
        """Return why a run cannot teach; None where it can."""
        common = {
            "sigmas": sigmas.tolist(),
            "latents": list(x.shape),
            "model": pupil.description,
            "space": pupil.space,
            "settings": pupil.settings,
        }
        if pupil.unrepeatable:
            return pupil.unrepeatable
        if self.common is None:
            self.common = common
        others = [name for name, value in common.items() if value != self.common[name]]
        return f"it has other {' and '.join(others)} than the ones before" if others else None

    def take(self, pupil: Pupil, states: dict[str, torch.Tensor], sigmas: torch.Tensor, device: torch.device) -> None:
        """Keep a run as a lesson, unless there is one of the same noise."""
        name = digest(states["x0"].flatten()[:4096].tolist())
        if self.work is None:
            if self.parent is not None:
                Path(self.parent).mkdir(parents=True, exist_ok=True)
            self.work = Path(tempfile.mkdtemp(prefix="ertacache-learning-", dir=self.parent))
        if all(lesson.name != name for lesson in self.lessons):
            path = self.work / f"lesson-{len(self.lessons)}.safetensors"
            save_file(states, path)
            self.lessons.append(Lesson(path, pupil.keep(), sigmas.float().cpu(), device, name))

    def practise(self, model, x, final, extra_args, callback, pupil: Pupil, steps: int) -> None:
        """Make at most `extra_calls` model calls for the calibration; save the plan when it is there."""
        if self.study is None:
            self.study = Study(self, pupil)
        request = self.study.request()
        for call in range(self.extra_calls):
            if not isinstance(request, tuple):
                break
            lesson, latents, sigma = request
            with pupil.given(lesson.kept):
                self.study.answer(velocity(model, latents, sigma[None].to(latents.device), 0, extra_args))
            if callback is not None:
                end = sigma.new_zeros(())
                callback({"x": final, "i": steps + call, "sigma": end, "sigma_hat": end, "denoised": final})
            request = self.study.request()
        if isinstance(request, BudgetPlan):
            self.plan = request
            self.plan.save(self.path)
            error = max(self.plan.predicted_error, self.plan.held_out_error or 0.0)
            text = f"learned to make {self.plan.nfe} of {steps} calls, error of the final latents {error:.2e}"
            self.say(f"{text}; saved as {self.path}, and followed from now on")
            self.forget()
        elif isinstance(request, Exception):
            self.failure = f"learning has failed ({reason_of(request)})"
            self.say(f"{self.failure}: {OTHER_NAME}")
            self.forget()
        else:
            self.say(f"{self.study.calls} of at most {self.study.limit} extra calls made to learn")

    def forget(self) -> None:
        """Delete what was learned from, and end a calibration that waits."""
        if self.study is not None:
            self.study.answers.put(None)
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)
        self.lessons, self.study = [], None


class Study:
    """The calibration of a learner, which waits for each of its model calls.

    Args:
        learner: With all its lessons.
        pupil: The model.

    Attributes:
        calls: Answered so far.
        limit: The most that there will be.
    """

    def __init__(self, learner: Learner, pupil: Pupil):
        self.learner, self.calls = learner, 0
        self.steps = len(learner.lessons[0].sigmas) - 1
        self.limit = effort_of(learner.effort).search * self.steps * len(learner.lessons)
        self.requests, self.answers = SimpleQueue(), SimpleQueue()
        self.pending = None
        given = (_pipe_of(pupil), pupil.settings, pupil.description["class"], torch.is_inference_mode_enabled())
        threading.Thread(target=self._work, args=given, name=THREAD, daemon=True).start()

    def request(self) -> tuple[Lesson, torch.Tensor, torch.Tensor] | BudgetPlan | Exception:
        """Return the model call that is waited for, (lesson, x, sigma); or the plan, or why there is none."""
        if self.pending is None:
            self.pending = self.requests.get()
        return self.pending

    def answer(self, v: torch.Tensor) -> None:
        """Give the velocity of the model call that is waited for."""
        self.pending, self.calls = None, self.calls + 1
        self.answers.put(v)

    # --- in the thread of its own, as a `StepwiseSampler` -------------------------------------------------------------

    def _work(self, pipe, settings: dict[str, Any], name: str, inference: bool) -> None:
        learner, lessons = self.learner, self.learner.lessons
        try:
            with torch.inference_mode(inference), torch.no_grad():
                session = CalibrationSession(
                    self,
                    pipe,
                    [lesson.name for lesson in lessons],
                    range(len(lessons)),
                    settings={**settings, "steps": self.steps},
                    batch_size=1,
                    work=learner.work,
                    model_id=name,
                    progress=False,
                )
                pipe.transformer.weights = ()  # they may be moved, and freed, from now on
                calibration = BudgetCalibration(session, good_enough=learner.good_enough)
                budget = budget_of(self.steps, learner.speedup, "speedup =")
                plan = calibration.plans([budget], learner.effort)[budget]
                calibration.finish()
            self.requests.put(plan)
        except Exception as error:  # the learner says it
            self.requests.put(error)

    def prepare(self, pipe, prompts, seeds, **settings) -> Lesson:
        return self.learner.lessons[seeds[0]]

    def denoise(self, pipe, inputs: Lesson, plan=None, on_step=None) -> torch.Tensor:
        """Show the uncached run, which has been made."""
        for i in range(self.steps):
            on_step(i, inputs.read(f"x{i}"), inputs.read(f"v{i}"))
        return inputs.read(f"x{self.steps}")

    def velocity(self, pipe, inputs: Lesson, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.requests.put((inputs, x, t))
        v = self.answers.get()
        if v is None:
            raise UserError("the learner was given up")
        return v

    def first_order(self, pipe, inputs: Lesson, i: int, k: int) -> tuple[float, float]:
        return 1.0, (inputs.sigmas[k] - inputs.sigmas[i]).item()


class _Part(torch.nn.Module):
    """A part of a pipeline as far as a plan's requirements and fingerprint know it."""

    def __init__(self, config: dict[str, Any], weights=(), dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.weights, self.dtype = config, weights, dtype

    def parameters(self, recurse: bool = True):
        return iter(self.weights)


def _pipe_of(pupil: Pupil):
    """Return what the calibration needs of a diffusers pipeline: a denoiser and a scheduler with class and config."""
    config = {key: value for key, value in pupil.description.items() if key != "class"}
    denoiser = type(pupil.description["class"], (_Part,), {})(config, pupil.parameters, pupil.dtype)
    scheduler = type(SCHEDULER, (_Part,), {})({"space": pupil.space})

    class Pipe:
        transformer = denoiser

    Pipe.scheduler = scheduler
    return Pipe()
