"""A pipeline's own call that waits at each of its steps, as the program and the inputs of a calibration.

The call runs on a copy of the pipeline. Its scheduler hands each step's latents and velocity over, and goes on from the
latents that it is given: for the reference those of the pipeline's own solver, in a replay (budget.py) those of the
weights that have just been fitted. For that fit all prompts must stand at the same step, but a call cannot be left and
entered again. So each has a thread of its own, which waits in the scheduler's step. One thread runs at a time, that of
the call that is asked to go on, while the one that asks waits for it.

Memory: in a replay the calls of all prompts (of this process) wait at once, each with its embeddings, its latents and
the outputs of the newest steps.
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
from ertacache.pipelines.enable import own_scheduler
from ertacache.pipelines.run import Run
from ertacache.pipelines.scheduler import PlannedScheduler
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.requirements import Conditions
from ertacache.utils.errors import UserError

THREAD = "ertacache-call"  # name of the threads


class CallProgram:
    """A pipeline's own call, with the functions of a model folder that calibration asks for. Closes its calls."""

    def __init__(self, pipe, arguments: Mapping[str, Any]):
        self.pipe, self.arguments, self.open = pipe, dict(arguments), []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while self.open:
            self.open.pop().close()

    def prepare(self, pipe, prompts, seeds, **settings) -> "Call":
        return Call(self, list(prompts), list(seeds))

    def denoise(self, pipe, inputs: "Call", plan=None, on_step=None) -> torch.Tensor:
        """The uncached run, by the pipeline's own solver."""
        x, step = inputs.latents, inputs.solver.stepper(inputs.sigmas, inputs.times, 0)
        for i in range(len(inputs.times)):
            v = inputs.velocity(x)
            on_step(i, x, v)
            x = step(i, x, v)
        return x

    def velocity(self, pipe, inputs: "Call", x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return inputs.velocity(x)

    def first_order(self, pipe, inputs: "Call", i: int, k: int) -> tuple[float, float]:
        return inputs.solver.first_order(inputs.sigmas[i], inputs.sigmas[k])


class Call:
    """One call of a pipeline, over all of its steps or those given; it begins when it is first asked for something."""

    def __init__(self, program: CallProgram, prompts: list[str], seeds: list[int], computed: Schedule | None = None):
        self.program, self.prompts, self.seeds, self.computed = program, prompts, seeds, computed
        self.given, self.found, self.place = SimpleQueue(), SimpleQueue(), 0  # place: of the computed step that follows

    def over(self, computed: Schedule) -> "Call":
        """The same call over these steps only."""
        return Call(self.program, self.prompts, self.seeds, computed)

    @functools.cached_property
    def start(self) -> tuple[Run, torch.Tensor, torch.Tensor]:
        """The run's steps, the latents [B, …] before the first of them, and the output there."""
        self.pipe = copy.copy(self.program.pipe)
        self.pipe.set_progress_bar_config(disable=True)
        own = copy.deepcopy(own_scheduler(self.pipe))
        self.pipe.scheduler = HandingScheduler(own, self.computed, self.hand_over)
        self.thread = Thread(target=self.work, args=(_present_state(),), name=THREAD, daemon=True)
        self.thread.start()
        self.program.open.append(self)
        x, v = self.receive()
        return self.pipe.scheduler.run, x, v

    solver = property(lambda self: self.start[0].solver)
    sigmas = property(lambda self: self.start[0].grid)  # [T+1]
    times = property(lambda self: self.start[0].all_times)  # [T]
    latents = property(lambda self: self.start[1])  # [B, …]

    def velocity(self, x: torch.Tensor) -> torch.Tensor:
        """The output at the next computed step. x: the latents that the last one leads to; at first, `latents`."""
        v = self.start[2]
        if self.place > 0:
            self.given.put(x)
            found, v = self.receive()
            if not torch.equal(found, x):
                text = f"{type(self.pipe).__name__} changes the latents between its steps, which no weights can follow"
                raise UserError(f"{text}: calibrate one with the same parts that does not, its plan serves both")
        self.place += 1
        return v

    def receive(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait until the call stands at its next computed step; what went wrong in it is raised here."""
        found = self.found.get()
        if isinstance(found, BaseException):
            raise found
        i, x, v = found
        due = self.pipe.scheduler.run.ends[self.place]
        if i != due:
            remedy = "give strength=1 (the plan then serves any), or a call that makes every step once"
            raise UserError(f"the pipeline steps at {i} where step {due} is due: {remedy}")
        return x, v

    def close(self) -> None:
        """End the call where it stands; one that is at work ends at its next step."""
        self.given.put(None)
        self.thread.join()

    # --- in the call's own thread ------------------------------------------------------------------------------------

    def work(self, state: contextlib.AbstractContextManager) -> None:
        arguments = {**self.program.arguments, "prompt": self.prompts, "output_type": "latent"}
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        try:
            with state:
                self.pipe(**arguments)
            self.found.put(UserError("the pipeline's call ended before its last step: leave callbacks out"))
        except _Closed:
            pass
        except BaseException as error:  # raised again where it is waited for
            self.found.put(error)

    def hand_over(self, i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.found.put((i, x, v))
        x = self.given.get()
        if x is None:
            raise _Closed
        return x


class _Closed(BaseException):
    """Ends a call that nobody waits for."""


class HandingScheduler(PlannedScheduler):
    """Shows a pipeline the computed steps, as one with a plan does, and steps by hand_over(i, x, v) → x."""

    def __init__(self, own, computed: Schedule | None, hand_over):
        super().__init__(own, None)
        self.schedule, self.hand_over = computed, hand_over

    @property
    def set_timesteps(self):
        @functools.wraps(self.own.set_timesteps)
        def set_timesteps(*args, **kwargs):
            self.own.set_timesteps(*args, **kwargs)
            self.run = HandedRun(solver_of(self.own), self.schedule, self.hand_over)

        return set_timesteps


class HandedRun(Run):
    """A run over these steps (None: all), without weights."""

    def __init__(self, solver, computed: Schedule | None, hand_over):
        levels, self.hand_over = solver.levels.tolist(), hand_over
        computed = tuple(range(len(levels) - 1)) if computed is None else computed
        conditions = Conditions(len(levels) - 1, {}, {})
        super().__init__(solver, BudgetPlan(conditions, computed, ((0.0,),) * len(computed), tuple(levels)))

    def advance(self, place: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.following, self.computed = place + 1, self.computed + 1
        return self.hand_over(self.ends[place], x, v)


def _present_state() -> contextlib.AbstractContextManager:
    """What torch keeps for each thread, as it is now, for another to enter: autocast, inference mode, GPU stream."""
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
