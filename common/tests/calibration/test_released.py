"""Schedules of others as plans: round trip, what a pipeline makes of them, refusals."""

import json
import sys

import numpy as np
import pytest
import torch

import ertacache
from conftest import ROOT
from ertacache.calibration.released import NAMES, RELEASED, released_steps, scaled
from ertacache.cli import main
from ertacache.plans import BudgetPlan
from helpers import no_warning, refused, with_prompts
from tiny_pipelines import STEPS, flux, wan

SCHEDULE = (0, 1, 3, 6)


def imported(tiny, source, **changes):
    return ertacache.import_schedule(
        tiny.pipe, source, prompt="x", **{**tiny.arguments, "num_inference_steps": STEPS, **changes}
    )


def test_a_pipeline_follows_an_imported_schedule(tmp_path):
    """Reuse with Euler is a run of Euler over the same noise levels."""
    tiny = with_prompts(flux())
    plan = BudgetPlan.load(imported(tiny, SCHEDULE).save(tmp_path / "plan.json"))
    assert plan.computed == SCHEDULE and plan.history_length == 1 and plan.provenance == {"imported": "the schedule"}
    lengths = np.diff(np.array(plan.native_sigmas)[[*SCHEDULE, STEPS]])
    assert np.allclose(np.array(plan.weights)[:, 0], lengths, atol=1e-6) and plan.scale == (1.0,) * 4
    uncached = tiny.run(prompt=["a"])
    ertacache.enable(tiny.pipe, plan)
    with no_warning():
        cached = tiny.run(prompt=["a"])
    assert ertacache.summary(tiny.pipe).computed == 4 and not torch.equal(cached, uncached)
    assert torch.isfinite(cached).all()


def test_an_imported_plan_records_what_its_call_turned_out_to_be():
    tiny = with_prompts(flux())
    settings = imported(tiny, SCHEDULE).requirements.settings
    assert settings["latents"] == [64, 16] and settings["true_cfg_scale"] == 1 and settings["guidance_scale"] == 3.5


def test_files_of_others(tmp_path):
    tiny = with_prompts(wan())
    torch.save({"cache_step": [2, 4, 5, 7], "best_loss": 0.1}, tmp_path / "flux.pt")
    (tmp_path / "list.json").write_text(json.dumps(SCHEDULE))
    dpcache = {"full_steps": [0, 1, 2, 5, 7], "request": {"num_inference_steps": STEPS}}
    (tmp_path / "K5.json").write_text(json.dumps(dpcache))
    assert imported(tiny, tmp_path / "flux.pt").computed == imported(tiny, str(tmp_path / "list.json")).computed
    plan = imported(tiny, tmp_path / "K5.json")
    assert plan.computed == (0, 1, 2, 5, 7) and plan.history_length == 2  # extrapolated
    assert plan.weights[2][1] != 0 == plan.weights[1][1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 3}, ("the latents hold no numbers (height=3", "give larger sizes")),
        ({"height": 0}, ("height = 0", "a whole number of at least 1")),
        ({"guidance_scale": float("nan")}, ("guidance_scale = nan", "a finite number")),
        ({"sigmas": [1, 0.5]}, ("scheduler makes 2 steps, not 8", "give num_inference_steps=2")),
        ({"num_inference_steps": 2}, ("num_inference_steps = 2", "from 3 to 1000")),
    ],
)
def test_a_call_that_no_run_can_make_is_refused(changes, words):
    with refused(*words):
        imported(with_prompts(flux()), SCHEDULE, **changes)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([0, 3, 2], ("computed steps [0, 3, 2]", "ascend from 0 to at most 7")),
        ([1, 3], ("[1, 3]", "ascend from 0")),
        ([0, 8], ("[0, 8]", "at most 7")),
        ([0, 1.5], ("[0, 1.5]", "ascend")),
        ([0], ("[0]", "two or more")),
        ("", ("no schedule ''", "lemica-flux.1-dev-20")),
        ("lemica-sora-3", ("no schedule 'lemica-sora-3'", "lemica-flux.1-dev-20")),
        ("lemica-flux.1-dev-20", ("of 50 steps, the call makes 8", "num_inference_steps=50")),
        ("none.pt", ("no file none.pt", "give a list of computed steps")),
        ("bad.json", ("bad.json holds no schedule", "full_steps")),
        ("bad.pt", ("bad.pt holds no schedule", "give a list")),
        ("skips.pt", ("skipped step 9 is none of 1 … 7", "num_inference_steps")),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"steps": [0, 1]}')
    (tmp_path / "bad.pt").write_bytes(b"no archive")
    torch.save({"cache_step": [2, 9]}, tmp_path / "skips.pt")
    with refused(*words):
        imported(with_prompts(flux()), source)


def test_the_command_imports_and_refuses(tmp_path, monkeypatch, capsys):
    call = ["--steps", "6", "--height", "64", "--width", "64", "--set", "max_sequence_length=16", "--prompt", "a fruit"]

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["ertacache", "import", str(ROOT / "ERTACache4FLUX" / "demo"), *words, *call])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr()

    out = str(tmp_path / "plan.json")
    code, said = command("0,1,3", "--out", out)
    assert code == 0 and "3 of 6 calls (2.00×)" in said.out and BudgetPlan.load(out).computed == (0, 1, 3)
    code, said = command("0,1,3", "--out", out)
    assert code == 2 and "--force" in said.err and said.err.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["0,1,6", "--out", out, "--force"], "at most 5"),
        (["0,1,6", "--out", "new/sub/plan.json"], "at most 5"),
        (["0,1", "--out", "new/plan.txt"], "--out new/plan.txt: give the name of a .json file"),
        (["0,1", "--out", "new/plan.json", "--prompts", "a.txt"], "No such option: --prompts"),
        (["0,1", "--out", "new/plan.json", "--batch-size", "2"], "No such option: --batch-size"),
        ([f"0,{'9' * 5000}", "--out", "new/plan.json"], "no schedule '0,999"),
        (["0,1", "--out", "new/plan.json", "--set", "sigmas=[1,0.5]"], "makes 2 steps, not 6: give --steps 2"),
        (["gone", "--out", "new/plan.json"], "no schedule 'gone': give a list"),
    ):
        code, said = command(*words)
        assert code == 2 and message in said.err and said.err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_released_lists():
    for name, (of, count) in NAMES.items():
        schedule = RELEASED[of].lists[count]
        assert len(schedule) == count == len(set(schedule)) and schedule[0] == 0 and schedule[-1] == 49, name
        assert list(schedule) == sorted(schedule)
    assert scaled((0, 10, 49), 50, 50) == (0, 10, 49) and scaled((0, 1, 2, 49), 50, 30) == (0, 1, 29)
    wan_list, text = released_steps("WanTransformer3DModel", 50, 17)
    assert wan_list == RELEASED["lemica-wan2.1-1.3b"].lists[17] and text == "released list lemica-wan2.1-1.3b (17)"
    schedule, text = released_steps("FluxTransformer2DModel", 30, 10)
    assert 9 <= len(schedule) <= 11 and schedule[-1] == 29 and "of 50 steps" in text
    assert released_steps("WanTransformer3DModel", 50, 5) is None and released_steps("Other", 50, 10) is None
