"""Progress in a log: a line per minute, with a total that is known."""

import re
import time

import pytest
from tqdm import tqdm

from ertacache.utils import progress
from ertacache.utils.progress import Progress, bar_options


def test_a_log_gets_a_line_per_minute(capsys, monkeypatch):
    now = iter(range(0, 10_000, 25))  # seconds: each look at the clock is 25 later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    work = Progress("call")
    work.begin("calibration, N = 10")
    work.expect(10)
    for _ in range(9):
        work.update(note="best error 1e-3")
    lines = capsys.readouterr().err.splitlines()
    text = "calibration, N = 10: {} of at most 10 calls, about {} left, best error 1e-3"
    assert lines == [text.format(3, "3 minutes"), text.format(6, "2 minutes"), text.format(9, "25 seconds")]
    work.expect(-100)
    assert work.total == work.n == 9


def test_nothing_is_said_where_nothing_is_wanted(capsys, monkeypatch):
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    silent, unknown = Progress("call", silent=True), Progress("call")
    silent.expect(5)
    for work in (silent, unknown):
        work.update()
        work.close()
    assert capsys.readouterr().err == ""


def test_there_is_no_bar_before_there_is_work(capsys, monkeypatch):
    monkeypatch.setattr(progress, "shows_bars", lambda: True)
    Progress("call").close()
    assert capsys.readouterr().err == ""
    work = Progress("call")
    work.begin("calibration")
    work.expect(2)
    time.sleep(0.2)  # longer than tqdm waits between two states of a bar
    work.update(2)
    work.close()
    said = capsys.readouterr().err
    assert "2/2" in said and "0call" not in said


@pytest.mark.parametrize(
    ("silent", "unit", "units"), [(False, "step", "steps"), (False, "batch", "batches"), (True, "step", "")]
)
def test_the_bar_of_another_library_is_a_line_a_minute_in_a_log(capsys, monkeypatch, silent, unit, units):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    for _ in tqdm(range(6), **bar_options("uncached, prompt 3 of 8", unit, silent)):
        time.sleep(0.025)
    lines = capsys.readouterr().err.splitlines()
    expected = rf"uncached, prompt 3 of 8: \d of 6 {units}, about 00:00 left"
    assert all(re.fullmatch(expected, line) for line in lines), lines
    assert len(lines) >= 2 and len(set(lines)) == len(lines) if not silent else not lines


def test_short_work_has_no_line_in_a_log(capsys):
    for _ in tqdm(range(50), **bar_options("uncached", "step")):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 second"),
        (1.4, "1 second"),
        (1.6, "2 seconds"),
        (89, "89 seconds"),
        (91, "2 minutes"),
        (5400, "1.5 hours"),
    ],
)
def test_durations(seconds, words):
    assert progress.duration(seconds) == words
