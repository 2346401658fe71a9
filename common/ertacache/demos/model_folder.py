"""The contract of a model folder, and how a folder's `generate.py` is loaded."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ertacache.utils.checks import LARGEST_STEPS, LEAST_STEPS, steps_problem
from ertacache.utils.errors import UserError, shown

LARGEST_SETTING = 1000000  # of guidance and the like
OnStep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


class Inputs(Protocol):
    """What a run starts from.

    Attributes:
        latents: Initial noise [B, …], one row per prompt.
        sigmas: Noise levels of the T steps, float32 [T+1], falling from noise to data.
        times: The model's time at each step, [T].
    """

    latents: torch.Tensor
    sigmas: torch.Tensor

    @property
    def times(self) -> torch.Tensor: ...

    def on(self, sigmas: torch.Tensor) -> "Inputs":
        """Return the same inputs on another grid of noise levels, [M+1]; the native grid returns them unchanged."""


class StepwiseSampler(Protocol):
    """A sampler whose denoising loop can be watched and steered: all that calibrating a budget plan needs.

    `pipe` is a diffusers pipeline; `x` and `v` are latents and velocity of one shape [B, …], in the dtype of the loop.
    """

    def prepare(self, pipe, prompts: Sequence[str], seeds: Sequence[int], **settings) -> Inputs:
        """Make embeddings, initial noise and grid as the stock pipeline makes them.

        Args:
            pipe: The pipeline.
            prompts: B texts.
            seeds: One seed per prompt; the noise of a seed does not depend on B.
            **settings: Those of `Sampler.settings_of`, with `steps`.
        """

    def denoise(self, pipe, inputs: Inputs, plan=None, on_step: OnStep | None = None) -> torch.Tensor:
        """Run the denoising loop (Algorithm 1).

        Args:
            pipe: The pipeline.
            inputs: Of `prepare`.
            plan: A plan to follow. None is the stock pipeline's own loop, bit for bit.
            on_step: Called as on_step(i, x, v) at each step; a velocity that it returns replaces v.

        Returns:
            The final latents [B, …].
        """

    def velocity(self, pipe, inputs: Inputs, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the model output after guidance, [B, …], at latents x and the scalar time t."""

    def first_order(self, pipe, inputs: Inputs, i: int, k: int) -> tuple[float, float]:
        """Return (a, w) of x_k = a x_i + w v_i, the solver's first-order jump over the steps i … k−1."""


class Grammar(Protocol):
    """What a demo draws: a module of `ertacache.demos`."""

    def sample_captions(self, count: int, seed: int, held_out: bool = False, leave_open: bool = False) -> list[str]:
        """Return captions that the demo knows.

        Args:
            count: Number of captions.
            seed: Of the choice.
            held_out: Whether to choose from the captions that plans are never calibrated on.
            leave_open: Whether each leaves something open; otherwise they name all they can.
        """

    def prompt_accuracy(self, captions: Sequence[str], results: Sequence[np.ndarray], pipe) -> float | None:
        """Return the share of results that show what their caption asks for; None where one cannot be judged.

        Args:
            captions: N captions.
            results: N images uint8 [H, W, 3], or videos uint8 [F, H, W, 3].
            pipe: The demo's pipeline.
        """


class Sampler(StepwiseSampler, Protocol):
    """What the `generate.py` of a model folder provides.

    Importing it does no work; heavy imports belong inside the functions.

    Attributes:
        FOLDER: The model folder; it holds `prompts/`, `cache/` and `demo/`.
        grammar: What its demo draws.
    """

    FOLDER: Path
    grammar: Grammar

    def settings_of(self, pipe, **settings) -> dict[str, Any]:
        """Return checked settings, with the model's defaults where none are given.

        The parameters of this function and their defaults are the flags of the folder's command line: `steps`,
        `guidance`, `height`, `width`, and where the model has them `frames`, `negative_prompt`, `aesthetic_score`.

        Raises:
            UserError: A value that the model cannot take; the message names the flag.
        """

    def open_site(self, pipe, inputs: Inputs, site: str):
        """Return the cache site ("output" or "blocks") as a context manager: numerics/cache_sites.py."""

    def decode(self, pipe, latents: torch.Tensor, inputs: Inputs):
        """Return float32 images [B, H, W, 3] or videos [B, F, H, W, 3] in [0, 1], a numpy array."""

    def load(self, model: str = "demo", device: str = "cpu", dtype=torch.float32, offload: str = "none"):
        """Load the pipeline.

        Args:
            model: "demo", a local directory in diffusers' format, or a Hub id.
            device: "cpu", "cuda", "cuda:N" or "mps".
            dtype: Of the weights.
            offload: "none", "model" or "sequential".
        """


def draws_captions(sampler: Sampler, model: str) -> bool:
    """Return whether a model of the folder draws its grammar: the demo does, or all do (ALL_DRAW_CAPTIONS)."""
    return model == "demo" or getattr(sampler, "ALL_DRAW_CAPTIONS", False)


def load_model_folder(folder: str | Path) -> Sampler:
    """Load the `generate.py` of a model folder as a module.

    Raises:
        UserError: There is no generate.py in it.

    Example:
        >>> sampler = load_model_folder("ERTACache4FLUX")
        >>> pipe = sampler.load("demo")
    """
    path = Path(folder).resolve() / "generate.py"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: there is no generate.py in it (try ERTACache4FLUX)")
    name = "ertacache_folder_" + "".join(c if c.isalnum() else "_" for c in path.parent.name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def settings_parameters(sampler: Sampler) -> dict[str, Any]:
    """Return the settings that a model folder takes, with their defaults: steps, guidance, height, width, frames, …"""
    parameters = inspect.signature(sampler.settings_of).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "pipe"}


def makes_videos(sampler: Sampler) -> bool:
    """Return whether a model folder makes videos; others make images."""
    return "frames" in settings_parameters(sampler)


# --- checks of settings, for `settings_of` ---------------------------------------------------------------------------


def check_steps(steps: int) -> None:
    """Refuse a number of steps that no plan has."""
    if steps_problem(steps):
        raise UserError(f"--steps {shown(steps)}: give a whole number from {LEAST_STEPS} to {LARGEST_STEPS}")


def check_number(name: str, value: float, minimum: float) -> None:
    """Refuse a setting that is not a number of at least `minimum` that a float32 holds."""
    if not minimum <= value <= LARGEST_SETTING:
        raise UserError(f"--{name} {value}: give a number from {minimum} to {LARGEST_SETTING}")


def check_size(name: str, value: int, multiple: int) -> None:
    """Refuse a height or width that the VAE (and the packing of its latents) cannot take."""
    if value < multiple or value % multiple:
        lower = max(value // multiple * multiple, multiple)
        raise UserError(
            f"--{name} {value}: must be a multiple of {multiple} for this model, for example {lower} or "
            f"{max(lower + multiple, multiple)}"
        )


def check_frames(frames: int, multiple: int) -> None:
    """Refuse a number of frames that the VAE cannot take: the first one alone, then groups of `multiple`."""
    if frames < 1 or frames % multiple != 1:
        lower = max((frames - 1) // multiple, 0) * multiple + 1
        raise UserError(
            f"--frames {frames}: must be a multiple of {multiple} plus 1 for this model, for example {lower} or "
            f"{lower + multiple}"
        )


def check_loop_scheduler(pipe, known: tuple[str, ...]) -> None:
    """Refuse a scheduler whose step the folder's loop does not make."""
    name = type(pipe.scheduler).__name__
    if name not in known:
        raise UserError(f"the model's scheduler is {name}, this loop knows {' and '.join(known)}: load one of them")
