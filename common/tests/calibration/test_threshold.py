"""Calibration against mathematics, on dx/ds = A x."""

import gc
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ertacache import algorithm
from ertacache.calibration import threshold as threshold_module
from ertacache.calibration.session import CalibrationSession
from ertacache.calibration.threshold import ThresholdCalibration, WatchedSchedule
from helpers import all_inputs, refused, toy_session
from toy import ToySampler

MATRIX = [[1.0, 0.6], [-0.9, 0.4]]
PROMPTS = [f"prompt {i}" for i in range(7)]


def make(tmp_path, prompts=PROMPTS, steps=12, matrix=MATRIX, **options):
    return ThresholdCalibration(toy_session(tmp_path, prompts, steps, matrix, **options))


def algorithm2_on_one_batch(session, threshold):
    """Algorithm 2 as printed: one batch, decisions taken while the trajectory runs."""
    sampler, pipe = session.sampler, session.pipe
    inputs = sampler.prepare(pipe, session.prompts, session.seeds, **session.settings)
    norm = []
    sampler.denoise(pipe, inputs, None, lambda i, x, v: norm.append(algorithm.l1_norm(v - x)))
    cached, kept, x, s = [], None, inputs.latents, inputs.sigmas
    for i in range(session.steps):
        v = pipe.transformer(x)
        r = v - x
        ends = i in (0, session.steps - 1)
        if not ends and algorithm.l1_norm(r - kept) / norm[i] < threshold:
            cached.append(i)
            v = x + kept
        else:
            kept = r
        x = algorithm.euler_step(x, v, s[i], s[i + 1])
    return tuple(cached)


@pytest.mark.parametrize("threshold", [0.03, 0.08, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_policy_from_batches_is_algorithm_2_on_the_whole_set(tmp_path, threshold, batch_size):
    calibration = make(tmp_path, batch_size=batch_size, warp=1.7)
    reference = calibration.watch(WatchedSchedule(), pairs=True)
    cached, _ = calibration.search_policy(reference, threshold)
    assert cached == algorithm2_on_one_batch(calibration.session, threshold)


def test_a_higher_threshold_caches_more(tmp_path):
    calibration = make(tmp_path, steps=20)
    reference = calibration.watch(WatchedSchedule(), pairs=True)
    counts = [len(calibration.search_policy(reference, t)[0]) for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_watching_changes_nothing_and_counts_the_true_error(tmp_path):
    calibration = make(tmp_path, prompts=PROMPTS[:1], steps=4)
    reference = calibration.watch(WatchedSchedule(), pairs=True)
    inputs, model = calibration.session.inputs(0), calibration.session.pipe.transformer
    x0, s = inputs.latents, inputs.sigmas
    v0 = model(x0)
    x1 = algorithm.euler_step(x0, v0, s[0], s[1])
    v1 = model(x1)
    assert reference.norm[1] == pytest.approx(algorithm.l1_norm(v1 - x1))
    assert reference.distance[0, 1] == pytest.approx(algorithm.l1_norm((v1 - x1) - (v0 - x0)))
    seen = calibration.watch(WatchedSchedule((1,)), pairs=False)
    tilde = x1 + (v0 - x0)
    assert seen.error[1] == pytest.approx(algorithm.l1_norm(tilde - v1))
    assert seen.velocity[1] == pytest.approx(algorithm.l1_norm(v1))
    assert seen.change[1] == pytest.approx(algorithm.l1_norm(v1 - v0))
    assert seen.moments[1, 0] == x0.numel()
    assert seen.moments[1, 4] == pytest.approx((tilde * (tilde - v1)).sum().item(), rel=1e-5)


def test_sums_do_not_depend_on_how_prompts_are_batched(tmp_path):
    whole = make(tmp_path / "a", batch_size=7).watch(WatchedSchedule((2, 3)), pairs=True)
    parts = make(tmp_path / "b", batch_size=2).watch(WatchedSchedule((2, 3)), pairs=True)
    for name, total in whole.arrays().items():
        assert total.any() and np.allclose(total, getattr(parts, name), rtol=1e-6), name


def test_rectification_is_exact_where_the_error_is_proportional(tmp_path):
    """In one dimension x_i is a multiple of x_c, so ε is a multiple of ṽ and K/B removes all of it."""
    calibration = make(tmp_path, matrix=[[0.8]], steps=10)
    plain = calibration.plan(0.2)
    assert plain.rectified and len(plain.cached) > 2
    errors = plain.provenance["calibration"]["errors"]
    assert errors["policy + rectification"] < 1e-10 < errors["policy"]
    assert errors["uniform + rectification"] < 1e-10 < errors["uniform"]
    sampler, pipe = calibration.session.sampler, calibration.session.pipe
    inputs = sampler.prepare(pipe, ["new"], [99], steps=10)
    assert torch.allclose(sampler.denoise(pipe, inputs, plain), sampler.denoise(pipe, inputs), atol=1e-5)


def test_fit_lowers_the_squared_velocity_error_on_the_calibration_set(tmp_path):
    calibration = make(tmp_path, steps=12)
    reference = calibration.watch(WatchedSchedule(), pairs=True)
    cached, seen = calibration.search_policy(reference, 0.3)
    assert len(cached) > 3
    for i in cached:
        n, sum_v, sum_e, sum_vv, sum_ve = seen.moments[i]
        k, b = algorithm.fit_kb(n, sum_v, sum_e, sum_vv, sum_ve)
        slope, offset = k / 4, b / 4 + 0.5
        fitted = square_error(calibration.session, cached, i, slope, offset)
        assert fitted < square_error(calibration.session, cached, i, 0.0, 0.0)
        for other in ((1.1 * slope, offset), (0.9 * slope, offset), (slope, offset + 0.01), (slope, offset - 0.01)):
            assert fitted < square_error(calibration.session, cached, i, *other)


def square_error(session, cached, step, slope, offset):
    """Σ(ε − slope·ṽ − offset)² at one step, recomputed from the tensors."""
    total = 0.0
    for batch in range(session.batches):
        inputs, kept = session.inputs(batch), {}

        def on_step(i, x, v, kept=kept):
            nonlocal total
            if i not in cached:
                kept["r"] = v - x
                return None
            tilde = x + kept["r"]
            if i == step:
                total += ((tilde - v - slope * tilde - offset).double() ** 2).sum().item()
            return tilde

        session.sampler.denoise(session.pipe, inputs, None, on_step)
    return total


def test_the_plan_is_the_best_of_its_candidates(tmp_path):
    """Errors are measured again by another calibration, in a folder of its own, through runs of all prompts at once."""
    plan = make(tmp_path / "one", steps=15, warp=1.5).plan(0.25)
    record = plan.provenance["calibration"]
    calibration = make(tmp_path / "other", steps=15, warp=1.5)
    plans, _ = calibration.candidates(0.25)
    session, errors = calibration.session, {}
    inputs = all_inputs(session)
    uncached = session.sampler.denoise(session.pipe, inputs)
    for name, candidate in plans.items():
        final = session.sampler.denoise(session.pipe, inputs, candidate)
        squares = (final - uncached).double().square().flatten(1).mean(1).sort().values
        best = squares[: math.ceil(len(squares) * 0.75)]
        errors[name] = best.log().mean().exp().item()
    assert errors == pytest.approx(record["errors"], rel=1e-3)
    assert record["chosen"] == min(errors, key=errors.get) and len(set(errors.values())) > 4
    assert replace(plan, provenance={}) == replace(plans[record["chosen"]], provenance={})


def test_no_cached_step_is_a_valid_plan_without_error(tmp_path):
    plan = make(tmp_path).plan(1e-9)
    assert plan.cached == () and plan.nfe == 12 and not plan.rectified
    assert plan.provenance["calibration"]["errors"] == {"policy": 0.0}


class Interrupted(Exception):
    pass


class Fragile(ToySampler):
    """Breaks at the n-th call of `prepare`, as if the process were killed between two batches."""

    def __init__(self, breaks_at):
        super().__init__()
        self.left = breaks_at

    def prepare(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise Interrupted
        return super().prepare(*args, **kwargs)


@pytest.mark.parametrize("breaks_at", [2, 5, 9, 14, 20])
def test_a_killed_calibration_goes_on_and_gives_the_identical_plan(tmp_path, breaks_at):
    whole = make(tmp_path / "whole").plan(0.2)
    broken = make(tmp_path / "broken", sampler=Fragile(breaks_at))
    with pytest.raises(Interrupted):
        broken.plan(0.2)
    resumed = make(tmp_path / "broken")
    assert resumed.plan(0.2) == whole
    fresh = make(tmp_path / "fresh")
    fresh.plan(0.2)
    assert resumed.session.pipe.transformer.calls < fresh.session.pipe.transformer.calls


def test_another_model_or_prompt_set_does_not_use_the_checkpoints(tmp_path):
    a, b = make(tmp_path), make(tmp_path, prompts=[*PROMPTS[:-1], "other"])
    assert a.checkpoints.folder != b.checkpoints.folder
    assert a.checkpoints.folder != make(tmp_path, matrix=[[0.5, 0.0], [0.0, 0.5]]).checkpoints.folder


def test_finish_removes_the_checkpoints(tmp_path):
    calibration = make(tmp_path)
    calibration.plan(0.1)
    assert list(tmp_path.iterdir()) == [calibration.checkpoints.folder]
    calibration.finish()
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_another_calibration_removed_are_named(tmp_path):
    mine, other = make(tmp_path), make(tmp_path)
    plan = mine.plan(0.1)
    other.finish()
    with refused(mine.checkpoints.folder, "start again"):
        mine.evaluate(replace(plan, cached=(1,), phi=(), k=(), b=(), rectified=False, phi_definition="none"))


def test_the_threshold_for_a_number_of_calls(tmp_path):
    calibration = make(tmp_path, steps=20)
    for nfe in (16, 10, 7):
        assert abs(calibration.plan(calibration.threshold_for(nfe)).nfe - nfe) <= 1


class Weighing(ToySampler):
    """Notes the most bytes that tensors hold at any step."""

    peak = 0

    def denoise(self, pipe, inputs, plan=None, on_step=None):
        def weigh(i, x, v):
            used = on_step(i, x, v)
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
            self.peak = max(self.peak, sum(held.values()))
            return used

        return super().denoise(pipe, inputs, plan, weigh)


def tensors():
    return [o for o in gc.get_objects() if type(o) is torch.Tensor]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path):
    peaks = []
    for count in (4, 16):
        gc.collect()
        gc.freeze()  # what is there already is not looked at, which makes looking fast
        sampler = Weighing(rows=4096)
        make(tmp_path, [f"p{i}" for i in range(count)], batch_size=2, steps=6, sampler=sampler).plan(0.3)
        peaks.append(sampler.peak)
        gc.unfreeze()
    assert peaks[0] > 2 * 4096 * 2 * 4 and peaks[1] <= peaks[0] * 1.01


def test_residuals_that_do_not_fit_into_memory_are_refused_at_the_first_step(tmp_path, monkeypatch):
    session = toy_session(tmp_path, prompts=3)
    monkeypatch.setattr(threshold_module, "available_memory", lambda: 100)
    with refused("residuals of one batch", "GiB are available", "smaller batch size"):
        ThresholdCalibration(session).plan(0.1)
    assert session.pipe.transformer.calls == 1
    monkeypatch.setattr(threshold_module, "available_memory", lambda: None)  # a system that does not say
    assert ThresholdCalibration(session).plan(0.1).nfe


def test_bad_input_is_refused_by_name(tmp_path):
    with refused("no calibration prompts", "one prompt a line"):
        make(tmp_path, prompts=[])
    session = make(tmp_path).session
    options = {"settings": session.settings, "batch_size": 3, "work": tmp_path, "progress": False}
    with refused("7 calibration prompts", "2 seeds", "one seed per prompt"):
        CalibrationSession(session.sampler, session.pipe, PROMPTS, [0, 1], **options)
    with refused("steps = 2", "from 3"):
        make(tmp_path, steps=2)
    for threshold in (0.0, -1.0, float("nan"), float("inf")):
        with refused(f"threshold {threshold}", "above 0"):
            make(tmp_path).plan(threshold)
    with refused("step 0", repr(PROMPTS[0]), "--dtype float32"):
        make(tmp_path, matrix=[[float("nan")]]).plan(0.1)
