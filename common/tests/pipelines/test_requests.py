"""Requests on one pipeline or on copies of it: one after another, at once, broken off, one inside another."""

import contextlib
import copy
import threading
from dataclasses import replace

import pytest
import torch

import ertacache
from ertacache import UserError
from ertacache.pipelines.enable import originals
from helpers import HALF, CallCounter, budget_plan, flux_plan
from tiny_pipelines import STEPS, flux, sd3, wan


def two_outputs(tiny, computed=HALF):
    """A plan whose jumps combine two velocities, so that another request's would change the result."""
    plan = budget_plan(tiny, computed, history_length=2)
    weights = tuple((1.5 * w, -0.5 * w) if row else (w, 0.0) for row, (w, _) in enumerate(plan.weights))
    return replace(plan, weights=weights)


def at_once(requests):
    """Run the requests in threads that meet at every model call; {name: latents or error}."""
    found = {}

    def run(name, request):
        try:
            found[name] = request()
        except Exception as error:
            found[name] = error

    threads = [threading.Thread(target=run, args=item) for item in requests.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def meeting(module, count):
    barrier = threading.Barrier(count)

    def wait(*_):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(timeout=1)

    return module.register_forward_pre_hook(wait)


def test_a_second_request_on_a_pipeline_is_an_error_in_the_first_and_never_a_wrong_picture():
    tiny = sd3()
    ertacache.enable(tiny.pipe, two_outputs(tiny))
    alone = {seed: tiny.run(seed=seed) for seed in (0, 1)}
    hook = meeting(tiny.pipe.transformer, 2)
    found = at_once({seed: lambda seed=seed: tiny.run(seed=seed) for seed in (0, 1)})
    hook.remove()
    errors = [x for x in found.values() if isinstance(x, Exception)]
    assert errors and all(isinstance(x, UserError) and "copy.deepcopy(pipe.scheduler)" in str(x) for x in errors)
    right = [seed for seed, x in found.items() if torch.is_tensor(x)]
    assert all(torch.equal(found[seed], alone[seed]) for seed in right)
    assert torch.equal(tiny.run(seed=1), alone[1])


@pytest.mark.parametrize("build", [flux, wan])
def test_requests_with_a_copy_of_the_scheduler_each_share_the_model(build):
    """As servers do that copy the pipeline and its scheduler for every request, and keep one model."""
    tiny = build()
    plan = two_outputs(tiny)
    ertacache.enable(tiny.pipe, plan)
    alone = {seed: tiny.run(seed=seed) for seed in (0, 1, 2)}
    before = ertacache.summary(tiny.pipe)

    def request(seed):
        pipe = copy.copy(tiny.pipe)
        pipe.scheduler = copy.deepcopy(tiny.pipe.scheduler)
        return replace(tiny, pipe=pipe).run(seed=seed)

    hook = meeting(tiny.pipe.transformer, 3)
    with CallCounter(tiny.pipe.transformer) as calls:
        found = at_once({seed: lambda seed=seed: request(seed) for seed in (0, 1, 2)})
    hook.remove()
    assert all(torch.equal(found[seed], alone[seed]) for seed in (0, 1, 2)), found
    assert calls.count == 3 * plan.nfe * tiny.branches
    after = ertacache.summary(tiny.pipe)
    assert (after.calls - before.calls, after.all_computed - before.all_computed) == (3, 3 * plan.nfe)


@pytest.mark.parametrize("step", range(STEPS))
def test_a_request_that_breaks_off_leaves_nothing_for_the_next(step):
    tiny = flux()
    plan = two_outputs(tiny)
    ertacache.enable(tiny.pipe, plan)
    first = tiny.run()

    def break_off(pipe, i, t, tensors):
        if i == step:
            raise RuntimeError("out of memory")
        return tensors

    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.run(callback_on_step_end=break_off)
    with CallCounter(tiny.pipe.transformer) as calls:
        assert torch.equal(tiny.run(), first)
    assert calls.count == plan.nfe and ertacache.summary(tiny.pipe).calls == 3


def test_a_request_inside_another_on_a_copy_of_the_pipeline():
    """A callback runs a second pipeline, with a scheduler of its own, at every step."""
    tiny = flux()
    ertacache.enable(tiny.pipe, two_outputs(tiny))
    other = replace(tiny, pipe=copy.deepcopy(tiny.pipe))
    alone, within = tiny.run(), []

    def preview(pipe, i, t, tensors):
        within.append(other.run(seed=1))
        return tensors

    with CallCounter(originals(tiny.pipe)["transformer"]) as calls:
        assert torch.equal(tiny.run(callback_on_step_end=preview), alone)
    assert calls.count == len(HALF)  # the copy has a model of its own
    assert len(within) == STEPS and all(torch.equal(x, within[0]) for x in within)
    assert torch.equal(within[0], tiny.run(seed=1))


def test_a_pipeline_that_runs_through_its_steps_several_times_counts_each_time():
    """One that makes a video in segments sets its timesteps for every one; twice before it steps is once."""
    tiny = sd3()

    class InSegments(type(tiny.pipe)):
        def __call__(self, **options):
            self.scheduler.set_timesteps(STEPS)
            return [super(InSegments, self).__call__(**options)[0] for _ in range(3)]

    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    tiny.pipe.__class__ = InSegments
    tiny.run()
    summary = ertacache.summary(tiny.pipe)
    assert (summary.calls, summary.computed, summary.skipped) == (3, 4, 4)
    assert (summary.all_computed, summary.all_skipped) == (12, 12)


def test_pipelines_can_be_pickled():
    import pickle

    tiny = flux()
    ertacache.enable(tiny.pipe, flux_plan())
    wanted = tiny.run()
    enabled = pickle.loads(pickle.dumps((tiny.pipe.scheduler, tiny.pipe.transformer)))
    tiny.pipe.scheduler, tiny.pipe.transformer = enabled
    with CallCounter(tiny.pipe.transformer) as calls:
        assert torch.equal(tiny.run(), wanted)
    assert calls.count == len(HALF)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_models_that_a_broken_request_left_behind_serve_others_without_a_plan(step):
    """A pipeline of the same components with a scheduler of its own, after a request was broken off at this step."""
    tiny = sd3()
    plain = tiny.run(seed=1)
    scheduler = copy.deepcopy(tiny.pipe.scheduler)
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))

    def break_off(pipe, i, t, tensors):
        if i == step:
            raise RuntimeError("out of memory")
        return tensors

    with pytest.raises(RuntimeError):
        tiny.run(callback_on_step_end=break_off)
    other = replace(tiny, pipe=type(tiny.pipe)(**{**tiny.pipe.components, "scheduler": scheduler}))
    other.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(other.run(seed=1), plain)


def test_a_model_that_a_broken_request_left_behind_never_answers_with_what_it_kept():
    """Broken off on the first skipped step, whose time another run from the beginning may have too: an error."""
    tiny = sd3()
    scheduler = copy.deepcopy(tiny.pipe.scheduler)
    ertacache.enable(tiny.pipe, budget_plan(tiny, (0, 4)))

    def break_off(pipe, i, t, tensors):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        tiny.run(callback_on_step_end=break_off)
    other = replace(tiny, pipe=type(tiny.pipe)(**{**tiny.pipe.components, "scheduler": scheduler}))
    with pytest.raises(UserError, match="broken off"):
        other.run(seed=1)
