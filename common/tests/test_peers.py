"""Every peer on every demo: it saves work, it is gone afterwards, and it is told what it has to know."""

import pytest
import torch

from ertacache.baselines.stack import blocks_of
from ertacache.peers import PEERS, Bench
from ertacache.stock import stock_latents

STEPS, SEEDS = 8, [3, 4]
OWN = {  # values with which the method engages within eight steps
    "first-block": 0.6,
    "taylorseer": 4,
    "taylorseer-lite": 4,
    "magcache": 0.5,
    "pab": 4,
    "teacache": 0.6,
    "delta-dit": (2, 1.0),
    "profilingdit": (2, 0.75),
    "t-gate": 0.5,
}


@pytest.fixture(scope="module")
def bench(room):
    settings = room.program.settings_of(room.pipe, steps=STEPS)
    return Bench(room.pipe, settings, room.prompts, batch_size=2)


def run(bench):
    return stock_latents(bench.pipe, bench.prompts, SEEDS, bench.settings)


def test_the_stock_run_is_the_loop_without_a_plan(room, bench):
    latents, seconds = run(bench)
    inputs = room.program.prepare(room.pipe, room.prompts, SEEDS, **bench.settings)
    assert torch.equal(latents, room.program.denoise(room.pipe, inputs)) and 0 < seconds < 60


@pytest.mark.parametrize("name", OWN)
def test_a_peer_saves_work_and_leaves_nothing_behind(bench, name):
    peer = PEERS[name]
    if peer.unfit(bench):
        pytest.skip(peer.unfit(bench))
    plain, flops = run(bench)[0], bench.flops()
    with peer.apply(bench, OWN[name]):
        cached, again = run(bench)[0], run(bench)[0]
        saved = bench.flops() / flops
    assert torch.isfinite(cached).all() and torch.equal(cached, again)
    assert torch.equal(run(bench)[0], plain)
    assert saved < 0.97 and not torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["dbcache", "dbcache-taylorseer", "dbcache-mask"])
def test_cache_dit_says_what_it_needs(room, bench, name):
    peer, known = PEERS[name], room.name != "ERTACache4OpenSora1.2"
    reason = peer.unfit(bench)
    assert reason is None or "sh scripts/setup.sh peers" in reason or not known
    assert known or reason is not None


def test_what_methods_learn(bench):
    assert len(bench.polynomial) == 5 and all(map(torch.isfinite, torch.tensor(bench.polynomial)))
    assert len(bench.profile.shares[0]) == len(blocks_of(bench.model))
    assert len(bench.mag_ratios) == STEPS and bench.mag_ratios[0] == 1 and min(bench.mag_ratios) > 0
