"""A pipeline's own call that pauses at each of its steps: the sampler and the inputs of `ertacache.calibrate`.

The call runs on a copy of the pipeline. Its scheduler hands out each step's latents and velocity, and continues from
the latents that it is given: in the target's trajectory those of the pipeline's own solver, in a rollout (budget.py)
those of the weights that have just been fitted. That fit needs all prompts at the same step, but a call cannot be left
and entered again. So each call has a thread of its own, which waits inside the scheduler's step. One thread runs at a
time: that of the call that is asked to continue, while the asking thread waits for it.

Memory: in a rollout the calls of all prompts (of this process) wait at once, each with its embeddings, its latents and
the newest velocities.
"""

import contextlib
import copy
import functools
from collections.abc import Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from ertacache.calibration.planner import Schedule
from ertacache.numerics.schedulers import solver_of
from ertacache.pipelines.enable import original_scheduler
from ertacache.pipelines.run import PlannedRun
from ertacache.pipelines.scheduler import PlannedScheduler
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.requirements import Requirements
from ertacache.utils.errors import UserError

THREAD = "ertacache-call"  # name of the threads


class PausedCalls:
    """A `StepwiseSampler` over the pipeline's own calls; leaving it as a context manager ends those that still wait.

    Args:
        pipe: The pipeline.
        arguments: Keyword arguments of its call, but for prompts and generators.
    """

    def __init__(self, pipe, arguments: Mapping[str, Any]):
        self.pipe, self.arguments = pipe, dict(arguments)
        self.open: list[PausedCall] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while self.open:
            self.open.pop().close()

    def prepare(self, pipe, prompts, seeds, **settings) -> "PausedCall":
        return PausedCall(self, list(prompts), list(seeds))

    def denoise(self, pipe, inputs: "PausedCall", plan=None, on_step=None) -> torch.Tensor:
        """Run uncached, by the pipeline's own solver."""
        x, step = inputs.latents, inputs.solver.stepper(inputs.sigmas, inputs.times, 0)
        for i in range(len(inputs.times)):
            v = inputs.velocity(x)
            on_step(i, x, v)
            x = step(i, x, v)
        return x

    def velocity(self, pipe, inputs: "PausedCall", x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return inputs.velocity(x)

    def first_order(self, pipe, inputs: "PausedCall", i: int, k: int) -> tuple[float, float]:
        return inputs.solver.first_order(inputs.sigmas[i], inputs.sigmas[k])


class PausedCall:
    """One call of a pipeline; it starts when something of it is first asked for.

    Args:
        sampler: Its pipeline and arguments.
        prompts, seeds: Of the batch.
        computed: The steps that it makes; None for all.
    """

    def __init__(self, sampler: PausedCalls, prompts: list[str], seeds: list[int], computed: Schedule | None = None):
        self.sampler, self.prompts, self.seeds, self.computed = sampler, prompts, seeds, computed
        self.latents_in, self.steps_out = SimpleQueue(), SimpleQueue()
        self.place = 0  # of the computed step that follows

    def restricted_to(self, computed: Schedule) -> "PausedCall":
        """Return the same call, making these steps only."""
        return PausedCall(self.sampler, self.prompts, self.seeds, computed)

    @functools.cached_property
    def start(self) -> tuple[PlannedRun, torch.Tensor, torch.Tensor]:
        """The run's steps, the latents [B, …] before the first of them, and the velocity there."""
        self.pipe = copy.copy(self.sampler.pipe)
        self.pipe.set_progress_bar_config(disable=True)
        original = copy.deepcopy(original_scheduler(self.pipe))
        self.pipe.scheduler = PausingScheduler(original, self.computed, self.pause)
        self.thread = Thread(target=self.work, args=(_thread_state(),), name=THREAD, daemon=True)
        self.thread.start()
        self.sampler.open.append(self)
        x, v = self.receive()
        return self.pipe.scheduler.run, x, v

    solver = property(lambda self: self.start[0].solver)
    sigmas = property(lambda self: self.start[0].sigmas)  # [T+1]
    times = property(lambda self: self.start[0].all_times)  # [T]
    latents = property(lambda self: self.start[1])  # [B, …]

    def velocity(self, x: torch.Tensor) -> torch.Tensor:
        """Return the velocity at the next computed step.

        Args:
            x: The latents that the last computed step leads to; at first `latents`.

        Raises:
            UserError: The pipeline changes the latents between its steps.
        """
        v = self.start[2]
        if self.place > 0:
            self.latents_in.put(x)
            seen, v = self.receive()
            if not torch.equal(seen, x):
                text = f"{type(self.pipe).__name__} changes the latents between its steps, which no weights can follow"
                raise UserError(f"{text}: calibrate one with the same parts that does not, its plan serves both")
        self.place += 1
        return v

    def receive(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait until the call pauses at its next computed step; an error in the call is raised here."""
        message = self.steps_out.get()
        if isinstance(message, BaseException):
            raise message
        i, x, v = message
        due = self.pipe.scheduler.run.ends[self.place]
        if i != due:
            remedy = "give strength=1 (the plan then serves any), or a call that makes every step once"
            raise UserError(f"the pipeline steps at {i} where step {due} is due: {remedy}")
        return x, v

    def close(self) -> None:
        """End the call where it pauses; one that is running ends at its next step."""
        self.latents_in.put(None)
        self.thread.join()

    # --- in the call's own thread ------------------------------------------------------------------------------------

    def work(self, state: contextlib.AbstractContextManager) -> None:
        arguments = {**self.sampler.arguments, "prompt": self.prompts, "output_type": "latent"}
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        try:
            with state:
                self.pipe(**arguments)
            self.steps_out.put(UserError("the pipeline's call ended before its last step: leave callbacks out"))
        except _Closed:
            pass
        except BaseException as error:  # raised again by `receive`
            self.steps_out.put(error)

    def pause(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.steps_out.put((i, x, v))
        x = self.latents_in.get()
        if x is None:
            raise _Closed
        return x


class _Closed(BaseException):
    """Ends a call that nobody waits for."""


class PausingScheduler(PlannedScheduler):
    """Shows a pipeline the computed steps, as one with a plan does, and steps by pause(i, x, v) → x."""

    def __init__(self, original, computed: Schedule | None, pause):
        super().__init__(original, None)
        self.schedule, self.pause = computed, pause

    @property
    def set_timesteps(self):
        @functools.wraps(self.own.set_timesteps)
        def set_timesteps(*args, **kwargs):
            self.own.set_timesteps(*args, **kwargs)
            self.run = PausingRun(solver_of(self.own), self.schedule, self.pause)

        return set_timesteps


class PausingRun(PlannedRun):
    """A run over these steps (None: all), without weights."""

    def __init__(self, solver, computed: Schedule | None, pause):
        sigmas, self.pause = solver.sigmas.tolist(), pause
        computed = tuple(range(len(sigmas) - 1)) if computed is None else computed
        requirements = Requirements(len(sigmas) - 1, {}, {})
        super().__init__(solver, BudgetPlan(requirements, computed, ((0.0,),) * len(computed), tuple(sigmas)))

    def advance(self, place: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.following, self.computed = place + 1, self.computed + 1
        return self.pause(self.ends[place], x, v)


def _thread_state() -> contextlib.AbstractContextManager:
    """Return a context that enters this thread's torch state in another: autocast, inference mode, GPU stream."""
    kinds = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(kind)]
    contexts = [(torch.autocast, kind, torch.get_autocast_dtype(kind)) for kind in kinds]
    contexts += [(torch.inference_mode, True)] if torch.is_inference_mode_enabled() else []
    contexts += [(torch.cuda.stream, torch.cuda.current_stream())] if torch.cuda.is_initialized() else []

    @contextlib.contextmanager
    def entered():
        with contextlib.ExitStack() as stack:
            for context, *arguments in contexts:
                stack.enter_context(context(*arguments))
            yield

    return entered()
