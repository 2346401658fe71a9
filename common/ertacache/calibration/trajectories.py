"""The trajectory that a budget plan imitates, of every calibration prompt: kept on disk, and what is measured by it.

Plans are fitted on it (budget.py); grids of fewer steps and other rivals are chosen by the same error.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open

from ertacache.calibration.choice import typical_error
from ertacache.calibration.gram import Gram
from ertacache.calibration.session import CalibrationSession, existing
from ertacache.calibration.targets import TARGETS
from ertacache.numerics import ode
from ertacache.plans.schema import check_levels
from ertacache.utils import parallel
from ertacache.utils.checkpoints import arrays_file, has_whole_arrays
from ertacache.utils.errors import UserError, shown
from ertacache.utils.files import check_room, write_atomically

SIZES = ("height", "width", "frames", "num_frames")  # settings that give the latents their size
SHIFTS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)  # of the grids that fewer steps are tuned over
Candidate = TypeVar("Candidate")


def check_latents(elements: int, settings: Mapping[str, Any]) -> None:
    """Refuse latents without numbers, as those of sizes that a model cannot take. settings: of the run."""
    if not elements:
        sizes = [f"{name}={shown(settings[name])}" for name in SIZES if name in settings]
        raise UserError(f"the latents hold no numbers ({', '.join(sizes)}): give larger sizes")


def grid_name(shift: float | None) -> str:
    """Return the name of a grid that `TargetTrajectories.tuned_shift` has chosen."""
    return "own grid" if shift is None else f"tuned shift ({shift:g})"


class TargetTrajectories:
    """The target's trajectory of every prompt of a session, from x_0 to x_T.

    A quarter of the prompts (none of fewer than four) is held out of fits and measures what they give.

    Args:
        session: Sampler, pipeline and prompts.
        target: "reference" (the uncached run) or "exact" (the ODE's solution).
        around_pass: Context manager around each pass over the prompts.

    Raises:
        UserError: The latents hold no numbers, the noise levels do not fall, or the disk is too small.
    """

    def __init__(
        self,
        session: CalibrationSession,
        target: str = "reference",
        *,
        around_pass: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.session, self.around_pass = session, around_pass
        self.checkpoints = session.checkpoints(["budget, each prompt by its ratio", target])
        self.fitted = len(session.prompts) - len(session.prompts) // 4
        with around_pass():
            native = session.inputs(0)
            self.native_sigmas = getattr(native, "all_sigmas", native.sigmas)  # [T+1]
            check_levels(self.native_sigmas.tolist(), session.requirements.scheduler)
            self.target = TARGETS[target](session, native, self.checkpoints)
            self.begin = getattr(native, "begin", 0)  # the step of the T at which a pipeline's call begins
            self.first = self.on_target_grid(native)  # a batch that shows grid, shapes and first-order jumps
            self.end = len(self.first.times)
            rows, prompts = len(self.first.latents), self.prompts_in(0)
            if rows % prompts:
                raise UserError(f"the pipeline's latents have {rows} rows for {prompts} prompts: give batch_size=1")
            self.elements = self.first.latents.numel() // prompts
        self.stop = self.begin + self.end  # the step of the T at which a pipeline's call ends
        self.grams: list[Gram] = []  # of each fitted prompt, once `trajectories` has been run
        self.scaled = self.first_order(0, 1)[0] != 1.0  # whether jumps have a coefficient on the latents
        check_latents(self.elements, session.settings)
        self.check_disk()

    def check_disk(self) -> None:
        """Refuse a calibration whose trajectories the disk cannot hold: x_0 … x_T of each prompt in float32."""
        if parallel.is_main():
            present = [path for path in map(self.trajectory_path, range(self.session.batches)) if path.exists()]
            size = 4 * self.elements * (self.end + 1) * len(self.session.prompts)
            missing = size - sum(path.stat().st_size for path in present)
            remedy = "make room, choose another folder, or give fewer prompts (effort quick takes the first 8)"
            check_room(self.session.work, missing, "the calibration", remedy)
        parallel.barrier()

    def inputs(self, batch: int):
        """Return the inputs of a batch of prompts, on the grid that computed steps count on."""
        return self.on_target_grid(self.session.inputs(batch))

    def on_target_grid(self, inputs):
        return inputs if self.target.sigmas is None else inputs.on(self.target.sigmas)

    def first_order(self, i: int, k: int) -> tuple[float, float]:
        """Return (a, w) of the solver's first-order jump x_k = a x_i + w v_i."""
        return self.session.sampler.first_order(self.session.pipe, self.first, i, k)

    def trajectories(self) -> Gram:
        """Run the target's trajectory of every prompt once; afterwards its latents are on disk.

        Returns:
            The Gram matrix of the fitted prompts.
        """
        done = map(self.trajectory_path, range(self.checkpoints.finished(self.target.name)))
        if not parallel.share(all(map(has_whole_arrays, done)) if parallel.is_main() else None):
            self.checkpoints.forget(self.target.name)  # deleted, or damaged by a power failure
        sums = self.session.run(
            self.checkpoints, self.target.name, self.end * self.target.calls_per_step, self.trajectory_of_batch
        )
        elements = int(sums["elements"])
        self.grams = [Gram(matrix, elements, 1) for matrix in sums["matrices"]]
        return Gram(sums["matrices"].sum(0), elements * self.fitted, self.fitted)

    def trajectory_of_batch(self, batch: int) -> dict[str, Any]:
        latents, velocities = [], []

        def on_step(i, x, v):
            self.session.require_finite(x, batch, i, f"the {self.target.label} comes to")
            self.session.require_finite(v, batch, i)
            latents.append(x.float().cpu())
            velocities.append(v.float().cpu())
            self.session.called(self.target.calls_per_step)

        with self.around_pass():
            inputs = self.inputs(batch)
            final = self.target.integrate(inputs, on_step)
            free = getattr(inputs, "free", None)  # the numbers that a pipeline leaves to the solver; None for all
        self.session.require_finite(final, batch, self.end, f"the {self.target.label} comes to")
        latents.append(final.float().cpu())
        named = {str(i): x.numpy() for i, x in enumerate(latents)}
        if free is not None:
            free = free.cpu()
            named["free"] = free.numpy()
            if not free.any():
                text = "the pipeline changes all of the latents between its steps, which no weights can follow"
                raise UserError(f"{text}: leave callbacks out")
        write_atomically(self.trajectory_path(batch), arrays_file(named))
        matrices = np.zeros((self.fitted, 2 * self.end + 1, 2 * self.end + 1))
        for row in range(len(final)):
            prompt = self.session.starts[batch] + row % self.prompts_in(batch)
            if prompt < self.fitted:
                part = slice(row, row + 1)
                one = [[x[part] if free is None else x[part] * free[part] for x in xs] for xs in (latents, velocities)]
                matrices[prompt] += Gram.of(*one).matrix
        return {"matrices": matrices, "elements": self.elements if batch == 0 else 0}

    def trajectory_path(self, batch: int) -> Path:
        """Return the file of a batch's latents at every step of the target's trajectory."""
        return self.checkpoints.folder / f"{self.target.name}-{batch:04d}.safetensors"

    def target_latents(self, batch: int, i: int) -> torch.Tensor:
        """Return the target's latents x_i of a batch, float32 on the CPU."""
        with safe_open(existing(self.trajectory_path(batch)), "pt") as file:
            return file.get_tensor(str(i))

    def free(self, batch: int) -> torch.Tensor | None:
        """Return which numbers of a batch's latents a pipeline leaves to its solver, bool [B, …]; None for all."""
        with safe_open(existing(self.trajectory_path(batch)), "pt") as file:
            return file.get_tensor("free") if "free" in file.keys() else None  # noqa: SIM118 (no dictionary)

    def squared_errors(self, batch: int, final: torch.Tensor) -> list[float]:
        """Return the mean squared error of each prompt's final latents."""
        error, free = final.cpu().double() - self.target_latents(batch, self.end), self.free(batch)
        squares = (error if free is None else error * free).square().flatten(1).mean(1)
        return self.by_prompt(batch, squares.numpy()).mean(0).tolist()

    def prompts_in(self, batch: int) -> int:
        """Return the number of prompts in a batch."""
        start = self.session.starts[batch]
        return len(self.session.prompts[start : start + self.session.batch_size])

    def by_prompt(self, batch: int, rows: np.ndarray) -> np.ndarray:
        """Return what belongs to the rows of a batch as [rows of a prompt, prompts, …].

        There is one row for each prompt but in pipelines that keep the latents of both guidance branches (DiT), one
        after the other.
        """
        return rows.reshape(-1, self.prompts_in(batch), *rows.shape[1:])

    def nearest(
        self, name: str, candidates: Sequence[Candidate], run: Callable[[int, Candidate], torch.Tensor]
    ) -> Candidate:
        """Return the candidate whose results come nearest to the target, by the error that plans are chosen by.

        Args:
            name: Of this choice, in the checkpoints.
            candidates: One at least.
            run: run(batch, candidate) returns the final latents of a batch of prompts.
        """
        self.trajectories()
        session = self.session

        def sums_of(batch: int) -> dict[str, Any]:
            errors, start = np.zeros((len(candidates), len(session.prompts))), session.starts[batch]
            for row, candidate in zip(errors, candidates, strict=True):
                squares = self.squared_errors(batch, run(batch, candidate))
                row[start : start + len(squares)] = squares
            return {"errors": errors}

        errors = self.checkpoints.sums(f"{self.target.name}, {name}", session.batches, sums_of)["errors"]
        return candidates[int(np.argmin([typical_error(row) for row in errors]))]

    def tuned_shift(self, steps: int) -> float | None:
        """Return the shift in SHIFTS with which `steps` of the model's own solver come nearest to the target.

        None: on its own grid they come nearer than with any of them.
        """
        sampler, pipe = self.session.sampler, self.session.pipe

        def run(batch: int, shift: float | None) -> torch.Tensor:
            if shift is None:
                return sampler.denoise(pipe, self.session.inputs(batch, steps=steps))
            grid = ode.shifted_grid(self.native_sigmas, steps, shift)
            return sampler.denoise(pipe, self.session.inputs(batch).on(grid))

        return self.nearest(f"grids of {steps} steps", (None, *SHIFTS), run)
