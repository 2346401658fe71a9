"""Every other cache on every demo: it saves work, leaves nothing behind, and is given what it must know."""

import pytest
import torch

from ertacache.caches.fitting import PipelineUnderTest
from ertacache.caches.registry import CACHES
from ertacache.caches.third_party import diffusers_cache
from ertacache.caches.tuning import midpoint, nearest_settings
from ertacache.numerics.blocks import blocks_of
from ertacache.pipelines.uncached import uncached_latents
from helpers import fast

STEPS, SEEDS = 8, [3, 4]
SHORT = {"ERTACache4Wan2.1": {"frames": 5}, "ERTACache4CogVideoX-2B": {"frames": 9}}  # videos that cost less
OWN = {  # values with which the method engages within eight steps
    "first-block": 0.6,
    "taylorseer": 4,
    "taylorseer-lite": 4,
    "magcache": (0.5, 5, 0.2),
    "seacache": (1.6, 6),
    "fastercache": (3, 5, 1000),
    "pab": (4, (0, 1000), 4),
    "dbcache": (0.8, 2, 6),
    "dbcache-taylorseer": (0.8, 2, 6),
    "dbcache-mask": (2, 3),
    "teacache": 0.6,
    "easycache": (0.6, 2),
    "delta-dit": (2, 1.0),
    "profilingdit": (2, 0.75, 2),
    "t-gate": 0.5,
}


@pytest.fixture(scope="module")
def bench(model_folder):
    short = SHORT.get(model_folder.name, {})
    settings = model_folder.sampler.settings_of(model_folder.pipe, steps=STEPS, **short)
    return PipelineUnderTest(model_folder.pipe, settings, model_folder.prompts, batch_size=2)


def run(bench):
    return uncached_latents(bench.pipe, bench.prompts, SEEDS, bench.settings)


@pytest.fixture(scope="module")
def uncached(bench):
    """Latents, and FLOPs per prompt."""
    return run(bench)[0], bench.flops()


def test_the_stock_run_is_the_loop_without_a_plan(model_folder, bench):
    latents, seconds = run(bench)
    inputs = model_folder.sampler.prepare(model_folder.pipe, model_folder.prompts, SEEDS, **bench.settings)
    assert torch.equal(latents, model_folder.sampler.denoise(model_folder.pipe, inputs)) and 0 < seconds < 60


@pytest.mark.parametrize("name", fast(OWN, "dbcache", "delta-dit"))
def test_another_cache_saves_work_and_leaves_nothing_behind(bench, uncached, name):
    cache = CACHES[name]
    if cache.reason_not_to_run(bench):
        pytest.skip(cache.reason_not_to_run(bench))
    (plain, flops), children = uncached, list(dict(bench.model.named_children()))
    with cache.apply(bench, OWN[name]):
        cached, again = run(bench)[0], run(bench)[0]
        saved = bench.flops() / flops
    assert torch.isfinite(cached).all() and torch.equal(cached, again)
    assert torch.equal(run(bench)[0], plain) and list(dict(bench.model.named_children())) == children
    assert saved < 0.97 and not torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["dbcache", "dbcache-taylorseer", "dbcache-mask"])
def test_cache_dit_says_what_it_needs(model_folder, bench, name, monkeypatch):
    assert all(cache.package in (None, "cache_dit") for cache in CACHES.values())
    monkeypatch.setattr("ertacache.caches.registry.find_spec", lambda package: None)
    known = model_folder.name != "ERTACache4OpenSora1.2"
    reason = "sh scripts/setup.sh peers" if known else "does not know Open-Sora"
    assert reason in CACHES[name].reason_not_to_run(bench)


def test_which_models_a_cache_does_not_fit(model_folder, bench):
    """The only reasons to skip above, with the extra `peers` installed."""
    assert {name for name, cache in CACHES.items() if bench.first_block in cache.cannot_run} == {
        "ERTACache4FLUX": {"seacache", "t-gate"},
        "ERTACache4Wan2.1": {"fastercache"},
        "ERTACache4CogVideoX-2B": {"seacache", "t-gate"},
        "ERTACache4OpenSora1.2": {"seacache", "fastercache", "dbcache", "dbcache-taylorseer", "dbcache-mask"},
    }[model_folder.name]


@pytest.mark.slow
def test_pab_is_diffusers_own_where_a_step_is_one_call(model_folder, bench):
    """Wan's step is one without guidance. Wide ranges: of eight steps few lie in a window."""
    from diffusers import PyramidAttentionBroadcastConfig

    guidance = 1.0 if model_folder.name == "ERTACache4Wan2.1" else bench.settings["guidance"]
    single = PipelineUnderTest(bench.pipe, {**bench.settings, "guidance": guidance}, bench.prompts, batch_size=2)
    ranges = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 6}
    if model_folder.name == "ERTACache4OpenSora1.2":
        ranges["temporal_attention_block_skip_range"] = 4
    config = PyramidAttentionBroadcastConfig(
        **ranges,
        spatial_attention_block_identifiers=(r"^(single_)?(transformer_)?blocks",),
        current_timestep_callback=lambda: bench.pipe.current_timestep,
    )
    with diffusers_cache(single, config):
        theirs, flops = run(single)[0], single.flops()
    with CACHES["pab"].apply(single, (2, (100, 800), 1)):
        assert torch.equal(run(single)[0], theirs) and single.flops() == flops
    assert not torch.equal(run(single)[0], theirs) and single.flops() > flops


def test_what_methods_learn(bench):
    assert len(bench.polynomial) == 5 and all(map(torch.isfinite, torch.tensor(bench.polynomial)))
    assert len(bench.profile.shares[0]) == len(blocks_of(bench.model))
    assert len(bench.mag_ratios) == STEPS and bench.mag_ratios[0] == 1 and min(bench.mag_ratios) > 0


@pytest.mark.slow
def test_flops_are_counted_per_prompt(bench, uncached):
    assert bench.flops(2) == pytest.approx(uncached[1], rel=0.02)


def test_midpoint():
    assert midpoint(0.02, 0.08) == 0.04 and midpoint(0.2, 0.21) == 0.205 and midpoint(0.5, 0.501) is None
    assert midpoint(4, 8) == 6 and midpoint(4, 5) is None and midpoint("slow", "fast") is None
    assert midpoint((2, 0.25), (2, 1.0)) == (2, 0.5) and midpoint((4, (100, 800)), (8, (0, 1000))) == (6, (50, 900))
    assert midpoint((2, 0.25), (3, 1.0)) is None and midpoint("slow", (4, 6)) is None


def mean(a, b):
    return (a + b) / 2


def search(sweep, saved_of, between, speedups, refinements=3):
    """What is found, and the values that were asked for."""
    asked = []

    def watched(value):
        asked.append(value)
        return saved_of(value)

    return nearest_settings(sweep, between, watched, speedups, refinements), asked


def test_the_nearest_setting_is_bracketed_and_halved():
    assert search((1, 9), float, mean, [4]) == ({4: (4, 4)}, [1, 9, 5, 3, 4])
    assert search((1, 9), float, mean, [4, 3], refinements=1) == ({4: (5, 5), 3: (5, 5)}, [1, 9, 5])  # each asked once
    assert search((2, 4), float, None, [3]) == ({3: (4, 4)}, [2, 4])  # 4/3 is less than 3/2
    assert search((2, 4), float, lambda a, b: None, [3, 100]) == ({3: (4, 4), 100: (4, 4)}, [2, 4])


def test_a_sweep_that_does_not_rise_throughout():
    saved = {1: 1.0, 2: 3.0, 3: 1.6, 4: 6.0, 2.5: 2.1}
    found, asked = search((1, 2, 3, 4), saved.get, mean, [2, 6, 0.4], refinements=1)
    assert found == {2: (2.5, 2.1), 6: (4, 6.0), 0.4: (1, 1.0)} and asked == [1, 2, 3, 4, 2.5]
