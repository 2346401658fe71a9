"""Caches on STDiT3: diffusers' own find its blocks and leave no trace; TeaCache decides as the original; T-GATE."""

import copy
from contextlib import ExitStack

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks.hooks import CacheContext, StateManager

from ertacache.caches.block_stack import BranchState, Clock
from ertacache.caches.teacache import COEFFICIENTS, TeaCachePolicy, teacache
from ertacache.caches.tgate import Gate, _Attention, first_half, tgate
from ertacache.numerics.blocks import hooked
from helpers import CallCounter
from opensora import case_a, far, golden, transformer, vae
from opensora12 import OpenSoraPipeline, RFlowScheduler

STEPS = 6
FIRST, OTHERS = (
    "transformer_blocks.0.attn.to_qkv",
    [
        "temporal_transformer_blocks.0.attn.to_qkv",
        "transformer_blocks.1.attn.to_qkv",
        "temporal_transformer_blocks.1.attn.to_qkv",
    ],
)
CROSS = "transformer_blocks.1.cross_attn.to_q"


def pyramid(pipe):
    """Both identifiers are given because the default spatial one, `blocks`, fits the temporal blocks as well."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=3,
        cross_attention_block_skip_range=6,
        spatial_attention_timestep_skip_range=(-1, 1001),
        temporal_attention_timestep_skip_range=(-1, 1001),
        cross_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("^transformer_blocks",),
        temporal_attention_block_identifiers=("^temporal_transformer_blocks",),
        current_timestep_callback=lambda: pipe.current_timestep or 500,
    )


# cache: (its config, and of six calls those that run the attention of the first block, the three others, the text's)
CACHES = {
    "first block": (lambda pipe: FirstBlockCacheConfig(threshold=2.0), (6, [1, 1, 1], 1)),
    "mag": (
        # Two steps kept, then at most two skipped in a row; a seventh step would begin anew.
        lambda pipe: MagCacheConfig(
            1.0, max_skip_steps=2, retention_ratio=0.3, num_inference_steps=7, mag_ratios=[1.0] * 7
        ),
        (3, [3, 3, 3], 3),
    ),
    "taylor": (  # Steps 0, 1 and 3.
        lambda pipe: TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
        ),
        (3, [3, 3, 3], 3),
    ),
    "pyramid": (pyramid, (3, [2, 3, 2], 1)),
}


@pytest.fixture
def pipe():
    pipe = OpenSoraPipeline(None, None, vae(), copy.deepcopy(transformer()), RFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def counted(model, run):
    """What `run` returns, and how often it ran the watched modules."""
    with ExitStack() as stack:
        counters = {n: stack.enter_context(CallCounter(model.get_submodule(n))) for n in (FIRST, *OTHERS, CROSS)}
        result = run()
    return result, (counters[FIRST].count, [counters[n].count for n in OTHERS], counters[CROSS].count)


@pytest.mark.parametrize(("config", "calls"), CACHES.values(), ids=CACHES)
def test_equal_calls_are_skipped_and_change_nothing(pipe, config, calls):
    """What a cache reuses is right for an equal call: it would not be with another first or last block."""
    model = pipe.transformer
    plain = model(**case_a()).sample

    def run():
        with model.cache_context("cond_uncond"):
            return [model(**case_a()).sample for _ in range(STEPS)]

    model.enable_cache(config(pipe))
    outputs, found = counted(model, run)
    model.disable_cache()
    assert found == calls
    assert all(far(out, plain) < 1e-4 for out in outputs)
    assert torch.equal(model(**case_a()).sample, plain)


@pytest.mark.parametrize(("config", "calls"), CACHES.values(), ids=CACHES)
def test_a_sampling_loop_is_shorter_and_finite(pipe, config, calls):
    g = golden("rflow_trajectory_n1")
    pipe.set_timesteps(STEPS, num_frames=51, height=48, width=64)

    def run():
        return pipe.denoise(g["z0"], pipe.conditioning(g["y"][:, 0], g["mask"], 51, 48, 64))

    plain = run()
    pipe.transformer.enable_cache(config(pipe))
    cached, found = counted(pipe.transformer, run)
    pipe.maybe_free_model_hooks()  # as at the end of a call: the next video starts without memory
    again = run()
    pipe.transformer.disable_cache()
    assert found == calls
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    assert torch.equal(again, cached) and torch.equal(run(), plain)


# --- TeaCache against the original's run ---------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.1, 0.2])
def test_teacache_skips_the_steps_of_the_original(threshold):
    g, model = golden("teacache_tiny"), copy.deepcopy(transformer())
    for name, factor in {
        "proj_out.weight": 0.1,
        "proj_out.bias": 0.1,
        "time_modulation.weight": 0.2,
        "patch_embed.proj.weight": 0.3,
    }.items():
        model.get_parameter(name).mul_(factor)
    pipe, seen = OpenSoraPipeline(None, None, vae(), model, RFlowScheduler()), []
    pipe.set_progress_bar_config(disable=True)
    pipe.set_timesteps(30, num_frames=51, height=480, width=854)
    attention = model.transformer_blocks[0].attn
    attention.register_forward_hook(lambda *_: seen.append(round(pipe.current_timestep.item(), 3)))
    coefficients = COEFFICIENTS["hpcai-tech/OpenSora-STDiT-v3"]
    with teacache(model, TeaCachePolicy(threshold, coefficients, steps=30)):
        z = pipe.denoise(g["z0"], pipe.conditioning(g["y"][:, 0], g["mask"], 51, 480, 854))
    times = [round(t, 3) for t in pipe.scheduler.timesteps.tolist()]
    computed = [times.index(t) for t in seen]
    assert computed == g[f"s30.th{threshold}.should_calc"].nonzero().flatten().tolist()
    assert 2 < len(computed) < 30 and far(z, g[f"s30.th{threshold}.z_final"]) < 2e-3


# --- T-GATE --------------------------------------------------------------------------------------------------------


def test_tgate_freezes_the_text_behind_the_gate_and_drops_the_null_branch(pipe):
    g, model, outputs = golden("rflow_trajectory_n1"), pipe.transformer, []
    pipe.set_timesteps(STEPS, num_frames=51, height=48, width=64)
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output[0]))

    def run():
        return pipe.denoise(g["z0"], pipe.conditioning(g["y"][:, 0], g["mask"], 51, 48, 64))

    plain = run()
    outputs.clear()
    with tgate(model, Gate(step=4, interval=2, warmup=1)):
        gated, (own, _, cross) = counted(model, run)
    handle.remove()
    # Self-attention runs in steps 0 (warm-up), 1, 3, and again from 4; cross-attention in the four before the gate.
    assert own == 5 and cross == 4
    same = [torch.equal(*output.chunk(2)) for output in outputs]
    assert same == [False] * 4 + [True] * 2
    assert torch.isfinite(gated).all() and not torch.equal(gated, plain) and torch.equal(run(), plain)


def test_a_gate_behind_the_last_step_changes_nothing(pipe):
    g = golden("rflow_trajectory_n1")
    pipe.set_timesteps(STEPS, num_frames=51, height=48, width=64)

    def run():
        return pipe.denoise(g["z0"], pipe.conditioning(g["y"][:, 0], g["mask"], 51, 48, 64))

    with tgate(pipe.transformer, Gate(step=STEPS, interval=1)):
        gated = run()
    assert torch.equal(gated, run())


def test_what_is_frozen_is_the_mean_of_both_branches():
    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    manager, module = StateManager(BranchState), Double()
    with hooked(module, [(module, _Attention(manager, Gate(step=1), cross=True)), (module, Clock(manager))]):
        for name, value in (("cond", 1.0), ("uncond", 3.0), ("cond", 100.0)):
            manager.set_context(CacheContext(name))
            found = module(torch.tensor([value]))
    assert found.item() == (2 * 1 + 2 * 3) / 2
    assert first_half(torch.arange(6), 6).tolist() == [0, 1, 2] and first_half("a", 6) == "a"


def test_tgate_needs_cross_attention():
    with pytest.raises(ValueError, match="a Linear has none"), tgate(Unfit(), Gate()):
        pass


class Unfit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
