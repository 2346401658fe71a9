"""The short form of the campaign of scripts/bench/reliability.py; the long one is run by hand."""

import importlib
import sys

import pytest

import first_use
import reliability
from helpers import refused
from parts import campaign, flux_demo, mutants, strangers


@pytest.mark.slow
@pytest.mark.parametrize(("part", "count"), [("mutants", 60), ("soak", 6), ("strangers", 20)])
def test_a_short_campaign_finds_no_fault(part, count):
    text, faults = reliability.PARTS[part][0](count, seed=11)
    assert faults == [] and text.startswith(f"{count} ")


@pytest.mark.slow
def test_switching_in_two_threads_changes_no_result(monkeypatch, tmp_path):
    monkeypatch.setitem(flux_demo.CALL, "num_inference_steps", 6)
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path))
    assert first_use.switch(8, seed=1)[1] == []


@pytest.mark.slow
def test_the_campaign_notices_faults(monkeypatch):
    """A loader that raises something else, and a check that lets everything pass, are found."""

    def careless(path):
        raise KeyError("scale")

    with monkeypatch.context() as patched:
        patched.setattr(mutants, "SHIPPED", mutants.SHIPPED[:1])
        patched.setattr(mutants, "stages", lambda pipe, path, runs: [("load", lambda: careless(path))] * (not runs))
        faults = mutants.mutants(4, seed=0)[1]
    assert faults and "KeyError" in str(faults[0])
    assert campaign.steering("a\x1b[2J") is not None and campaign.steering("a\nb") is None
    with pytest.raises(AssertionError, match="control character"):
        strangers.check("terminal", "a\x1b[2J", "a")
    with pytest.raises(AssertionError, match="other tags"):
        strangers.check("page", "<p><img src=x></p>", "<p>a</p>")
    with pytest.raises(AssertionError, match="another number of cells"):
        strangers.check("tables", "| a | b |\n| a|b | c |\n", "")


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
