"""Runs that come to numbers which are not finite are an error that names the step, never a picture."""

import torch

from ertacache.utils.errors import UserError


class FiniteCheck:
    """Looks at each step of a run, without waiting for the device, and says at its end where it went wrong."""

    def __init__(self):
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def see(self, i: int, x: torch.Tensor, v: torch.Tensor) -> None:
        """Look at latents and model output of computed step i, both [B, …]."""
        self.seen.append((i, x.isfinite().all(), v.isfinite().all()))

    def end(self, x: torch.Tensor, remedy: str) -> None:
        """Refuse a run that led to these latents, [B, …], if they are not finite.

        Raises:
            UserError: It names the first step that was seen at which something was not finite, and the remedy.
        """
        if x.isfinite().all():
            return
        what = f"the steps after step {self.seen[-1][0]} led to" if self.seen else "the steps led to"
        for i, before, output in self.seen:
            if not before or not output:
                what = f"the model gave, at step {i}," if before else f"the steps before step {i} led to"
                break
        raise UserError(f"{what} numbers that are not finite: {remedy}")
