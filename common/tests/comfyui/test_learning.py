"""Learning a plan while images are made: results unchanged, extra calls as stated, a plan as good as calibrate's."""

import threading

import numpy as np
import pytest
import torch

from closed_form_models import CALLS, PIPE, STEPS, FlowModel, calibrated, folder, prompts_and_seeds
from ertacache.comfyui import models
from ertacache.comfyui.learning import Learner
from ertacache.comfyui.samplers import sample_uncached
from ertacache.plans import Plan
from helpers import refused

IMAGES, EXTRA = 4, 24


def images(count):
    for prompt, seed in zip(*prompts_and_seeds(count), strict=True):
        yield folder.prepare(PIPE, [prompt], [seed], steps=STEPS)


def make(learner, inputs, **options):
    """Make one image; returns it, and the number of model calls."""
    model = FlowModel(inputs)
    sigmas = learner.sigmas(inputs.sigmas)
    result = learner.sample(model, inputs.latents, sigmas, disable=True, pupil=model, **options)
    return result, model.calls


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A learner until its plan is there, with what it has said and the calls of each image."""
    path, said, calls = tmp_path_factory.mktemp("plans") / "mine.json", [], []
    learner = Learner(path, STEPS / CALLS, images=IMAGES, extra_calls=EXTRA, say=said.append)
    for inputs in images(30):
        if learner.plan is not None:
            break
        seen = []
        result, count = make(learner, inputs, callback=seen.append)
        calls.append(count)
        assert torch.equal(result, sample_uncached(FlowModel(inputs), inputs.latents, inputs.sigmas, disable=True))
        assert [step["i"] for step in seen] == list(range(count))
    return learner, path, said, calls


def test_each_image_makes_the_calls_that_are_stated(learned):
    _, path, said, calls = learned
    assert calls[: IMAGES - 1] == [STEPS] * (IMAGES - 1)
    assert calls[IMAGES - 1 : -1] == [STEPS + EXTRA] * (len(calls) - IMAGES)
    assert STEPS < calls[-1] <= STEPS + EXTRA and len(calls) > IMAGES
    assert said[0] == "1 of 4 images to learn from" and "24 of at most 96 extra calls" in said[IMAGES - 1]
    assert said[-1].startswith("learned to make 4 of 12 calls") and str(path) in said[-1]


def test_the_plan_is_that_of_calibrate_with_the_same_prompts(learned, tmp_path):
    learner, _, _, _ = learned
    own, plan = calibrated(IMAGES, tmp_path), learner.plan
    assert plan.computed == own.computed
    np.testing.assert_allclose(plan.weights, own.weights, rtol=0, atol=1e-3)
    assert plan.held_out_error == pytest.approx(own.held_out_error, rel=0.02)
    assert plan.requirements.scheduler == {"class": "ComfyUI", "space": "flow"}
    assert plan.requirements.settings["cfg"] == 3.5 and models.space_of_plan(plan) == "flow"


def test_from_then_on_the_same_workflow_is_fast(learned):
    learner, path, _, _ = learned
    *_, inputs = images(20)
    result, calls = make(learner, inputs)
    again, _ = make(Learner(path, 3.0), inputs)  # in another process
    assert calls == CALLS and torch.equal(result, again)
    uncached = sample_uncached(FlowModel(inputs), inputs.latents, inputs.sigmas, disable=True)
    assert (result - uncached).square().mean() < 30 * learner.plan.held_out_error
    assert Plan.load(path).provenance["calibration"]["finished"] and not learner.work.exists()


def test_another_grid_is_refused_then(learned):
    learner, path, _, _ = learned
    with refused(path, "12 steps", "these are 10", "another name"):
        learner.sigmas(torch.linspace(1, 0, 11))
    with refused("sigma", "step 1", "another name"):
        learner.sigmas(torch.linspace(1, 0, STEPS + 1))


def test_a_good_enough_plan_ends_the_search(tmp_path):
    learner = Learner(tmp_path / "a.json", STEPS / CALLS, images=2, extra_calls=1000, good_enough=1.0)
    calls = [make(learner, inputs)[1] for inputs in images(2)]
    assert calls == [STEPS, STEPS + 2 * CALLS] and learner.plan.provenance["calibration"]["rollouts"] == 1


def test_other_runs_teach_nothing(tmp_path):
    said = []
    learner = Learner(tmp_path / "a.json", 3.0, images=3, say=said.append)
    first, second = images(2)
    make(learner, first)
    make(learner, first)
    assert said == ["1 of 3 images to learn from"] * 2  # the same noise
    make(learner, second.on(second.sigmas * 0.9))
    model = FlowModel(second)
    model.unrepeatable = "it has a mask"
    learner.sample(model, second.latents, second.sigmas, disable=True, pupil=model)
    assert "other sigmas" in said[2] and "it has a mask" in said[3] and len(learner.lessons) == 1


def test_an_interrupted_call_is_made_again(tmp_path):
    learner = Learner(tmp_path / "a.json", STEPS / CALLS, images=2, extra_calls=7)
    all_images = list(images(20))
    make(learner, all_images[0])

    class Interrupted(FlowModel):
        def __call__(self, x, sigma):
            if self.calls > STEPS + 2:
                raise KeyboardInterrupt
            return super().__call__(x, sigma)

    model = Interrupted(all_images[1])
    with pytest.raises(KeyboardInterrupt):
        learner.sample(model, all_images[1].latents, all_images[1].sigmas, disable=True, pupil=model)
    for inputs in all_images[2:]:
        make(learner, inputs)
        if learner.plan is not None:
            break
    whole = Learner(tmp_path / "b.json", STEPS / CALLS, images=2, extra_calls=1000)
    for inputs in all_images[:2]:
        make(whole, inputs)
    assert learner.plan.weights == whole.plan.weights


def test_a_learner_that_is_given_up_leaves_nothing(tmp_path):
    before = threading.active_count()
    learner = Learner(tmp_path / "a.json", 3.0, images=2, extra_calls=3, work=tmp_path / "work")
    for inputs in images(2):
        make(learner, inputs)
    assert threading.active_count() == before + 1 and learner.study.calls == 3
    learner.forget()
    for thread in threading.enumerate():
        if thread.name == "ertacache-learning":
            thread.join(60)
    assert threading.active_count() == before and not list((tmp_path / "work").iterdir())


def test_a_calibration_that_fails_leaves_the_images(tmp_path):
    class Failing(FlowModel):
        def __call__(self, x, sigma):
            return super().__call__(x, sigma) * (float("nan") if self.calls > STEPS else 1)

    said = []
    learner = Learner(tmp_path / "a.json", 3.0, images=2, extra_calls=7, say=said.append)
    for inputs in images(3):
        model = Failing(inputs)
        result = learner.sample(model, inputs.latents, inputs.sigmas, disable=True, pupil=model)
        assert result.isfinite().all()
    assert "learning has failed (the model gave a non-finite value at step 0" in said[1] and model.calls == STEPS
    assert "learning has failed" in said[2] and not learner.busy


def test_arguments_out_of_range_are_refused(tmp_path):
    for options, words in (
        ({"speedup": 0.5}, ("speedup", "0.5")),
        ({"speedup": 2, "images": 0}, ("images = 0",)),
        ({"speedup": 2, "extra_calls": 0}, ("extra_calls = 0",)),
        ({"speedup": 2, "effort": "much"}, ("much", "quick")),
    ):
        with refused(*words):
            Learner(tmp_path / "a.json", **options)
    learner = Learner(tmp_path / "a.json", 7.0)
    with refused("speedup = 7", "of 12 steps"):
        make(learner, next(images(1)))
