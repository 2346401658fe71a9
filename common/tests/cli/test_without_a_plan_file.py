"""`ertacache generate --speedup`, the stored plans, sets of plans, and runs that go on or share their prompts."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_commands import DEMO, FLAGS, FOUR, PROMPTS, files, pipe, plans, refused, run  # noqa: F401

from conftest import ROOT
from ertacache import PlanSet
from ertacache.cli.calls import Calls
from ertacache.cli.request import Request
from ertacache.plans.store import PlanStore
from helpers import CallCounter

TWO = FOUR[:4]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_speedup_makes_a_plan_once_and_finds_it_then(run, pipe):
    with CallCounter(pipe.transformer) as calls:
        lines = run("generate", DEMO, "--speedup", 2, *TWO, *FLAGS)
    assert "3 steps computed, 3 skipped" in lines[1] and calls.count > 6 * 8
    with CallCounter(pipe.transformer) as calls:
        assert run("generate", DEMO, "--speedup", 2, *TWO, *FLAGS)[1].endswith("All: 2 calls, 6 computed, 6 skipped.")
    assert calls.count == 6
    (stored,) = PlanStore().plans()
    table = run("plans")
    assert table[1].split()[:5] == [stored.name, "demo", "3", "of", "6"] and "guidance_scale 3.5" in " ".join(table)
    assert run("plans", "show", stored.name[:4])[0] == "ERTACache budget plan: 3 of 6 steps computed"
    assert run("plans", "delete", stored.name) == ["1 plan deleted"]
    assert "no plan in" in run("plans")[0]


def test_a_stored_plan_that_cannot_be_read_is_listed_and_can_be_deleted(run, refused, home):
    path = home / "plans" / "0123" / "4567890123456789" / "budget-3.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert "45678901-3  cannot be read" in run("plans")[1]
    assert "cannot be read: ertacache plans delete 45678901-3" in refused("plans", "show", "4567")
    assert run("plans", "delete", "--all") == ["1 plan deleted"] and not path.exists()
    assert not path.parent.exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["plans", "show", "x"], "'x': no such plan, `ertacache plans` lists them"),
        (["plans", "delete"], "give the names of plans to delete, or --all"),
        (["plans", "delete", "x", "--all"], "give the names of plans to delete, or --all"),
        (["generate", DEMO, "--speedup", "0.5", *TWO, *FLAGS], "--speedup 0.5: a speed-up is a number of at least 1"),
        (["generate", DEMO, "--speedup", "4", *TWO, *FLAGS], "--speedup 4: at most 3 of 6 steps"),
        (["generate", DEMO, "--speedup", "nan", *TWO, *FLAGS], "--speedup nan"),
        (["generate", DEMO, "--compare", *TWO, *FLAGS], "--compare without --plan or --speedup"),
    ],
)
def test_what_cannot_be_meant_is_refused(refused, words, message, home):
    assert message in refused(*words)
    assert not home.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "--out", "new/plans"],
        ["import", "0,1,3", "--out", "new/plan.json"],
        ["generate", "--speedup", "2"],
        ["evaluate", "--json", "new/rows.json"],
    ],
)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", 6, "--height", 7, "--width", 64], "divisible by 16 but are 7 and 64) with --steps 6 --height 7"),
        (["--steps", 6, "--set", "height=65"], "divisible by 16 but are 65 and 64) with --steps 6 --set height=65"),
        (
            ["--steps", 6, "--guidance", 2.5, "--set", "joint_attention_kwargs=1"],
            "with --steps 6 --guidance 2.5 --set joint_attention_kwargs=1: check these arguments, or save memory with",
        ),
    ],
)
def test_what_the_first_prompts_call_cannot_take_is_named_as_it_was_typed(refused, command, words, message):
    """In the only line: nothing is said of a plan that will not be made."""
    line = refused(command[0], DEMO, *command[1:], "--prompt", "a red ring", *words)
    assert message in line
    assert not any(name in line for name in ("num_inference_steps", "guidance_scale", "--batch-size"))
    assert not os.listdir()


def test_arguments_in_messages_of_the_library_are_flags():
    request = Request(DEMO, [], 1, {"frames": 5}, ["strength=0.1", "height=64"])
    for text, wanted in (
        ("num_frames = 5: give another", "--frames 5: give another"),
        ("height = 64: give a number", "--set height=64: give a number"),
        ("the scheduler makes 11 steps, not 10: give num_inference_steps=6", "11 steps, not 10: give --steps 6"),
        ("give a larger strength, or more num_inference_steps", "or more --steps"),
        ("--set strength=0.1: strength = 0.1", "--set strength=0.1: --set strength=0.1"),
        ("make one with ertacache.calibrate(pipe, height=4)", "ertacache.calibrate(pipe, height=4)"),
        (
            "calibrated at guidance_scale 3.5, now 5: give the call the same guidance_scale",
            "at --guidance 3.5, now 5: give the call the same --guidance",
        ),
        ("no drift, or leave on_drift='compute' out", "or leave --on-drift compute out"),
        ("batch_size = 3: give 1", "--batch-size 3: give 1"),
        ("effort best: give quick", "--effort best: give quick"),
        ("speedup 3: at most 2 of 4 steps", "--speedup 3: at most 2 of 4 steps"),
        ("speedups 3: at most 2 of 4 steps", "--speedups 3: at most 2 of 4 steps"),
    ):
        assert request.with_flags(text).endswith(wanted)


def test_warnings_of_the_library_name_flags():
    text = "the plan was calibrated at guidance_scale 3.5, now 5.0: enable it with on_drift='compute'"
    plain = warnings.formatwarning
    with Request(DEMO, [], 1, {}, []).naming_flags():
        shown = warnings.formatwarning(UserWarning(text), UserWarning, "file.py", 1)
    assert "calibrated at --guidance 3.5, now 5.0: enable it with --on-drift compute" in shown
    assert warnings.formatwarning is plain


def test_a_plan_of_another_model_names_the_command_that_makes_one(refused):
    plan = ROOT / "ERTACache4Wan2.1" / "cache" / "demo-50-budget-25.json"
    line = refused("generate", DEMO, *TWO, "--steps", 50, "--plan", plan)
    assert "the plan is for another model" in line
    assert line.endswith(f"calibrate one: `ertacache calibrate {DEMO} --steps 50 …`")


def test_a_set_of_plans_has_several_speedups(run, refused, plans):
    PlanSet(plans).save_pretrained("set")
    assert "3 steps computed" in run("generate", DEMO, "--plan", "set", *TWO, *FLAGS)[1]
    assert "2 steps computed" in run("generate", DEMO, "--plan", "set", "--speedup", 3, *TWO, *FLAGS)[1]
    assert "the plans are for 2, 3" in refused("generate", DEMO, "--plan", "set", "--speedup", 1.5, *TWO, *FLAGS)
    assert len([line for line in run("inspect", "set") if line.startswith("ERTACache budget plan")]) == 2
    assert [plan["nfe"] for plan in json.loads("\n".join(run("inspect", "set", "--json")))] == [3, 2]


RUN = Calls.run


class Dies(BaseException):
    pass


def dies_after(monkeypatch, count):
    """Have the process die at a later call."""
    made = []

    def call(self, method, part):
        made.append(part.start)
        if len(made) > count:
            raise Dies
        return RUN(self, method, part)

    monkeypatch.setattr(Calls, "run", call)
    return made


def test_a_run_that_died_goes_on_with_what_is_missing(run, files, monkeypatch):
    command = ["generate", DEMO, "--plan", files[2], *FOUR, *FLAGS]
    run(*command, "--out", "whole")
    dies_after(monkeypatch, 2)
    with pytest.raises(Dies):
        run(*command)
    assert sorted(name for name in os.listdir("sample") if name[0] != ".") == ["000-budget.png", "001-budget.png"]
    made = dies_after(monkeypatch, 9)
    run(*command)
    assert made == [2, 3] and len(os.listdir("sample")) == 4
    for name in os.listdir("whole"):
        assert Path("whole", name).read_bytes() == Path("sample", name).read_bytes()
    made.clear()
    run(*command)  # it is finished: all is made again
    assert made == [0, 1, 2, 3]


def test_another_run_does_not_go_on(run, files, monkeypatch):
    dies_after(monkeypatch, 2)
    with pytest.raises(Dies):
        run("generate", DEMO, "--plan", files[2], *FOUR, *FLAGS)
    made = dies_after(monkeypatch, 9)
    run("generate", DEMO, "--plan", files[2], "--seed", 7, *FOUR, *FLAGS)
    assert made == [0, 1, 2, 3]


def test_an_evaluation_that_died_goes_on(run, files, monkeypatch):
    command = ["evaluate", DEMO, "--plan", files[2], *FOUR, *FLAGS, "--repeats", 1, "--json"]
    run(*command, "whole.json")
    dies_after(monkeypatch, 7)  # of 3 methods: two batches
    with pytest.raises(Dies):
        run(*command, "rows.json")
    made = dies_after(monkeypatch, 99)
    run(*command, "rows.json")
    assert made[:6] == [2, 2, 2, 3, 3, 3] and not os.path.exists(".ertacache")
    whole, rows = (json.loads(Path(name).read_text()) for name in ("whole.json", "rows.json"))
    assert [row["psnr"] for row in rows] == [row["psnr"] for row in whole]


@pytest.mark.slow
def test_two_processes_make_what_one_makes(run, files):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--main_process_port=0", "-m", "ertacache"]
    words = [DEMO, "--plan", files[2], *FOUR, *FLAGS, "--device", "cpu", "--batch-size", 2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    def two(*command):
        options = {"env": environment, "capture_output": True, "text": True, "timeout": 200}
        done = subprocess.run([*launch, *map(str, command)], **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    one, both = run("generate", *words, "--compare"), two("generate", *words, "--compare", "--out", "two")
    assert both[0] == "4 images in two/" and len(both) == len(one) == 3  # one summary
    assert one[1].split("All: ")[1] == "2 calls, 6 computed, 6 skipped." and "All: " in both[1]
    assert one[2].split("PSNR")[1].split(";")[0] == both[2].split("PSNR")[1].split(";")[0]
    assert sorted(os.listdir("sample")) == sorted(os.listdir("two")) and len(os.listdir("two")) == 9
    for name in os.listdir("sample"):
        assert np.array_equal(*(np.asarray(Image.open(Path(folder, name))) for folder in ("sample", "two"))), name
    run("evaluate", *words, "--repeats", 1, "--json", "one.json")
    two("evaluate", *words, "--repeats", 1, "--json", "two.json")
    alone, shared = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    psnrs = [[row["psnr"] for row in rows[1:]] for rows in (alone, shared)]  # of the uncached run there is none
    assert psnrs[0] == pytest.approx(psnrs[1], abs=1e-4) and shared[0]["prompts"] == len(PROMPTS)
