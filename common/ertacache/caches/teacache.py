"""TeaCache (Liu et al., CVPR 2025; ali-vilab/TeaCache): reuse the block stack while its input has hardly changed.

An indicator m_i, cheap to compute before the blocks run, is compared from step to step. A polynomial, fitted once per
model, maps its relative change to the expected change of the model's output. Expected changes are summed until they
reach δ; then the stack runs and the sum restarts. The first and the last step always run.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ertacache.caches.block_stack import BranchState, cached_ranges
from ertacache.numerics.blocks import blocks_of

DEGREE = 4


def relative_change(new: torch.Tensor, old: torch.Tensor) -> float:
    """Return mean |new − old| / mean |old|."""
    return ((new - old).abs().mean() / old.abs().mean()).item()


# --- indicators: functions of the first block and its arguments ---------------------------------------------------


def flux_indicator(block, arguments) -> torch.Tensor:
    """Return the modulated image tokens that enter the first attention, [B, L, D]."""
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def time_indicator(block, arguments) -> torch.Tensor:
    """Return the block's time embedding: for CogVideoX, and for Wan (projected, as in its `use_ret_steps` mode)."""
    return arguments["temb"]


def opensora_indicator(block, arguments) -> torch.Tensor:
    """Return the modulated tokens that enter the first spatial attention."""
    shift, scale = (block.scale_shift_table + arguments["modulation"]).unsqueeze(3).unbind(2)[:2]
    return block.norm1(arguments["hidden_states"]) * (1 + scale) + shift


INDICATORS: dict[str, Callable] = {
    "FluxTransformerBlock": flux_indicator,
    "WanTransformerBlock": time_indicator,
    "CogVideoXBlock": time_indicator,
    "STDiT3Block": opensora_indicator,
}
COEFFICIENTS = {  # published in ali-vilab/TeaCache for these checkpoints; highest power first
    "black-forest-labs/FLUX.1-dev": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "THUDM/CogVideoX-2b": (-31.0658903, 25.4732368, -5.9238046, 1.75769064, -0.00361568434),
    "hpcai-tech/OpenSora-STDiT-v3": (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624),
}


@dataclass(frozen=True)
class TeaCachePolicy:
    """Compute a step when the summed expected change reaches δ.

    Attributes:
        threshold: δ > 0.
        coefficients: Of the polynomial, highest power first.
        steps: T, steps of the run.
        retained: Number of first steps that are always computed (Wan's mode with projected time embeddings: 5).
    """

    threshold: float
    coefficients: tuple[float, ...]
    steps: int
    retained: int = 1

    def __call__(self, state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
        indicator = INDICATORS[type(block).__name__](block, arguments)
        previous, state.memory["indicator"] = state.memory.get("indicator"), indicator
        if previous is not None:
            change = float(np.polyval(self.coefficients, relative_change(indicator, previous)))
            state.memory["sum"] = state.memory.get("sum", 0.0) + change
        forced = state.step < self.retained or state.step == self.steps - 1
        if forced or state.memory["sum"] >= self.threshold:
            state.memory["sum"] = 0.0
            return True
        return False


@contextmanager
def teacache(model: torch.nn.Module, policy: TeaCachePolicy):
    """Apply TeaCache to a stock transformer, for the pipeline's calls within the context."""
    with cached_ranges(model, [(blocks_of(model), policy)]):
        yield


# --- the polynomial, fitted as the authors do --------------------------------------------------------------------


@dataclass
class Fitting:
    """Observer of uncached runs, for the fit of the polynomial.

    Attributes:
        pairs: (relative change of the indicator, relative change of the model's output) of each step after the first.
    """

    pairs: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
        indicator = INDICATORS[type(block).__name__](block, arguments)
        previous, state.memory["indicator"] = state.memory.get("indicator"), indicator
        state.memory["change"] = None if previous is None else relative_change(indicator, previous)
        return True

    @contextmanager
    def watch(self, model: torch.nn.Module):
        """Observe the model's calls within the context."""
        with cached_ranges(model, [(blocks_of(model), self)]) as manager:

            def record(module, args, kwargs, output):
                state, new = manager.get_state(), output[0]
                previous, state.memory["output"] = state.memory.get("output"), new
                if previous is not None:
                    self.pairs.append((state.memory["change"], relative_change(new, previous)))

            handle = model.register_forward_hook(record, with_kwargs=True)
            try:
                yield self
            finally:
                handle.remove()

    def coefficients(self, degree: int = DEGREE) -> tuple[float, ...]:
        """Return the least-squares polynomial from the indicator's change to the output's, highest power first."""
        changes, outputs = np.array(self.pairs).T
        return tuple(np.polyfit(changes, outputs, degree).tolist())
