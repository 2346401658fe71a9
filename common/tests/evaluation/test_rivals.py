"""Rivals: their searches against brute force, their figures against their sources, all of them on the closed form."""

import json
from itertools import combinations, pairwise
from threading import Thread

import numpy as np
import pytest
import torch

from conftest import ROOT
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.from_folder import CalibrationOptions
from ertacache.calibration.session import CalibrationSession
from ertacache.demos.model_folder import check_steps, load_model_folder
from ertacache.evaluation.methods import METHODS, MethodRows
from ertacache.evaluation.ranking import OTHER_FAMILIES
from ertacache.evaluation.rivals import grids, rollouts, search, tables
from ertacache.evaluation.rivals.methods import RIVALS
from ertacache.evaluation.rows import check_row
from ertacache.evaluation.runner import Evaluation
from ertacache.numerics.multistep import first_order_matrix
from ertacache.plans import ThresholdPlan
from toy import Pipe, ToySampler

T = 8
A = np.array([[1.5, 2.0, 0.1], [-1.7, 0.3, 0.4], [0.2, -0.6, 0.9]])


def schedules(budget, steps=T):
    """All schedules of N steps."""
    return [(0, *later) for later in combinations(range(1, steps), budget - 1)]


@pytest.fixture
def calibration(tmp_path):
    options = {"settings": {"steps": T, "warp": 1.5}, "batch_size": 3, "work": tmp_path, "progress": False}
    calibration = BudgetCalibration(CalibrationSession(ToySampler(), Pipe(A), list("abcde"), range(5), **options))
    calibration.trajectories()
    return calibration


# --- searches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 4, 7, 8])
def test_lemicas_path_is_the_lexicographic_minimax_of_all(budget):
    errors = np.random.default_rng(budget).integers(0, 6, (T, T + 1)).astype(float)  # with many ties

    def edges(schedule):
        return sorted((errors[i, k] for i, k in pairwise([*schedule, T])), reverse=True)

    found = search.minimax_path(errors, budget)
    assert found in schedules(budget) and edges(found) == min(map(edges, schedules(budget)))


@pytest.mark.parametrize(("budget", "longest"), [(4, 5), (5, 3), (6, 8), (8, 8)])
def test_dpcaches_schedule_is_the_best_of_all(budget, longest):
    errors = np.random.default_rng(budget).uniform(size=(T, T, T))
    costs = search.pair_costs(errors)
    assert costs[1, 3, 6] == pytest.approx(errors[1, 3, 4] + errors[1, 3, 5]) and costs[1, 3, 4] == 0

    def cost(schedule):
        return sum(
            errors[i, j, t]
            for i, j, k in zip(schedule[:-1], schedule[1:], [*schedule[2:], T], strict=True)
            for t in range(j + 1, k)
        )

    allowed = [
        s for s in schedules(budget) if s[:3] == (0, 1, 2) and s[-1] == T - 1 and max(np.diff([*s, T])) <= longest
    ]
    assert search.pair_schedule(costs, budget, 3, longest) == min(allowed, key=cost)


def test_dpcaches_largest_gap_grows_where_there_is_no_schedule():
    costs = search.pair_costs(np.ones((30, 30, 30)))
    with pytest.raises(ValueError, match="no 6 of 30 steps have gaps of at most 8"):
        search.pair_schedule(costs, 6)
    assert search.least_gap(30, 6, 3) == 9 and len(search.pair_schedule(costs, 6, longest=9)) == 6


def test_annealing_keeps_the_budget_and_improves():
    rng, seen = np.random.default_rng(0), []
    value = rng.uniform(size=20)

    def error_of(schedule):
        assert (
            len(schedule) == 7
            and schedule[:2] == (0, 1)
            and list(schedule) == sorted({*schedule})
            and max(schedule) < 20
        )
        seen.append(schedule)
        return float(value[list(schedule)].sum())

    best, error, rolled_out = search.anneal(error_of, 20, 7, 2)
    optimum = value[:2].sum() + np.sort(value[2:])[:5].sum()
    assert error == pytest.approx(optimum) and error < error_of(seen[0])
    assert rolled_out == len(set(seen)) == len(seen) - 1 and best in seen
    spent = iter(np.linspace(0, 2, 41))
    seen.clear()
    _, limited, rolled_out = search.anneal(error_of, 20, 7, 2, lambda: next(spent, 2))
    assert limited >= error and 1 < rolled_out == len(seen) <= 21


def test_spectrums_schedule():
    """Warm-up 0–4; windows of 2, ⌊2.75⌋, ⌊3.5⌋, ⌊4.25⌋ and ⌊5⌋ steps, the last of which does not end."""
    assert search.spectrum_schedule(20, 5, 2, 0.75) == (0, 1, 2, 3, 4, 6, 8, 11, 15)
    assert len(search.spectrum_schedule(50, 5, 2, 0.75)) == 14  # as in the paper: FLUX, 50 steps, 14 calls
    for steps, budget in ((30, 15), (30, 10), (30, 6), (50, 25), (50, 17), (50, 10)):
        settings = search.spectrum_settings(steps, budget, [round(0.05 * n, 2) for n in range(61)])
        schedules = [search.spectrum_schedule(steps, *setting) for setting in settings]
        assert {len(schedule) for schedule in schedules} == {budget} and len({*schedules}) == len(schedules)
    assert search.spectrum_settings(50, 14, [0.5, 0.75, 1.0]) == [(5, 2, 0.75)]
    assert (5, 2, 3.0) in search.spectrum_settings(50, 10, [2.4, 3.0])  # as its README has it


# --- what searches ask of the model ----------------------------------------------------------------------------------


def test_oss_of_two_steps_is_the_best_pair(calibration):
    """The first step is free of a choice before it, so that dynamic programming is exact for N = 2."""
    session, target = calibration.session, [calibration.target_latents(b, T) for b in range(2)]

    def error(step):
        total = 0.0
        for part in rollouts.parts(calibration):
            x, s = part.inputs.latents, part.inputs.sigmas
            for i, k in pairwise([0, step, T]):
                x = x + (s[k] - s[i]) * session.sampler.velocity(session.pipe, part.inputs, x, s[i])
            total += (x - target[part.batch]).square().sum().item()
        return total

    assert rollouts.optimal_steps(calibration, 2) == (0, min(range(1, T), key=error))
    assert rollouts.optimal_steps(calibration, T) == tuple(range(T))
    assert [part.size for part in rollouts.parts(calibration, 4)] == [3, 1]


def test_segment_errors_are_those_of_the_latents(calibration):
    """With Euler: x_i + (s_k − s_i) v_i against x_k of the uncached run, summed over the fitted prompts."""
    gram, native = sum(g.matrix for g in calibration.grams), calibration.native_sigmas.double().numpy()
    errors = rollouts.segment_errors(gram, first_order_matrix([(1.0, d) for d in np.diff(native)]))
    expected = np.zeros((T, T + 1))
    left = calibration.fitted
    for part in rollouts.parts(calibration):
        velocities = rollouts.uncached_velocities(calibration, part)
        x = [calibration.target_latents(part.batch, k)[:left].double() for k in range(T + 1)]
        for i, k in combinations(range(T + 1), 2):
            reused = x[i] + (native[k] - native[i]) * velocities[i][:left].double()
            expected[i, k] += (reused - x[k]).square().sum().item()
        left -= min(left, part.size)
    assert np.allclose(errors, expected, atol=1e-4) and errors[3, 4] == 0 < errors[3, 6]


def test_rollouts_of_all_steps_and_with_known_velocities(calibration):
    runs = rollouts.Rollouts(calibration, 4)
    assert runs.error(tuple(range(T))) < 1e-10 and runs.calls == 4 * T
    error = runs.error((0, 1, 2, 6, 7))
    assert error > 1e-6 and runs.calls == 4 * (T + 2)  # steps 0, 1 and 2 were the same
    assert runs.error((0, 1, 2, 6, 7), uncached=3) == pytest.approx(error) and runs.calls == 4 * (2 * T + 4)
    assert rollouts.Rollouts(calibration, 4).error((0, 1, 2, 6, 7)) == pytest.approx(error)


def test_extrapolation_errors_vanish_for_linear_outputs():
    start, slope = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    linear = [start + slope * t for t in range(T)]
    assert rollouts.extrapolation_errors(linear, 8).max() < 1e-5
    errors = rollouts.extrapolation_errors([v**2 for v in linear], 4)
    assert errors[1, 2, 4] > 0 and errors[0, 5, 6] == 0 and errors[1, 2, 6] == 0  # beyond the largest gap
    predicted = linear[2] ** 2 + (linear[2] ** 2 - linear[1] ** 2) * 2
    assert errors[1, 2, 4] == pytest.approx((predicted - linear[4] ** 2).abs().mean(1).sum().item(), rel=1e-5)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_neural_solvers_tables():
    assert list(grids.NEURAL_SOLVER) == [5, 6, 7, 8, 9, 10, 15]
    for count, (lengths, rows) in grids.NEURAL_SOLVER.items():
        assert len(lengths) == len(rows) == count and sum(lengths) == pytest.approx(1, abs=2e-3)
        assert [len(row) for row in rows] == list(range(count))
        sigmas, weights = grids.neural_solver(count, 1.0)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and np.allclose(weights.sum(1), np.diff(sigmas))  # rows sum to 1
        assert weights[:, 0].max() < 0
    sigmas, weights = grids.neural_solver(5, 3.0)
    s = 1 - 0.0521 / 0.9999
    assert sigmas[1] == pytest.approx(3 * s / (1 + 2 * s))
    assert weights[2] / np.diff(sigmas)[2] == pytest.approx([1 - 1.38 + 2.26, -2.26, 1.38, 0, 0])  # newest first
    assert grids.nearest_published(30, 15) == 15 and grids.nearest_published(50, 17) is None
    assert grids.nearest_published(50, 11) == 10 and grids.nearest_published(30, 20) is None


def test_shifts_are_read_off_grids():
    u = np.linspace(1, 0, 31)
    for shift in (1.0, 3.0, 5.0):
        assert grids.shift_of(shift * u / (1 + (shift - 1) * u)) == pytest.approx(shift)


def test_fixed_grids():
    ten = grids.published_grids("FluxTransformer2DModel", False, 10)
    assert np.allclose(ten["OSS's list for FLUX"][:-1], tables.OSS_FLUX[:-1])
    assert list(ten) == ["OSS's list for FLUX", "AYS", "GITS"]
    assert list(grids.published_grids("CogVideoXTransformer3DModel", True, 10)) == ["AYS", "GITS"]
    assert np.exp(np.interp(1 / 2, [0, 1 / 2, 1], np.log([4, 2, 1]))) == pytest.approx(
        grids.log_linear((4, 2, 1), 2)[1]
    )
    assert grids.log_linear((4, 1), 2).tolist() == pytest.approx([4, 2, 0])
    assert [len(row) for row in tables.GITS] == list(range(3, 22))
    for steps in (2, 6, 17, 25):
        for rotates in (False, True):
            for sigmas in grids.published_grids("", rotates, steps).values():
                assert len(sigmas) == steps + 1 and sigmas[0] <= 1 and sigmas[-1] == 0 and max(np.diff(sigmas)) < 0
    ratio = np.array(tables.AYS[:-1])
    assert np.allclose(grids.published_grids("", False, 10)["AYS"][:-1] ** -1, 1 + 1 / ratio)  # (1 − s)/s = 1/r
    assert np.allclose(np.tan(np.pi / 2 * grids.published_grids("", True, 10)["AYS"][:-1]), ratio)


# --- rows ------------------------------------------------------------------------------------------------------------


def closed_form(work, steps=12, effort="normal"):
    """The rows of the closed form."""
    sampler = load_model_folder(ROOT / "scripts" / "bench" / "closed_form")
    pipe, prompts = sampler.load("demo"), sampler.grammar.sample_captions(2, seed=100, held_out=True)
    settings = sampler.settings_of(pipe, steps=steps)
    evaluation = Evaluation(sampler, pipe, prompts, [100, 101], settings, model="demo", batch_size=2, work=work)
    work.mkdir(exist_ok=True)
    (work / "prompts.txt").write_text("\n".join(sampler.grammar.sample_captions(4, seed=1)) + "\n")
    options = CalibrationOptions(work / "prompts.txt", batch_size=4, effort=effort)
    return MethodRows(evaluation, options, ["output"], work / "plans", store=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return list(closed_form(tmp_path_factory.mktemp("rivals")).rows([*RIVALS, "fewer-steps"], [2, 4]))


def test_of_two_evaluations_that_calibrate_the_second_waits(tmp_path, capsys):
    first, second = closed_form(tmp_path), closed_form(tmp_path)
    begun, found = first.rows(["least-squares"], [2, 4]), []
    assert [next(begun)["method"], next(begun)["asked"]] == ["none", 2]
    waits = Thread(target=lambda: found.extend(second.rows(["least-squares"], [3])))
    waits.start()
    waits.join(3)
    assert waits.is_alive() and "another process is calibrating the same plan: waiting" in capsys.readouterr().err
    assert [row["asked"] for row in begun] == [4]
    waits.join(60)
    assert [row["asked"] for row in found] == [None, 3] and not list(tmp_path.glob("calibration-*"))


def test_threshold_rows_try_the_parts_that_the_effort_allows(tmp_path, capsys):
    def tried(name, effort, *others):
        rows = closed_form(tmp_path / name, effort=effort)
        assert len(list(rows.rows(["ertacache", *others], thresholds=[0.1]))) == 2 + len(others)
        (path,) = (tmp_path / name / "plans").glob("*.json")
        return set(ThresholdPlan.load(path).provenance["calibration"]["errors"])

    whole = tried("normal", "normal")
    assert tried("uniform", "quick", "uniform") == whole > tried("quick", "quick") and "uniform" in whole
    assert "calibration: at most" not in capsys.readouterr().err  # nothing was announced that it could be the time of


def test_methods_that_run_too_few_steps_for_a_model_folder_are_left_out(tmp_path, capsys, monkeypatch):
    rows = closed_form(tmp_path, steps=6)
    sampler = rows.evaluation.sampler
    own = sampler.settings_of

    def settings_of(pipe, steps, **others):  # of the model folders
        check_steps(steps)
        return own(pipe, steps, **others)

    monkeypatch.setattr(sampler, "settings_of", settings_of)
    names = ["fewer-steps", "fewer-steps-tuned", "oss-solver", "ays", "least-squares"]
    found = [(row["asked"], row["method"].partition(":")[0]) for row in rows.rows(names, [2, 3])]
    assert {*found} == {(None, "none"), *((2, name) for name in names), (3, "least-squares")}
    said = capsys.readouterr().err
    assert said.count("left out") == 4
    assert "ays is left out on closed_form at N = 2: --steps 2: give a whole number from 3 to 1000\n" in said


def test_all_rivals_give_rows(rows):
    found = {(row["asked"], row["method"]): row for row in rows}
    names = {name.partition(":")[0] for asked, name in found if asked == 2}
    assert names == {*RIVALS, "fewer-steps"} and (4, "neuralsolver") not in found  # it has no solver of three steps
    assert all(row["nfe"] == 12 / asked == 12 / row["speedup_flops"] for (asked, _), row in found.items() if asked)
    assert {row["family"] for row in rows[1:]} == {*OTHER_FAMILIES} and set(RIVALS) < set(METHODS)
    solvers = {"oss", "oss-solver", "neuralsolver", "fewer-steps"}
    assert {name for (_, name), row in found.items() if row["family"] == "steps" and ":" not in name} == solvers
    assert found[2, "oss"]["latent_psnr"] == pytest.approx(found[2, "oss-solver"]["latent_psnr"], abs=0.01)  # by Euler
    assert found[2, "oss"]["latent_psnr"] > found[2, "fewer-steps"]["latent_psnr"]
    for row in json.loads(json.dumps(rows)):
        check_row(row, row["label"])
