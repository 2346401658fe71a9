"""Efforts in minutes, on a clock that the model's calls move."""

import math
import time

import numpy as np
import pytest

from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.effort import EFFORTS, effort_of, serves
from ertacache.calibration.session import CalibrationSession
from ertacache.calibration.threshold import ThresholdCalibration
from helpers import TOY_STEPS as STEPS
from helpers import refused
from toy import Pipe, ToySampler

MATRIX = np.random.default_rng(0).normal(size=(8, 8))
PROMPTS = 8


class Clock:
    """Seconds, as the session reads them. Every model call takes `seconds` of them."""

    def __init__(self, monkeypatch, seconds: float = 1.0):
        self.now, self.seconds = 1000.0, seconds
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def session(self, work, batch_size=PROMPTS, slower_after=math.inf) -> CalibrationSession:
        """A session whose model is three times slower after so many calls."""
        clock = self

        class TimedPipe(Pipe):
            def __init__(self, matrix):
                super().__init__(matrix)
                call = self.transformer.forward

                def forward(*args, **kwargs):
                    clock.now += clock.seconds * (3 if self.transformer.calls > slower_after else 1)
                    return call(*args, **kwargs)

                self.transformer.forward = forward

        options = {"settings": {"steps": STEPS}, "batch_size": batch_size, "work": work, "progress": False}
        return CalibrationSession(ToySampler(), TimedPipe(MATRIX), ["p"] * PROMPTS, range(PROMPTS), **options)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize("batch_size", [8, 3])
@pytest.mark.parametrize("slower_after", [math.inf, 60])
def test_the_time_is_used_and_not_exceeded_by_more_than_a_rollout(clock, tmp_path, batch_size, slower_after):
    session, start, ends = clock.session(tmp_path, batch_size, slower_after), clock.now, []
    minutes = 2 * session.batches
    for plan in BudgetCalibration(session).each_plan([6, 4], minutes):
        ends.append((clock.now - start) / 60)
        assert plan.provenance["calibration"]["effort"] == f"{minutes} minutes"
    rollout = 6 * session.batches * (1 if slower_after == math.inf else 3) / 60
    uncached = STEPS * session.batches / 60
    assert 0.8 * minutes < ends[1] < minutes + rollout
    assert ends[0] < uncached + (minutes - uncached) / 2 + rollout  # the plans share what the uncached runs leave


def test_more_time_gives_better_plans(clock, tmp_path):
    def error(minutes):
        plan = BudgetCalibration(clock.session(tmp_path / str(minutes))).plans([4], minutes)[4]
        return min(plan.provenance["calibration"]["errors"].values())

    errors = [error(minutes) for minutes in (0.4, 1, 4)]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0]


def test_too_few_minutes_are_refused_after_two_calls(clock, tmp_path):
    session = clock.session(tmp_path, batch_size=1)
    needed = (STEPS + 6 + 4) * PROMPTS  # seconds
    with refused(f"at least {round((needed - 2) / 60)} minutes more", "with 58 seconds left", "give a longer time"):
        BudgetCalibration(session).plans([6, 4], 1)
    assert session.pipe.transformer.calls == 2
    threshold = clock.session(tmp_path, batch_size=1)
    with refused("at least 8 minutes more", "with 58 seconds left"):  # 96 s for the uncached runs, and four times that
        ThresholdCalibration(threshold).plan(0.2, 1)
    assert threshold.pipe.transformer.calls == 2
    plans = BudgetCalibration(clock.session(tmp_path, batch_size=1)).plans([6, 4], needed / 60)
    assert plans[6].nfe == 6 and plans[4].nfe == 4


def test_the_same_call_goes_on_with_minutes_of_its_own(clock, tmp_path):
    class Stopped(ToySampler):
        def velocity(self, pipe, inputs, x, t):
            if pipe.transformer.calls > 40:
                raise KeyboardInterrupt
            return super().velocity(pipe, inputs, x, t)

    session = clock.session(tmp_path)
    session.sampler = Stopped()
    with pytest.raises(KeyboardInterrupt):
        BudgetCalibration(session).plans([4], 4)
    resumed, start = clock.session(tmp_path), clock.now
    plan = BudgetCalibration(resumed).plans([4], 4)[4]
    assert clock.now - start <= 4 * 60 and plan.provenance["calibration"]["finished"]
    assert plan == BudgetCalibration(clock.session(tmp_path / "whole")).plans([4], 4)[4]


def test_what_is_said(clock, tmp_path, capsys, monkeypatch):
    session = clock.session(tmp_path)
    session.silent = False
    BudgetCalibration(session).plans([6, 4], 2)
    first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calibration: ")]
    cost = f"{STEPS + 10} model calls with 8 prompts each, the cost of 15 uncached results"
    assert first.startswith(f"calibration: {cost}, then a search, at most 2 minutes in all; Ctrl-C")
    assert second == "calibration: at most 2 minutes"
    assert session.progress.total == session.progress.n == session.pipe.transformer.calls


def test_a_threshold_plan_tries_all_its_parts_where_they_fit(clock, tmp_path):
    def tried(minutes):
        calibration, start = ThresholdCalibration(clock.session(tmp_path / str(minutes))), clock.now
        plan = calibration.plan(0.2, minutes)
        assert clock.now - start < 60 * minutes
        return set(plan.provenance["calibration"]["errors"])

    few, many = tried(1.2), tried(4)  # 12 s for the uncached runs, 48 s for the cheapest parts, 168 s for all
    assert few < many and {"uniform", "uniform + rectification"} <= many


def test_which_plans_need_not_be_made_anew():
    efforts = [*EFFORTS.values(), effort_of(5), effort_of("20 minutes")]
    served = {made.name: [asked.name for asked in efforts if serves(made, asked)] for made in efforts}
    assert served == {
        "quick": ["quick"],
        "normal": ["quick", "normal"],
        "thorough": ["quick", "normal", "thorough", "5 minutes", "20 minutes"],
        "5 minutes": ["quick", "5 minutes"],
        "20 minutes": ["quick", "5 minutes", "20 minutes"],
    }


def test_the_name_of_an_effort_is_one():
    for minutes, name in ((1, "1 minute"), (1.5, "1.5 minutes"), ("90", "90 minutes")):
        assert effort_of(minutes).name == name and effort_of(name) == effort_of(minutes)


WORDS = ["great", "", "0", "-3", "nan", "inf", "1e999", "5 hours", "10s"]
VALUES = [0, -1.5, math.nan, math.inf, 10**400, True, None, ["a"]]


@pytest.mark.parametrize("value", WORDS + VALUES)
def test_no_such_effort(value):
    with refused("--effort ", ": give quick, normal, thorough or a number of minutes"):
        effort_of(value, "--effort")


def test_where_minutes_are_none():
    with refused("--effort 20: give quick, normal, thorough", "thorough") as caught:
        effort_of("20", "--effort", in_minutes=False)
    assert "minutes" not in str(caught.value)
