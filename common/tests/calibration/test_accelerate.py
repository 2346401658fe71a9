"""One call, no plan file: what is found, what is made, and what becomes of a store that is damaged or read-only."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import ertacache
from conftest import ROOT
from ertacache import BudgetPlan, PlanSet
from ertacache.calibration.accelerate import shipped_prompts
from ertacache.plans import store as store_module
from ertacache.plans.store import PlanStore
from helpers import CallCounter, counted, no_warning, refused, with_prompts
from tiny_pipelines import STEPS, flux, sd3, wan

PROMPTS = ["a red star", "a small blue ring", "green stripes", "a dotted ground"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def accelerated(speedup=2, build=flux, prompts=PROMPTS, **options):
    """A new pipeline with a plan, the plan, and how many model calls that took."""
    tiny = with_prompts(build())
    with CallCounter(tiny.pipe.transformer) as calls:
        options = {"num_inference_steps": STEPS, **tiny.arguments, **options}
        plan = ertacache.accelerate(tiny.pipe, speedup, prompts, **options)
    return tiny, plan, calls.count


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_first_call_calibrates_and_the_next_finds_the_plan(home, capsys):
    tiny, plan, calls = accelerated()
    said = capsys.readouterr().err
    assert "no plan yet for this FluxPipeline at 8 steps, 2×: calibrating one (quick), only this once" in said
    assert str(home) in said and calls > len(PROMPTS) * STEPS
    assert isinstance(plan, BudgetPlan) and counted(tiny, prompt=["a red star"])[1] == 4
    again, found, calls = accelerated()
    assert calls == 0 and found == plan and capsys.readouterr().err == ""
    assert counted(again, prompt=["a red star"])[1] == 4
    assert files(home) == ["budget-4.json", "budget-4.safetensors"]  # no work and no lock is left


def test_several_speedups_at_once_and_one_more_later(home):
    tiny, plans, _ = accelerated((2, 4))
    assert isinstance(plans, PlanSet) and list(plans) == [2, 4]
    ertacache.speedup(tiny.pipe, 4)
    assert counted(tiny, prompt=["a red star"])[1] == 2
    _, plans, _ = accelerated((4, 8 / 3))
    assert [plan.nfe for plan in plans.values()] == [3, 2]
    assert len(files(home)) == 6


@pytest.mark.parametrize("changes", [{"guidance_scale": 2.0}, {"num_inference_steps": 6}, {"height": 16, "width": 16}])
def test_other_settings_have_plans_of_their_own(changes):
    accelerated()
    _, _, calls = accelerated(**changes)
    assert calls > 0


def test_other_weights_and_other_models_have_plans_of_their_own(home):
    accelerated()
    tiny = with_prompts(flux())
    with torch.no_grad():
        next(tiny.pipe.transformer.parameters()).add_(0.1)
    ertacache.accelerate(tiny.pipe, 2, PROMPTS, num_inference_steps=STEPS, **tiny.arguments)
    accelerated(build=sd3)
    assert len(list((home / "plans").iterdir())) == 3


def test_prompts_and_effort_that_a_stored_plan_was_not_made_with():
    accelerated()
    assert accelerated(prompts=None)[2] == 0  # any prompts will do
    assert accelerated(prompts=PROMPTS[::-1])[2] > 0
    assert accelerated(effort="normal")[2] > 0
    assert accelerated(effort="quick")[2] == 0
    assert accelerated(prompts=None, effort="quick")[2] == 0  # more effort than that was made


def test_without_prompts_those_of_the_package_are_taken():
    images, videos = (shipped_prompts(build().pipe) for build in (flux, wan))
    assert images != videos and all(len(set(texts)) == 16 for texts in (images, videos))
    _, plan, _ = accelerated(prompts=None)
    assert plan.provenance["prompts"]["count"] == 8


def test_a_damaged_plan_is_set_aside_and_made_anew(home):
    _, plan, _ = accelerated()
    (path,) = home.rglob("budget-4.json")
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match="damaged.*set aside, and made anew"):
        _, found, _ = accelerated()
    assert replace(found, provenance={}) == replace(plan, provenance={})
    assert path.with_name("budget-4.json.damaged").exists()


def test_a_plan_of_a_newer_format_is_set_aside(home):
    accelerated()
    (path,) = home.rglob("budget-4.json")
    path.write_text(path.read_text().replace('"version": ', '"version": 9'))
    with pytest.warns(UserWarning, match="format version.*set aside"):
        accelerated()


def test_without_a_place_to_store_it_goes_on_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot write.*will not be stored"):
        tiny, _, calls = accelerated()
    assert calls > 0 and counted(tiny, prompt=["a red star"])[1] == 4


def test_a_disk_that_fills_up_costs_the_store_only(monkeypatch):
    def full(*_):
        raise ertacache.UserError("cannot write to it (No space left on device): free some space")

    monkeypatch.setattr(PlanStore, "add", full)
    with pytest.warns(UserWarning, match="No space left on device.*not stored"):
        tiny, _, _ = accelerated()
    assert counted(tiny, prompt=["a red star"])[1] == 4


def test_the_least_recently_used_go_beyond_the_limit(home, monkeypatch):
    accelerated()
    (first,) = home.rglob("budget-4.json")
    os.utime(first, (1, 1))
    work = first.parent / store_module.WORK / "calibration-x.partial"
    work.mkdir(parents=True)
    (work / "old").write_text("")
    os.utime(work / "old", (1, 1))
    os.utime(work, (1, 1))
    monkeypatch.setattr(store_module, "LIMIT", 1.5 * PlanStore().plans()[0].size)
    accelerated(guidance_scale=2.0)
    assert not first.exists() and len(list(home.rglob("budget-4.json"))) == 1
    assert not work.exists()


@pytest.mark.parametrize(
    "speedup, word",
    [(0.5, "at least 1"), (5, "at most 4"), ("2", "or a list like"), ([], "list"), (float("nan"), "1")],
)
def test_a_speedup_out_of_range_is_refused(speedup, word, home):
    with refused("speedup ", word) as caught:
        accelerated(speedup)
    assert "speedups" not in str(caught.value)
    assert not home.exists()


def test_a_pipeline_that_cannot_be_calibrated_says_which_part(home):
    tiny = flux()
    tiny.pipe.scheduler = None
    with refused("without a scheduler"):
        ertacache.accelerate(tiny.pipe)
    with refused("effort best", "quick, normal, thorough"):
        ertacache.accelerate(flux().pipe, effort="best")
    with refused("no argument of FluxPipeline's call", "size"):
        ertacache.accelerate(flux().pipe, size=3)
    with refused("prompts = ", "a list of texts"):
        ertacache.accelerate(flux().pipe, 2, "a prompt")
    with refused("no calibration prompts", "leave prompts out"):
        ertacache.accelerate(flux().pipe, 2, [])
    assert not home.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_drift": "zz"}, ("on_drift = 'zz'", "'warn', 'compute', 'ignore'")),
        ({"on_drift": ["warn"]}, ("on_drift = ['warn']", "'warn', 'compute', 'ignore'")),
        ({"effort": ["a"]}, ("effort ['a']", "quick, normal, thorough")),
        ({"prompts": ["", ""]}, ("prompts = ['', '']", "say what should be seen")),
        ({"guidance_scale": float("nan")}, ("guidance_scale = nan", "finite")),
        ({"max_sequence_length": -1}, ("max_sequence_length = -1", "not negative")),
        ({"height": 0}, ("height = 0", "a whole number of at least 1")),
        ({"width": 32.5}, ("width = 32.5", "a whole number of at least 1")),
        ({"sigmas": []}, ("sigmas = []", "a number for each step")),
        ({"num_inference_steps": 100_000}, ("num_inference_steps = 100000", "1000")),
    ],
)
def test_an_argument_that_cannot_be_is_refused_before_a_model_call(options, words, home):
    tiny = with_prompts(flux())
    with CallCounter(tiny.pipe.transformer) as calls, refused(*words):
        ertacache.accelerate(tiny.pipe, **{"num_inference_steps": STEPS, **tiny.arguments, **options})
    assert calls.count == 0 and not home.exists()


def test_a_call_that_the_pipeline_cannot_make_is_one_line(capsys, home):
    """And nothing is said of a plan that will be made, nor is an empty folder left."""
    with refused("FluxPipeline's call failed (", "height='32'", "check these arguments"):
        accelerated(height="32")
    with refused("the latents hold no numbers (height=1"):
        accelerated(height=1)
    assert "calibrating" not in capsys.readouterr().err and not home.exists()


def test_a_call_that_fails_after_its_first_step_is_one_line(home):
    with refused("FluxPipeline's call failed ('int' object is not callable)", "callback_on_step_end=3"):
        accelerated(callback_on_step_end=3)
    assert not home.exists()


SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT / "common")!r}, {str(ROOT / "common" / "tests")!r}]
import torch
torch.set_num_threads(1)
from calibration.test_accelerate import accelerated
print("ready", flush=True)
tiny, plan, calls = accelerated((2, 4))
print(calls, [plan.predicted_error for plan in plan.values()])
"""


def started(home):
    environment = os.environ | {"ERTACACHE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_of_two_processes_one_calibrates_and_killed_ones_leave_no_harm(tmp_path):
    ends = [process.communicate(timeout=200) for process in [started(tmp_path / "two") for _ in range(2)]]
    calls = [int(out.split("\n")[1].split(" ")[0]) for out, _ in ends]
    assert sorted(map(bool, calls)) == [False, True], ends
    wanted = ends[0][0].split("[")[1]
    assert all(out.split("[")[1] == wanted for out, _ in ends)
    process = started(tmp_path / "killed")  # scripts/bench/first_use.py kills more of them
    process.stdout.readline()
    time.sleep(0.3)
    process.kill()
    process.communicate()
    out, _ = started(tmp_path / "killed").communicate(timeout=200)
    assert out.split("[")[1] == wanted
    assert {path.suffix for path in (tmp_path / "killed").rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_it_is_one_of_the_public_names():
    with no_warning():
        assert {"accelerate", "speedup", "PlanSet"} <= set(ertacache.__all__)
