"""Several plans on one pipeline: switching between them, what is logged, and what a call without a skip says."""

import copy
import logging
import random
import threading

import pytest
import torch

import ertacache
from ertacache import PlanError, PlanSet
from helpers import HALF, budget_plan, counted, flux_plan, no_warning, refused, threshold_plan
from tiny_pipelines import STEPS, flux, sd3

QUARTER = (0, 4)


def plans_of(tiny) -> PlanSet:
    return PlanSet({4: budget_plan(tiny, QUARTER), 2: budget_plan(tiny, HALF)})


def fresh(plans, speedup, seed):
    """The latents of a pipeline of its own."""
    tiny = flux()
    if speedup is not None:
        ertacache.enable(tiny.pipe, plans[speedup])
    return tiny.run(seed=seed)


def test_a_set_begins_with_its_least_speedup_and_switches_between_calls():
    tiny = flux()
    plans = plans_of(tiny)
    ertacache.enable(tiny.pipe, plans)
    assert counted(tiny)[1] == 4
    for speedup, calls in ((4, 2), (None, STEPS), (2, 4), (4, 2)):
        ertacache.speedup(tiny.pipe, speedup)
        with no_warning():
            latents, count = counted(tiny, seed=3)
        assert count == calls and torch.equal(latents, fresh(plans, speedup, 3)), speedup
    assert ertacache.summary(tiny.pipe).calls == 5


def test_a_scheduler_that_was_set_before_the_choice_follows_it():
    """WanAnimate sets its scheduler once more at the end of each call."""
    tiny = sd3()
    plans = plans_of(tiny)
    ertacache.enable(tiny.pipe, plans)
    for speedup, calls in ((2, 4), (4, 2), (None, STEPS), (2, 4)):
        ertacache.speedup(tiny.pipe, speedup)
        assert counted(tiny)[1] == calls
        tiny.pipe.scheduler.set_timesteps(STEPS)


def test_without_a_plan_a_call_may_have_any_number_of_steps():
    tiny = flux()
    ertacache.enable(tiny.pipe, plans_of(tiny))
    ertacache.speedup(tiny.pipe, None)
    assert counted(tiny, num_inference_steps=5)[1] == 5


def test_a_set_may_mix_kinds_and_sites():
    tiny = flux()
    plans = PlanSet({2: budget_plan(tiny, HALF), 1.6: threshold_plan(tiny, (2, 4, 6))})
    ertacache.enable(tiny.pipe, plans)
    counts = []
    for speedup in (1.6, 2):
        ertacache.speedup(tiny.pipe, speedup)
        counts.append(counted(tiny)[1])
    assert counts == [5, 4]


def test_a_call_that_is_under_way_goes_on_as_it_began():
    tiny = flux()
    plans = plans_of(tiny)
    ertacache.enable(tiny.pipe, plans)

    def switch(pipe, step, timestep, tensors):
        ertacache.speedup(pipe, 4)
        return tensors

    first = tiny.run(seed=1, callback_on_step_end=switch)
    assert torch.equal(first, fresh(plans, 2, 1))
    assert counted(tiny)[1] == 2


def test_every_thread_has_its_own_choice():
    """Two copies of one pipeline, as in a server, at speeds that change at random."""
    tiny = flux()
    plans = plans_of(tiny)
    ertacache.enable(tiny.pipe, plans)
    expected = {(speedup, seed): fresh(plans, speedup, seed) for speedup in (2, 4, None) for seed in (0, 1)}
    wrong = []

    def serve(number):
        own, rng = copy.copy(tiny.pipe), random.Random(number)
        own.scheduler = copy.deepcopy(tiny.pipe.scheduler)
        for _ in range(12):
            speedup, seed = rng.choice([2, 4, None]), rng.choice([0, 1])
            ertacache.speedup(own, speedup)
            options = {**tiny.arguments, "num_inference_steps": STEPS, "output_type": "latent"}
            found = own(**options, generator=torch.Generator().manual_seed(seed)).images
            if not torch.equal(found, expected[speedup, seed]):
                wrong.append((number, speedup, seed))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    ertacache.speedup(tiny.pipe, 4)
    counts = []
    thread = threading.Thread(target=lambda: counts.append(counted(tiny)[1]))  # has never chosen
    thread.start()
    thread.join()
    assert counts == [2]


def test_what_is_no_set_or_not_in_it_is_refused(tmp_path):
    tiny = flux()
    with refused("follows no plan", "ertacache.enable"):
        ertacache.speedup(tiny.pipe, 2)
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plans_of(tiny))
    for value, words in ((3, "for 2, 4"), (0.5, "at least 1"), (5, "at most 4"), ("2", "at least 1"), (True, "1")):
        with refused(words):
            ertacache.speedup(tiny.pipe, value)
    with refused("give at least one"):
        PlanSet({})
    with refused("give plans"):
        PlanSet({2: "plan.json"})
    with refused("8 and 9 steps", error=PlanError):
        steps = plan.requirements.__class__(9, plan.requirements.model, plan.requirements.scheduler)
        longer = type(plan)(steps, HALF, plan.weights, tuple(torch.linspace(1, 0, 10).tolist()), scale=plan.scale)
        PlanSet({2: plan, 3: longer})
    with refused("pipeline first"):
        ertacache.enable({2: plan}, tiny.pipe)
    with refused("another model", error=PlanError):
        ertacache.enable(sd3().pipe, {2: plan})


def test_a_set_is_shared_as_one_folder(tmp_path):
    tiny = flux()
    plans = plans_of(tiny)
    plans.save_pretrained(tmp_path / "set")
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert names == [
        *("README.md", "plan-2.json", "plan-2.safetensors", "plan.json", "plan.safetensors", "schedule.png"),
    ]
    assert "ertacache.speedup(pipe, 4)" in (tmp_path / "set" / "README.md").read_text()
    read = PlanSet.from_pretrained(tmp_path / "set")
    assert dict(read) == dict(plans) and ertacache.Plan.from_pretrained(tmp_path / "set") == plans[2]
    ertacache.enable(tiny.pipe, tmp_path / "set")
    ertacache.speedup(tiny.pipe, 4)
    assert counted(tiny)[1] == 2
    PlanSet({2: plans[2]}).save_pretrained(tmp_path / "set")  # takes the place of the larger one
    assert list(PlanSet.from_pretrained(tmp_path / "set")) == [2]


# --- proof of engagement ---------------------------------------------------------------------------------------------


def test_each_call_is_logged_in_a_line(caplog):
    tiny = flux()
    ertacache.enable(tiny.pipe, flux_plan())
    with caplog.at_level(logging.INFO, "ertacache"):
        tiny.run()
        tiny.run()
    lines = [record.getMessage() for record in caplog.records if record.name == "ertacache"]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("4 steps computed, 4 skipped, ") and "s per computed step" in line
        assert "× faster than 8 such steps" in line
    found = ertacache.summary(tiny.pipe)
    assert 0 < found.speedup <= STEPS / 4 + 1e-9 and found.seconds_per_step > 0


def test_a_plan_that_skips_nothing_is_one_warning():
    """An image-to-image call that begins where its plan computes every step."""
    from tiny_pipelines import flux_img2img

    tiny = flux_img2img()
    ertacache.enable(tiny.pipe, budget_plan(tiny, (0, 3, 6, 7)))
    with pytest.warns(UserWarning, match=r"has skipped no step of this call, which began at step 6 of 8.*calibrate"):
        tiny.run(strength=0.13)
    with no_warning():
        tiny.run(strength=0.13)
