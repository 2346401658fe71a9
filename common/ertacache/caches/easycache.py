"""EasyCache (Zhou et al., 2025, arXiv 2507.02860; H-EmbodVis/EasyCache): reuse of what a model adds to its input.

With inputs x and outputs y of the transformer, and means of absolute values, a computed step gives the rate

    k = |y − y'| / |x − x'|,   x', y' of the computed step before it.

Every step expects its output to change by k |x − x₋₁| / |y|, relative to the last computed output y; x₋₁ is the input
of the previous step. These changes are summed until they reach τ; then the model runs and the sum restarts. Until then
the output is x + (y_c − x_c) of the last computed step c. The first steps and the last one are always computed. The
branch that comes first in a step decides for the others too.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager

from ertacache.caches.block_stack import BranchState
from ertacache.numerics.blocks import hooked

RETAINED = 7  # first steps that are always computed, the default of its code for Wan2.2


@dataclass
class EasyCachePolicy:
    """Decides from inputs and outputs of one guidance branch whether a step is computed.

    Attributes:
        threshold: τ > 0.
        steps: T, steps of the run.
        retained: Number of first steps that are always computed, at least 2.
        memory: Input and output of the last computed step, input of the previous step, k and the sum.
    """

    threshold: float
    steps: int
    retained: int = RETAINED
    memory: dict = field(default_factory=dict)

    def computes(self, step: int, x: torch.Tensor) -> bool:
        """Return whether a step with input x is computed; called for every step of the run."""
        memory, previous = self.memory, self.memory.get("previous")
        memory["previous"] = x
        if step < self.retained or step == self.steps - 1 or "rate" not in memory:
            memory["sum"] = 0.0
            return True
        memory["sum"] += memory["rate"] * mean(x - previous) / mean(memory["output"])
        if memory["sum"] < self.threshold:
            return False
        memory["sum"] = 0.0
        return True

    def computed(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take note of a computed step."""
        memory = self.memory
        if "output" in memory:
            change = mean(x - memory["input"])
            memory["rate"] = mean(y - memory["output"]) / change if change else 0.0
        memory["input"], memory["output"] = x, y


def mean(x: torch.Tensor) -> float:
    """Return the mean of absolute values."""
    return x.float().abs().mean().item()


def widened(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return x with as many channels as y, 0 in those that it lacks: Open-Sora's model predicts a variance too."""
    missing = y.shape[1] - x.shape[1]
    return torch.cat([x, torch.zeros_like(y[:, :missing])], 1) if missing else x


class _Reuse(ModelHook):
    """Hook on the transformer that leaves whole calls out.

    Args:
        threshold: τ.
        steps: T.
        retained: Number of first steps that are always computed.
    """

    _is_stateful = True

    def __init__(self, threshold: float, steps: int, retained: int):
        super().__init__()
        self.state_manager = StateManager(BranchState)
        self.arguments = (threshold, steps, retained)
        self.start()

    def start(self) -> None:
        """Forget the run before."""
        self.policy, self.decisions = EasyCachePolicy(*self.arguments), {}

    def new_forward(self, module, *args, **kwargs):
        state = self.state_manager.get_state()
        state.step += 1
        x = args[0] if args else kwargs["hidden_states"]
        decides = state.step not in self.decisions
        if decides:
            self.decisions[state.step] = self.policy.computes(state.step, x)
        if not self.decisions[state.step] and "difference" in state.memory:
            return (widened(x, state.memory["difference"]) + state.memory["difference"],)
        output = self.fn_ref.original_forward(*args, **kwargs)
        y = output[0]
        state.memory["difference"] = y - widened(x, y)
        if decides:
            self.policy.computed(x, y[:, : x.shape[1]])
        return output

    def reset_state(self, module):
        self.state_manager.reset()
        self.start()
        return module


@contextmanager
def easycache(model: torch.nn.Module, steps: int, threshold: float, retained: int = RETAINED):
    """Apply EasyCache to a stock transformer, for the pipeline's calls within the context.

    Args:
        model: The transformer; its pipeline asks for a tuple.
        steps: T, steps of the run.
        threshold: τ > 0.
        retained: Number of first steps that are always computed, at least 2.
    """
    with hooked(model, [(model, _Reuse(threshold, steps, retained))]):
        yield
