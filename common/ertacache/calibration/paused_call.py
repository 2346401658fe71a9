"""A pipeline's own call that pauses at each of its computed steps: sampler and inputs of `ertacache.calibrate`.

The call runs on a copy of the pipeline that follows a schedule as one with a plan does: same timesteps and windows, and
no model call on skipped steps. At each computed step it hands out latents and velocity, and waits: in the target's
trajectory for leave to go on by the pipeline's own solver, in a rollout (budget.py) for the jump that has just been
fitted. That fit needs all prompts at the same step, but a call cannot be left and entered again. So each call has a
thread of its own, which waits inside the scheduler's step. One thread runs at a time: that of the call that is asked to
continue, while the asking thread waits for it.

A rollout that has its first steps in common with an earlier one is handed their velocities, and makes no model calls
on them. The first step's call is made all the same: pipelines want an output of the right form.

Memory: in a rollout the calls of all prompts (of this process) wait at once, each with its embeddings, its latents and
the newest velocities.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from ertacache.calibration.planner import Schedule
from ertacache.calibration.search import HISTORY_LENGTHS
from ertacache.numerics.jump import jump
from ertacache.pipelines.enable import originals, stand_in
from ertacache.pipelines.enabled import Enabled
from ertacache.pipelines.run import PlannedRun
from ertacache.pipelines.steps import BudgetSteps, OwnSteps, velocity_of
from ertacache.utils.errors import UserError, call_failed, shown

THREAD = "ertacache-call"  # name of the threads


@contextlib.contextmanager
def calling(pipe, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn a failing call, mostly on a value that the pipeline cannot take, into one line; lack of memory stays so."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever pipelines, tokenizers and torch raise for a value
        given = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())
        raise call_failed(type(pipe).__name__, error, given) from error


class PausedCalls:
    """A `StepwiseSampler` over the pipeline's own calls; leaving it as a context manager ends those that still wait.

    Args:
        pipe: The pipeline.
        arguments: Keyword arguments of its call, but for prompts and generators.
    """

    def __init__(self, pipe, arguments: Mapping[str, Any]):
        self.pipe, self.arguments = pipe, dict(arguments)
        self.open: list[PausedCall] = []
        self.repeatable = not (has_memory(pipe) or any(map(stateful, originals(pipe).values())))
        """Whether a step depends on the latents alone. Else velocities that are known cannot stand for model calls."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while self.open:
            self.open.pop().close()
        for part in originals(self.pipe).values():
            if getattr(part, "is_cache_enabled", False):
                part._reset_stateful_cache()

    def prepare(self, pipe, prompts, seeds, **settings) -> "PausedCall":
        return PausedCall(self, list(prompts), list(seeds))

    def denoise(self, pipe, inputs: "PausedCall", plan=None, on_step=None) -> torch.Tensor:
        """Run uncached, by the pipeline's own solver."""
        for i in range(len(inputs.times)):
            on_step(i, inputs.latents, inputs.velocity)
            inputs.go_on(None)
        return inputs.latents

    def velocity(self, pipe, inputs: "PausedCall", x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return inputs.velocity

    def first_order(self, pipe, inputs: "PausedCall", i: int, k: int) -> tuple[float, float]:
        return inputs.run.solver.first_order(inputs.sigmas[i], inputs.sigmas[k])


class PausedCall:
    """One call of a pipeline; it starts when something of it is first asked for. Steps count from where it begins.

    Args:
        sampler: Its pipeline and arguments.
        prompts, seeds: Of the batch.
        computed: The steps that it computes; None for all.
        known: Velocities of the first of them.
    """

    def __init__(
        self,
        sampler: PausedCalls,
        prompts: list[str],
        seeds: list[int],
        computed: Schedule | None = None,
        known: Sequence[torch.Tensor] = (),
    ):
        self.sampler, self.prompts, self.seeds, self.computed, self.known = sampler, prompts, seeds, computed, known
        self.answers, self.messages = SimpleQueue(), SimpleQueue()
        self.state = None  # (run, latents before the step at which it pauses, velocity there)
        self.moved = self.changed = (
            None  # bool [B, …]: numbers that the solver has moved; that the pipeline has changed
        )

    def restricted_to(self, computed: Schedule, known: Sequence[torch.Tensor]) -> "PausedCall":
        """Return the same call, computing these steps only. known: velocities of the first of them."""
        return PausedCall(self.sampler, self.prompts, self.seeds, computed, known)

    @property
    def run(self) -> PlannedRun:
        return self._state()[0]

    @property
    def latents(self) -> torch.Tensor:
        """Latents [B, …] before the step at which the call pauses, the final ones at the end."""
        return self._state()[1]

    @property
    def velocity(self) -> torch.Tensor:
        """Velocity [B, …] at the step at which the call pauses."""
        return self._state()[2]

    @property
    def begin(self) -> int:
        """The step of the pipeline's T at which the call begins: above 0 with `strength` < 1."""
        return self.run.course.begin

    @property
    def all_sigmas(self) -> torch.Tensor:
        """The pipeline's noise levels, [T+1]."""
        return self.run.solver.sigmas

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels of the call's own steps, [T' + 1]."""
        return self.run.solver.sigmas[self.begin : self.run.course.end + 1]

    @property
    def times(self) -> torch.Tensor:
        """Times of the model at the call's own steps, [T']."""
        return self.run.scheduler.timesteps[self.begin : self.run.course.end]

    @property
    def free(self) -> torch.Tensor | None:
        """The numbers that the solver alone moves, bool [B, …]; None for all. Known at the end of an uncached run."""
        free = self.moved if self.changed is None else self.moved & ~self.changed
        return None if free.all() else free

    def go_on(self, row: tuple[float, list[float]] | torch.Tensor | None) -> None:
        """Continue to the next computed step, or to the end.

        Args:
            row: (a, w) of the jump; or the latents there, [B, …]; None: the solver's own step.
        """
        self._state()
        self.answers.put("own step" if row is None else row)
        self._receive()

    def close(self) -> None:
        """End the call where it pauses; one that is running ends at its next step."""
        self.answers.put(None)
        self.thread.join()

    def _state(self):
        if self.state is None:
            pipe = _copy_of(self.sampler.pipe)
            stand_in(pipe, Pausing(self), originals(pipe))
            self.thread = Thread(target=self._work, args=(pipe, _thread_state()), name=THREAD, daemon=True)
            self.sampler.open.append(self)
            self.thread.start()
            self._receive()
        return self.state

    def _receive(self) -> None:
        """Wait until the call pauses or ends; an error in it is raised here."""
        message = self.messages.get()
        if isinstance(message, BaseException):
            with calling(self.sampler.pipe, self.sampler.arguments):
                raise message
        self.state = message

    # --- in the call's own thread ------------------------------------------------------------------------------------

    def _work(self, pipe, state: contextlib.AbstractContextManager) -> None:
        try:
            name, prompts = prompt_argument(pipe), self.prompts
            generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
            if len(prompts) == 1:  # some pipelines take no lists of texts, images or generators, but all of classes
                prompts, generators = prompts if isinstance(prompts[0], int) else prompts[0], generators[0]
            arguments = {**self.sampler.arguments, name: prompts, "generator": generators}
            if name == "batch_size":
                arguments[name] = len(self.prompts)
            known, complete = arguments_of_call(pipe)
            if "output_type" in known or not complete:
                arguments["output_type"] = "latent"
            with state:
                try:
                    pipe(**arguments)
                except ValueError as error:
                    if self.state is not None or "output_type" not in str(error):
                        raise
                    del arguments["output_type"]  # the pipeline gives no latents away (Marigold)
                    pipe(**arguments)
            self.messages.put(UserError("the pipeline's call ended before its last step: leave callbacks out"))
        except _Closed:
            pass
        except BaseException as error:  # raised again by `_receive`
            self.messages.put(error)

    def pause(self, run: PlannedRun, x: torch.Tensor, v: torch.Tensor | None):
        """Hand out latents and velocity; return the answer."""
        self.messages.put((run, x, v))
        answer = self.answers.get()
        if answer is None:
            raise _Closed
        return answer


class CallState:
    """A batch of prompts on its way through a schedule, in the pipeline's own call. Same as `budget.BatchState`."""

    def __init__(self, session, inputs: PausedCall, schedule: Schedule, known: Sequence[torch.Tensor] = ()):
        self.call = inputs.restricted_to(schedule, known)
        self.history: list[torch.Tensor] = []

    @property
    def x(self) -> torch.Tensor:
        return self.call.latents

    def velocity(self, i: int) -> torch.Tensor:
        return self.call.velocity

    def jump(self, scale: float, weights: list[float]) -> None:
        self.call.go_on((scale, weights))


class _Closed(BaseException):
    """Ends a call that nobody waits for."""


class Pausing(Enabled):
    """Has a copy of a pipeline pause at its computed steps.

    Args:
        call: The call.
    """

    def __init__(self, call: PausedCall):
        super().__init__(None)
        self.call = call

    def context(self, name: str) -> str:
        """Return a name of this call's own for what diffusers' caches keep."""
        return f"{name} of call {id(self.call)}"

    def steps_of(self, run: PlannedRun):
        call, course = self.call, run.course
        if not run.leads:
            call.sampler.repeatable = False  # its velocities are not known
        if call.computed is None:
            return Watched(run, call) if run.leads else OwnSteps(run)
        course.planned = run.planned = tuple(course.begin + i for i in call.computed)
        course.plan_ends = course.end
        course.replayed = frozenset(run.planned[1 : len(call.known)])
        return Rollout(run, call)


class Watched(OwnSteps):
    """The uncached run, with a pause at each step."""

    def __init__(self, run: PlannedRun, call: PausedCall):
        super().__init__(run)
        self.call, self.made = call, None

    def step(self, i, x, v, options):
        if self.made is not None:
            changed = ~unchanged(x, self.made)
            self.call.changed = changed if self.call.changed is None else self.call.changed | changed
        self.call.pause(self.run, x.clone(), velocity_of(v, options).clone())
        made = super().step(i, x, v, options)
        moved = made != x
        self.call.moved = moved if self.call.moved is None else self.call.moved | moved
        self.made = made.clone()
        return made

    def end(self, x):
        self.call.pause(self.run, x, None)


class Rollout(BudgetSteps):
    """Jumps whose weights come from outside. Schedulers that follow the leading one make the same."""

    history_length = max(HISTORY_LENGTHS)

    def __init__(self, run: PlannedRun, call: PausedCall):
        self.call = call
        super().__init__(run)

    def prepare(self) -> None:
        self.row_of = {step: row for row, step in enumerate(self.run.planned)}
        self.shadow = None

    def see(self, i, v):
        pass

    def compute(self, i, x, v):
        row = self.row_of[i]
        return super().compute(i, x, self.call.known[row].to(v) if row < len(self.call.known) else v)

    def weights(self, i, k, x):
        if self.run.leads:
            self.course.row = self.call.pause(self.run, x, self.velocities[0])
        return self.course.row

    def target(self, i, k, x):
        row = self.weights(i, k, x)
        return row.to(x) if isinstance(row, torch.Tensor) else jump(x, self.velocities, row[1], row[0])

    def end(self, x):
        super().end(x)
        if self.run.leads:
            self.call.pause(self.run, x, None)


def unchanged(x: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Return which numbers a pipeline has left as its solver made them, bool [B, …].

    Rounding is no change: between steps, pipelines bring latents to the dtype of their weights (CogVideoX, Mochi).
    """
    same = x == made.to(x.dtype)
    for dtype in (torch.bfloat16, torch.float16):
        same |= x == made.to(dtype).to(x.dtype)
    return same


def _copy_of(pipe):
    """Return a copy of a pipeline with its own denoisers, and a scheduler and a guider that are copies."""
    pipe, own = copy.copy(pipe), originals(pipe)
    for name, part in own.items():
        setattr(pipe, name, copy.deepcopy(part) if name == "scheduler" else part)
    if hasattr(pipe, "_blocks"):  # a modular pipeline's, with their progress bars
        pipe._blocks = copy.deepcopy(pipe._blocks)
    if getattr(pipe, "guider", None) is not None:  # it may keep a momentum
        pipe.guider = copy.deepcopy(pipe.guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments_of_call(pipe) -> tuple[dict[str, Any], bool]:
    """Return the arguments of a pipeline's call with their defaults, and whether there can be no others.

    A call that takes any (*args, **kwargs) hides those of the classes that it derives from.
    """
    if hasattr(pipe, "_blocks"):
        return {p.name: p.default for p in pipe._blocks.inputs if p.name is not None}, True
    known, complete = {}, False
    for kind in type(pipe).__mro__:
        if "__call__" not in vars(kind):
            continue
        parameters = inspect.signature(vars(kind)["__call__"]).parameters.values()
        known = {p.name: p.default for p in list(parameters)[1:]} | known  # without self
        complete = not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        if complete:
            break
    return known, complete


def prompt_argument(pipe) -> str:
    """Return the argument of a pipeline's call that differs between prompts: `prompt`, or the first where it has none.

    Unconditional pipelines have their `batch_size` there: each prompt then stands for a seed.
    """
    known, complete = arguments_of_call(pipe)
    return "prompt" if "prompt" in known or not complete else next(iter(known), "prompt")


def has_memory(pipe) -> bool:
    """Return whether a pipeline's guidance may depend on the steps before: it has a guider, or keeps a momentum."""
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    names = () if code is None else code.co_varnames
    return getattr(pipe, "guider", None) is not None or any("momentum" in name for name in names)


def stateful(part, shared: bool = False) -> list[str]:
    """Return the kinds of what keeps something from step to step on a model: diffusers' hooks, and cache-dit.

    Args:
        part: A model, or any other part of a pipeline.
        shared: Whether to leave out what diffusers' cache contexts keep apart for each call.
    """
    modules = part.modules() if isinstance(part, torch.nn.Module) else ()
    registries = [module._diffusers_hook for module in modules if hasattr(module, "_diffusers_hook")]
    hooks = [hook for registry in registries for hook in registry.hooks.values() if hook._is_stateful]
    kinds = {type(hook).__name__ for hook in hooks if not (shared and hasattr(hook, "state_manager"))}
    return sorted(kinds) + (["cache-dit"] if getattr(part, "_is_cached", False) else [])


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
