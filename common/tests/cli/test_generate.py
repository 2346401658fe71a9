"""What a person types: right input gives files, wrong input one line on stderr, exit code 2, and nothing written."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from conftest import FOLDERS, ROOT
from ertacache.calibration.search import Search
from ertacache.cli import folder_command
from ertacache.plans import Plan
from ertacache.utils.errors import run_program

PROMPT = ["--prompt", "a red apple"]
AT_8_STEPS = "-guidance3.5-height64-width64-dtypefloat32-"  # in the names of plans that runs make; then the weights


@pytest.fixture
def sampler(flux, demo, tmp_path, monkeypatch):
    """The program with a cache of its own, and the demo loaded once."""
    (tmp_path / "room" / "cache").mkdir(parents=True)
    shutil.copytree(flux.FOLDER / "prompts", tmp_path / "room" / "prompts")
    monkeypatch.setattr(flux, "FOLDER", tmp_path / "room")
    real = flux.load
    monkeypatch.setattr(flux, "load", lambda model, *rest: demo if model == "demo" else real(model, *rest))
    return flux


def run(sampler, *arguments):
    run_program(lambda: folder_command.main(sampler, [str(a) for a in arguments]))


def refused(sampler, capsys, out, *arguments):
    """The message of a refusal, after checking its form."""
    with pytest.raises(SystemExit) as stop:
        run(sampler, *arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert stop.value.code == 2 and captured.out == ""
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert not out.exists()
    return lines[-1]


def test_a_new_threshold_is_calibrated_stored_and_used_again(sampler, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("a red ring\na blue star\n")
    out = tmp_path / "sample"
    arguments = [*PROMPT, "--steps", 8, "--threshold", 0.3, "--out", out]
    run(sampler, *arguments, "--calibration-prompts", tmp_path / "few.txt", "--compare")
    plan, arrays = sorted((tmp_path / "room" / "cache" / "local").iterdir())
    assert plan.name.startswith(f"demo-8-0.3{AT_8_STEPS}") and arrays == plan.with_suffix(".safetensors")
    names = ["000-baseline.png", "000-ertacache.png", "comparison.png", "metrics.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["schema"] == 2 and metrics["seeds"] == [1000, 1000] and metrics["settings"]["guidance"] == 3.5
    assert len(metrics["repeats_s"]["cached"]) == 1 and metrics["machine"] and metrics["date"]
    assert metrics["steps"] == 8 and metrics["nfe"] < 8 and metrics["prompts"] == 1
    assert metrics["plan"] == f"cache/local/{plan.name}"
    assert metrics["speedup"] == metrics["latency_s"]["baseline"] / metrics["latency_s"]["cached"]
    pair = [np.asarray(Image.open(out / f"000-{m}.png"), float) for m in ("baseline", "ertacache")]
    psnr = 10 * np.log10(255**2 / np.square(pair[0] - pair[1]).mean())
    assert metrics["quality"]["psnr"] == pytest.approx(psnr, abs=0.5)  # from floats, not from the rounded files
    assert set(metrics["quality"]["prompt_accuracy"]) == {"baseline", "cached"}
    stored = plan.read_bytes()
    capsys.readouterr()
    run(sampler, *arguments)
    assert plan.read_bytes() == stored
    assert "calibrating" not in capsys.readouterr().err
    assert json.loads((out / "metrics.json").read_text())["latency_s"]["baseline"] is None


@pytest.mark.slow
def test_a_speedup_spends_exactly_its_calls(sampler, tmp_path):
    (tmp_path / "few.txt").write_text("a red ring\na blue star\n")
    arguments = [*PROMPT, "--steps", 8, "--calibration-prompts", tmp_path / "few.txt", "--out", tmp_path / "out"]
    run(sampler, *arguments, "--speedup", 2, "--compare")
    (plan,) = (tmp_path / "room" / "cache" / "local").glob("*.json")
    assert plan.name.startswith(f"demo-8-budget-4{AT_8_STEPS}")
    names = ["000-baseline.png", "000-budget.png", "comparison.png", "metrics.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["method"], metrics["nfe"], metrics["plan"]) == ("budget", 4, f"cache/local/{plan.name}")
    assert metrics["quality"]["psnr"] > 25
    run(sampler, *arguments, "--budget", 4)
    assert list((tmp_path / "room" / "cache").rglob("*.json")) == [plan]


def test_ctrl_c_keeps_the_best_plan_so_far_and_the_same_command_goes_on(sampler, tmp_path, capsys, monkeypatch):
    own, folder = Search.roll_out, tmp_path / "room" / "cache" / "local"
    arguments = [*PROMPT, "--steps", 8, "--budget", 4, "--out", tmp_path / "out"]

    def stop_at_the_second(search, *schedule):
        if search.tried:
            raise KeyboardInterrupt
        own(search, *schedule)

    with monkeypatch.context() as patched:
        patched.setattr(Search, "roll_out", stop_at_the_second)
        with pytest.raises(SystemExit) as stop:
            run(sampler, *arguments)
    (path,) = folder.glob("*.json")
    best = Plan.load(path)
    assert stop.value.code == 130 and best.nfe == 4 and not best.provenance["calibration"]["finished"]
    assert f"kept the best plan of 1 schedule so far: {path}" in capsys.readouterr().err
    run(sampler, *arguments)
    assert "no plan for 4 of 8 steps yet" in capsys.readouterr().err
    finished = Plan.load(path)
    assert finished.provenance["calibration"]["finished"] and finished.provenance["calibration"]["rollouts"] == 4


@pytest.mark.parametrize(
    "plan", [[], ["--compare", "--plan", ROOT / "ERTACache4FLUX" / "cache" / "demo-30-budget-15.json"]]
)
def test_numbers_that_are_not_finite_are_an_error_that_names_the_step_and_no_picture(
    sampler, tmp_path, monkeypatch, capsys, plan
):
    velocity, calls = sampler.velocity, []

    def broken(*arguments):
        calls.append(1)
        return velocity(*arguments) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(sampler, "velocity", broken)
    with pytest.raises(SystemExit) as stop:
        run(sampler, *PROMPT, *(plan or ["--steps", 4, "--baseline"]), "--out", tmp_path / "out")
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "the model gave, at step 2, numbers that are not finite: try --dtype" in capsys.readouterr().err


@pytest.mark.parametrize("way", [["--baseline"], ["--speedup", 2], ["--threshold", 0.1]])
def test_noise_levels_that_come_to_nothing_are_one_line(sampler, tmp_path, capsys, way):
    """At 1024 × 1024 the demo's scheduler shifts them by a number that overflows, of which numpy warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sizes = ["--steps", 8, "--height", 1024, "--width", 1024]
        message = refused(sampler, capsys, tmp_path / "out", *PROMPT, *sizes, *way, "--out", tmp_path / "out")
    assert "must fall from noise to data" in message and not list((tmp_path / "room" / "cache").iterdir())


def test_running_twice_gives_identical_pictures(sampler, tmp_path):
    for name in ("a", "b"):
        run(sampler, *PROMPT, "--steps", 4, "--baseline", "--out", tmp_path / name)
    assert (tmp_path / "a" / "000-baseline.png").read_bytes() == (tmp_path / "b" / "000-baseline.png").read_bytes()


def test_a_plan_file_can_be_named(sampler, tmp_path):
    run(sampler, *PROMPT, "--plan", ROOT / "ERTACache4FLUX" / "cache" / shipped(), "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["nfe"] < 30 and metrics["method"] == "ertacache"


def shipped():
    return sorted(p.name for p in (ROOT / "ERTACache4FLUX" / "cache").glob("demo-30-*.json"))[0]


BASELINE = ["--baseline", "--steps", 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", " ", *BASELINE], "--prompt is empty"),
        (["--prompts", "EMPTY", *BASELINE], "no prompts in"),
        (["--prompts", "/no/such/file", *BASELINE], "cannot read prompts from /no/such/file"),
        ([*PROMPT, "--prompts", "EMPTY", *BASELINE], "exclude each other"),
        (PROMPT, "--threshold λ, --speedup S, --budget N, --plan FILE or --baseline"),
        ([*PROMPT, "--budget", 1], "--budget 1: give a number of computed steps from 2 to 30"),
        ([*PROMPT, "--budget", 31], "--budget 31: give a number of computed steps from 2 to 30"),
        ([*PROMPT, "--speedup", 0.5], "--speedup 0.5: a speed-up is a number of at least 1"),
        ([*PROMPT, "--speedup", "inf"], "--speedup inf: a speed-up is a number of at least 1"),
        ([*PROMPT, "--speedup", 2, "--threshold", 0.1], "not allowed with argument --speedup"),
        ([*PROMPT, "--threshold", 0], "--threshold 0.0"),
        ([*PROMPT, "--threshold", -0.1], "--threshold -0.1"),
        ([*PROMPT, "--threshold", "nan"], "--threshold nan"),
        ([*PROMPT, "--threshold", "low"], "argument --threshold: invalid float value: 'low' (see --help)"),
        ([*PROMPT, "--treshold", 0.1], "unrecognized arguments: --treshold 0.1 (see --help)"),
        ([*PROMPT, "--threshold", "inf"], "--threshold inf"),
        ([*PROMPT, "--steps", 2, "--baseline"], "--steps 2: give a whole number from 3 to 1000"),
        ([*PROMPT, "--guidance", "nan", *BASELINE], "--guidance nan"),
        ([*PROMPT, "--height", 100, *BASELINE], "--height 100: must be a multiple of 16 for this model"),
        ([*PROMPT, "--width", 4, *BASELINE], "--width 4"),
        ([*PROMPT, "--height", 0, *BASELINE], "--height 0"),
        ([*PROMPT, "--repeats", 0, *BASELINE], "--repeats 0"),
        ([*PROMPT, "--threshold", 0.777, "--calibration-prompts", "EMPTY"], "no prompts in"),
        ([*PROMPT, "--threshold", 0.777, "--calibration-prompts", "/none"], "cannot read prompts from /none"),
        ([*PROMPT, "--plan", "/no/plan.json"], "no plan file /no/plan"),
        ([*PROMPT, "--device", "cuda", *BASELINE, "--model", "RANDOM"], "--device cuda: no such device"),
        ([*PROMPT, "--device", "gpu", *BASELINE, "--model", "RANDOM"], "--device 'gpu': give cpu, cuda"),
        ([*PROMPT, "--device", "", *BASELINE, "--model", "RANDOM"], "--device '': give cpu, cuda"),
        ([*PROMPT, "--guidance", "1e39", *BASELINE], "--guidance 1e+39: give a number from 0 to 1000000"),
        ([*PROMPT, "--compare", *BASELINE], "--compare with --baseline: say what is compared"),
        ([*PROMPT, "--site", "blocks", *BASELINE], "--site blocks: only threshold plans have one"),
        ([*PROMPT, "--target", "exact", *BASELINE], "--target exact: only budget plans have one"),
        ([*PROMPT, "--effort", "normal", *BASELINE], "--effort normal: nothing is calibrated, leave it out"),
        ([*PROMPT, "--calibration-prompts", "EMPTY", *BASELINE], "nothing is calibrated, leave it out"),
        ([*PROMPT, "--offload", "model", *BASELINE, "--model", "RANDOM", "--device", "cpu"], "--offload model"),
        ([*PROMPT, "--model", "/no/such/model", *BASELINE], "no model '/no/such/model': give a folder"),
        ([*PROMPT, "--model", "gone", *BASELINE], "no model 'gone': give a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(sampler, random_directory, tmp_path, capsys, arguments, words):
    (tmp_path / "empty.txt").write_text("# only a comment\n\n")
    names = {"EMPTY": tmp_path / "empty.txt", "RANDOM": random_directory}
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    out = tmp_path / "out"
    message = refused(sampler, capsys, out, *[names.get(a, a) for a in arguments], "--out", out)
    assert words in message, message
    assert not list((tmp_path / "room" / "cache").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", 20], "the plan is for 30 steps, the run has 20"),
        (["--model", "RANDOM"], "the plan is for another model"),
    ],
)
def test_a_plan_for_something_else_is_refused(sampler, random_directory, tmp_path, capsys, arguments, words):
    plan = ROOT / "ERTACache4FLUX" / "cache" / shipped()
    arguments = [random_directory if a == "RANDOM" else a for a in arguments]
    out = tmp_path / "out"
    assert words in refused(sampler, capsys, out, *PROMPT, *arguments, "--plan", plan, "--out", out)


def test_another_guidance_or_size_is_one_warning(sampler, tmp_path):
    plan = ROOT / "ERTACache4FLUX" / "cache" / shipped()
    with pytest.warns(UserWarning, match="guidance 3.5, now 2.0") as caught:
        run(sampler, *PROMPT, "--guidance", 2, "--height", 32, "--plan", plan, "--out", tmp_path / "out")
    assert len([w for w in caught if w.category is UserWarning]) == 1 and "height 64, now 32" in str(caught[0].message)


def test_other_weights_of_the_same_architecture_are_one_warning(sampler, demo, tmp_path, monkeypatch):
    plan = ROOT / "ERTACache4FLUX" / "cache" / shipped()
    other = copy.deepcopy(demo.transformer)
    other.proj_out.bias.data += 1
    pipe = FluxPipeline(**{**demo.components, "transformer": other})
    pipe.register_to_config(_name_or_path=demo.name_or_path)
    monkeypatch.setattr(sampler, "load", lambda *_: pipe)
    with pytest.warns(UserWarning, match="calibrated on other weights"):
        run(sampler, *PROMPT, "--plan", plan, "--out", tmp_path / "out")


BREAKAGES = {
    "model_index": (lambda d: (d / "model_index.json").unlink(), "no model_index.json"),
    "index_damaged": (lambda d: (d / "model_index.json").write_text("{"), "model_index.json is damaged"),
    "component": (lambda d: shutil.rmtree(d / "vae"), "vae is missing or empty"),
    "shard": (lambda d: sorted((d / "transformer").glob("*-00002-*"))[0].unlink(), "00002-of"),
    "weights": (lambda d: (d / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "the weights of"),
    "truncated": (lambda d: os.truncate(d / "vae" / "diffusion_pytorch_model.safetensors", 1000), "cannot load"),
    "config": (lambda d: (d / "vae" / "config.json").write_text("{"), "cannot load"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_half_downloaded_model_is_named(sampler, random_directory, tmp_path, capsys, breakage):
    damage, words = BREAKAGES[breakage]
    model = shutil.copytree(random_directory, tmp_path / "model")
    damage(model)
    out = tmp_path / "out"
    message = refused(sampler, capsys, out, *PROMPT, *BASELINE, "--model", model, "--out", out)
    assert words in message and str(model) in message


def test_another_pipeline_class_is_named(sampler, random_directory, tmp_path, capsys):
    model = shutil.copytree(random_directory, tmp_path / "model")
    index = (model / "model_index.json").read_text().replace('"FluxPipeline"', '"WanPipeline"')
    (model / "model_index.json").write_text(index)
    message = refused(sampler, capsys, tmp_path / "o", *PROMPT, *BASELINE, "--model", model, "--out", tmp_path / "o")
    assert "holds a WanPipeline, not a FluxPipeline" in message


def test_a_hub_id_without_a_network_is_one_line(sampler, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    message = refused(sampler, capsys, out, *PROMPT, *BASELINE, "--model", "nobody/no-such-model", "--out", out)
    assert "cannot load nobody/no-such-model" in message and "network" in message


def test_an_unwritable_output_folder_is_named_before_any_work(sampler, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "sample"
    assert f"cannot write to {out}" in refused(sampler, capsys, out, *PROMPT, *BASELINE, "--out", out)


@pytest.mark.slow
def test_run_sh_is_the_main_job(tmp_path):
    """As a person starts it, with everything at its default but the output folder."""
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    done = subprocess.run(["sh", ROOT / "ERTACache4FLUX" / "run.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["prompts"] == 4 and metrics["nfe"] < 30 and metrics["quality"]["ssim"] > 0.9
    assert metrics["quality"]["prompt_accuracy"]["baseline"] == 1.0
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000 and "of 30 steps computed" in done.stdout


@pytest.mark.slow
def test_the_process_ends_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "generate.py", "--steps", "2", "--baseline", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT / "ERTACache4FLUX", capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip() == "error: --steps 2: give a whole number from 3 to 1000"


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, []),
        ({"SPEEDUP": "2", "OUT": "a b", "PROMPT": "a rocket, 'red'"}, ["--height", "128"]),
        ({"BUDGET": "7", "COMPARE": "no", "PROMPTS": "p.txt", "EFFORT": "normal"}, []),
        ({"LAMBDA": "0.3", "SITE": "blocks", "REPEATS": "5"}, []),
        ({"LAMBDA": "0.3", "SPEEDUP": "2"}, []),
        ({"SITE": "blocks", "BUDGET": "5"}, []),
        ({"COMPARE": "maybe"}, []),
    ],
)
def test_run_py_does_what_run_sh_does(folder, values, words, tmp_path):
    """Both give the same flags to generate.py, or refuse in the same line."""
    for name in (f"{folder}/run.sh", "scripts/run.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts/setup.sh").write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/.ready").touch()
    stub = tmp_path / ".venv/bin/python"
    stub.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    stub.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], **values}
    said = []
    for command in (["sh", "run.sh"], [sys.executable, "-S", "-E", "../scripts/run.py", folder]):
        options = {"cwd": tmp_path / folder, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([*command, *words], **options)
        given = done.stdout.splitlines()[1:]
        pairs = sorted(zip(given, [*given[1:], ""], strict=True)) if given else []
        said.append((done.returncode, [pair for pair in pairs if pair[0].startswith("--")], done.stderr))
    assert said[0] == said[1] and (said[0][1] or said[0][2].startswith("error: "))


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--help"], 0, "python scripts/run.py ERTACache4FLUX"),
        ([], 2, "error: name a model folder: ERTACache4"),
        (["none"], 2, "error: name a model folder: ERTACache4"),
    ],
)
def test_run_py_alone(words, code, text, tmp_path):
    command = [sys.executable, "-S", "-E", ROOT / "scripts" / "run.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code and text in done.stdout + done.stderr
