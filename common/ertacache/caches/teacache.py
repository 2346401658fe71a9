"""TeaCache (Liu et al., CVPR 2025; ali-vilab/TeaCache): reuse the block stack while its input has hardly changed.

An indicator m_i, cheap to have before the blocks run, is compared from step to step. A polynomial, fitted once a model,
turns its relative change into the expected change of the model's output. These are summed until they reach δ; then the
stack runs, and the sum starts again. The first and the last step always run.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ertacache.caches.block_stack import BranchState, blocks_of, cached_ranges

DEGREE = 4


def relative_change(new: torch.Tensor, old: torch.Tensor) -> float:
    """mean |new − old| / mean |old|."""
    return ((new - old).abs().mean() / old.abs().mean()).item()


# --- the indicators: functions of the first block and its arguments -----------------------------------------------


def flux_indicator(block, arguments) -> torch.Tensor:
    """The modulated image tokens that enter the first attention."""
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def time_indicator(block, arguments) -> torch.Tensor:
    """The time embedding that the block is given: for CogVideoX, and for Wan (projected: its `use_ret_steps` mode)."""
    return arguments["temb"]


def opensora_indicator(block, arguments) -> torch.Tensor:
    """The modulated tokens that enter the first spatial attention."""
    shift, scale = (block.scale_shift_table + arguments["modulation"]).unsqueeze(3).unbind(2)[:2]
    return block.norm1(arguments["hidden_states"]) * (1 + scale) + shift


INDICATORS: dict[str, Callable] = {
    "FluxTransformerBlock": flux_indicator,
    "WanTransformerBlock": time_indicator,
    "CogVideoXBlock": time_indicator,
    "STDiT3Block": opensora_indicator,
}
COEFFICIENTS = {  # as published, for the real checkpoints; highest power first
    "black-forest-labs/FLUX.1-dev": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "THUDM/CogVideoX-2b": (-31.0658903, 25.4732368, -5.9238046, 1.75769064, -0.00361568434),
    "hpcai-tech/OpenSora-STDiT-v3": (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624),
}


@dataclass(frozen=True)
class TeaCachePolicy:
    """Compute when the summed expected change reaches δ.

    threshold: δ > 0. coefficients: of the polynomial, highest power first. steps: T. retained: how many first steps
    are always computed (1; Wan's mode with projected time embeddings: 5).
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
    """TeaCache on a stock transformer, for the pipeline's calls within the context."""
    with cached_ranges(model, [(blocks_of(model), policy)]):
        yield


# --- fitting the polynomial, as the authors do -------------------------------------------------------------------


@dataclass
class Fitting:
    """Watches uncached runs: relative changes of the indicator and of the model's output, step by step."""

    pairs: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, state: BranchState, block: torch.nn.Module, arguments: dict) -> bool:
        indicator = INDICATORS[type(block).__name__](block, arguments)
        previous, state.memory["indicator"] = state.memory.get("indicator"), indicator
        state.memory["change"] = None if previous is None else relative_change(indicator, previous)
        return True

    @contextmanager
    def watch(self, model: torch.nn.Module):
        with cached_ranges(model, [(blocks_of(model), self)]) as manager:

            def leaving(module, args, kwargs, output):
                state, made = manager.get_state(), output[0]
                previous, state.memory["output"] = state.memory.get("output"), made
                if previous is not None:
                    self.pairs.append((state.memory["change"], relative_change(made, previous)))

            handle = model.register_forward_hook(leaving, with_kwargs=True)
            try:
                yield self
            finally:
                handle.remove()

    def coefficients(self, degree: int = DEGREE) -> tuple[float, ...]:
        """Least squares of the output's change as a polynomial of the indicator's, highest power first."""
        changes, outputs = np.array(self.pairs).T
        return tuple(np.polyfit(changes, outputs, degree).tolist())
