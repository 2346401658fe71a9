"""The short form of the campaign of scripts/bench/reliability.py; the long one is run by hand."""

import importlib
import sys

import pytest

import first_use
import reliability
from helpers import refused


@pytest.mark.slow
@pytest.mark.parametrize(("part", "count"), [("mutants", 60), ("soak", 6)])
def test_a_short_campaign_finds_no_fault(part, count):
    text, faults = getattr(reliability, part)(count, seed=11)
    assert faults == 0 and text.startswith(f"{count} ")


@pytest.mark.slow
def test_switching_in_two_threads_changes_no_result(monkeypatch, tmp_path):
    monkeypatch.setitem(reliability.CALL, "num_inference_steps", 6)
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path))
    assert first_use.switch(8, seed=1)[1] == 0


@pytest.mark.slow
def test_the_campaign_notices_faults(monkeypatch, capsys):
    """A loader that raises something else, and a check that lets everything pass, are found."""

    def careless(path):
        raise KeyError("scale")

    with monkeypatch.context() as patched:
        patched.setattr(reliability, "SHIPPED", reliability.SHIPPED[:1])
        patched.setattr(reliability, "stages", lambda pipe, path, runs: [("load", lambda: careless(path))] * (not runs))
        assert reliability.mutants(4, seed=0)[1] > 0
    assert "KeyError" in capsys.readouterr().err
    assert reliability.check_text("a\x1b[2J") is not None and reliability.check_text("a\nb") is None


@pytest.mark.parametrize(
    ("script", "words", "flag"),
    [
        ("reliability", "--count -1", "--count -1"),
        ("reliability", "mutants --count 0", "--count 0"),
        ("reliability", "mutants --seed -1", "--seed -1"),
        ("first_use", "--count -1", "--count -1"),
        ("unets", "--repeats 0", "--repeats 0"),
        ("schedulers", "--count 0", "--count 0"),
        ("census", "--sample -1", "--sample -1"),
        ("study", "ERTACache4FLUX draws --draws 0", "--draws 0"),
        ("noise", "ERTACache4FLUX --count 0", "--count 0"),
        ("planner", "--out rows.json --draws 0", "--draws 0"),
        ("sheet", "rows.json --count 0 --out sheet.png --methods budget", "--count 0"),
        ("train_demo", "ERTACache4FLUX --accuracy-prompts 0", "--accuracy-prompts 0"),
    ],
)
def test_a_number_of_none_is_refused_before_anything_is_done(script, words, flag, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words.split()])
    with refused(f"{flag}: give a whole number"):
        importlib.import_module(script).main()
