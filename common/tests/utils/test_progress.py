"""Progress in a log: a line per minute, with a total that is known."""

from ertacache.utils import progress
from ertacache.utils.progress import Progress


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
