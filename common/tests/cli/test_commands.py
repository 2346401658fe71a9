"""The command `ertacache`: what a script with enable and calibrate gives, and clear refusals."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import ertacache
from conftest import IMAGES, ROOT, open_model_folder
from ertacache import BudgetPlan, Plan
from ertacache.calibration.budget import BudgetCalibration
from ertacache.cli import main
from ertacache.cli.commands import EXAMPLES
from ertacache.cli.request import Request
from ertacache.evaluation.metrics import mean, psnr, ssim
from ertacache.utils import media
from helpers import CallCounter, no_warning, processes

DEMO = str(ROOT / "ERTACache4FLUX" / "demo")
SHIPPED = ROOT / "ERTACache4FLUX" / "cache"
PROMPTS = [*IMAGES, "a sailing boat", "a fruit"]
CALL = {"num_inference_steps": 6, "height": 64, "width": 64, "guidance_scale": 3.5, "max_sequence_length": 16}
FLAGS = ["--steps", 6, "--height", 64, "--width", 64, "--guidance", 3.5, "--set", "max_sequence_length=16"]
FOUR = [word for prompt in PROMPTS for word in ("--prompt", prompt)]


@pytest.fixture(scope="module")
def pipe():
    """The demo, loaded once."""
    return open_model_folder("flux").pipe


@pytest.fixture
def run(pipe, tmp_path, monkeypatch, capsys):
    """run(words …): a command's stdout lines, in an empty folder; the demo is not loaded anew."""
    real = Request.load
    monkeypatch.setattr(Request, "load", lambda self: pipe if self.model == DEMO else real(self))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["ertacache", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert stop.value.code in (0, None), said.err
        return said.out.splitlines()

    yield command
    ertacache.disable(pipe)


@pytest.fixture(scope="module")
def plans(pipe, tmp_path_factory):
    """By hand: what `ertacache.calibrate` makes of the same call."""
    folder = tmp_path_factory.mktemp("work")
    return ertacache.calibrate(pipe, PROMPTS, [2, 3], work=folder, progress=False, **CALL)


@pytest.fixture
def files(plans, tmp_path):
    """Their files in the current folder, by speed-up."""
    return {speedup: plan.save(tmp_path / f"by-hand-{speedup}.json").name for speedup, plan in plans.items()}


def images(pipe, plan=None, prompts=PROMPTS, seed=1000, **changes) -> np.ndarray:
    """By hand: float images [N, H, W, 3] of single calls."""
    ertacache.disable(pipe)
    if plan is not None:
        ertacache.enable(pipe, plan)
    found = []
    for j, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + j)
        found.append(pipe(prompt, generator=generator, output_type="np", **{**CALL, **changes}).images)
    ertacache.disable(pipe)
    return np.concatenate(found)


# --- calibrate ---------------------------------------------------------------------------------------------------


def test_calibrate_makes_the_plans_of_the_library_and_says_what_comes_next(run, pipe, plans, tmp_path):
    lines = run("calibrate", DEMO, *FOUR, *FLAGS, "--speedups", "2,3,2.9", "--out", "plans")
    names = [f"demo-{n}-of-6.{kind}" for n in (2, 3) for kind in ("json", "safetensors")]
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == names
    for plan, line in zip(plans.values(), lines, strict=False):
        path = tmp_path / "plans" / f"demo-{plan.nfe}-of-6.json"
        assert Plan.load(path) == plan
        for part in (f"{plan.nfe} of 6 calls", f"{plan.predicted_error:.2e}", f"held out {plan.held_out_error:.2e}"):
            assert part in line
    assert len(lines) == 3 and lines[2].startswith("next: ertacache generate ")
    lines_of_generate = run(*shlex.split(lines[2].removeprefix("next: "))[1:])
    assert "Last call: 3 steps computed, 3 skipped" in lines_of_generate[1] and "All: 1 call," in lines_of_generate[1]
    wanted = media.to_uint8(images(pipe, plans[2], PROMPTS[:1]))
    assert np.array_equal(np.asarray(Image.open("sample/000-budget.png")), wanted[0])


@pytest.mark.slow
def test_plans_that_are_there_are_written_over_by_force_only(run, pipe, plans, refused, tmp_path):
    (tmp_path / "demo-3-of-6.json").write_text("mine")
    command = ["calibrate", DEMO, *FOUR, *FLAGS, "--speedups", "2", "--out", tmp_path]
    with CallCounter(pipe.transformer) as calls:
        assert "demo-3-of-6.json is there already: give --force" in refused(*command)
    assert calls.count == 0 and (tmp_path / "demo-3-of-6.json").read_text() == "mine"
    run(*command, "--force")
    assert Plan.load(tmp_path / "demo-3-of-6.json") == plans[2]


def test_plans_that_a_killed_process_was_saving_are_written_over_whatever_its_notes_hold(run, pipe, plans, tmp_path):
    (tmp_path / "plans" / ".saving-plans-folder").mkdir(parents=True)
    (tmp_path / "plans" / ".saving-plans-1").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "plans" / ".saving-plans-2").write_text("demo-2-of-6.json\ndemo-3-of-6.json")
    (tmp_path / "plans" / "demo-3-of-6.json").write_text("half of a pl")
    run("calibrate", DEMO, *FOUR, *FLAGS, "--speedups", "2", "--out", "plans")
    names = [".saving-plans-folder", "demo-3-of-6.json", "demo-3-of-6.safetensors"]
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == names
    assert Plan.load(tmp_path / "plans" / "demo-3-of-6.json") == plans[2]


@pytest.mark.slow
def test_an_interrupted_calibration_ends_with_130_and_goes_on(run, pipe, plans, tmp_path, capsys, monkeypatch):
    command = ["calibrate", DEMO, *FOUR, *FLAGS, "--speedups", "2", "--out", "plans"]
    with CallCounter(pipe.transformer) as whole:
        run(*command)
    with monkeypatch.context() as patched:
        patched.setattr(BudgetCalibration, "plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patched.setattr(sys, "argv", ["ertacache", *map(str, command), "--force"])
        with pytest.raises(SystemExit) as stop:
            main()
    said = capsys.readouterr()
    assert stop.value.code == 130 and said.err.strip().splitlines()[-1].startswith("interrupted; the same command")
    assert not said.out and [path.suffix for path in (tmp_path / "plans").glob("calibration-*")] == [".partial"]
    with CallCounter(pipe.transformer) as rest:
        run(*command, "--force")
    assert rest.count == whole.count - len(PROMPTS) * 6  # the reference pass was done
    assert Plan.load(tmp_path / "plans" / "demo-3-of-6.json") == plans[2]


def launched(folder):
    """A calibration in one of several processes."""
    sys.stdout = (folder / f"stdout-{os.environ['RANK']}").open("w", buffering=1)
    words = ["calibrate", DEMO, *FOUR, *FLAGS, "--speedups", "2", "--out", folder / "plans", "--device", "cpu"]
    sys.argv = ["ertacache", *map(str, words)]
    try:
        main()
    except SystemExit as stop:
        return stop.code


@pytest.mark.slow
def test_two_processes_share_a_calibration_and_the_first_one_speaks(plans, tmp_path):
    codes, results, said = processes(2, launched, tmp_path)
    assert codes == [0, 0] and set(results) <= {0, None}, said
    told = [(tmp_path / f"stdout-{rank}").read_text() for rank in (0, 1)]
    assert "3 of 6 calls" in told[0] and told[1] == ""
    found = BudgetPlan.load(tmp_path / "plans" / "demo-3-of-6.json")
    assert found.computed == plans[2].computed and np.allclose(found.weights, plans[2].weights, atol=1e-5)


# --- inspect -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 160])
@pytest.mark.parametrize("name", ["demo-30-budget-15", "demo-30-budget-10-exact", "demo-30-0.17"])
def test_inspect_draws_every_step_within_the_width(run, monkeypatch, name, width):
    plan = Plan.load(SHIPPED / f"{name}.json")
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("inspect", SHIPPED / f"{name}.json")
    assert max(map(len, lines)) <= width and "\x1b" not in "".join(lines)
    drawn = [line for line in lines if re.fullmatch(r"(σ 1\.000)? +[█░ ]*[█░] *( σ 0\.000)?", line)]
    assert drawn[0].startswith("σ 1.000") and drawn[-1].endswith("σ 0.000")
    blocks = "".join(re.sub(r"σ \d\.\d+", "", line) for line in drawn)
    cells = blocks.split()
    steps = [cell[0] for cell in cells] if len(cells[0]) <= 2 else "".join(cells)  # side by side where it is narrow
    total = len(getattr(plan, "sigmas", ()) or plan.native_sigmas) - 1
    computed = plan.computed if plan.kind == "budget" else sorted({*range(30)} - {*plan.cached})
    assert len(steps) == total and [i for i, step in enumerate(steps) if step == "█"] == list(computed)
    text = " ".join(" ".join(lines).split())
    for part in ("FluxTransformer2DModel (num_layers 2", "shift 3.0", "height 64", "seeds 0–31", "2026-11-26"):
        assert part in text
    for candidate, error in plan.provenance["calibration"]["errors"].items():
        assert f"{candidate} {error:.2e}" in text


def test_inspect_of_a_folder_as_json_is_the_whole_plan(run, plans, tmp_path):
    plans[2].save(tmp_path / "plan" / "plan.json")
    found = json.loads("\n".join(run("inspect", tmp_path / "plan", "--json")))
    wanted = json.loads(json.dumps(dataclasses.asdict(plans[2])))
    assert wanted.pop("requirements").items() <= found.items() and wanted.items() <= found.items()
    assert (found["kind"], found["nfe"], found["speedup_nfe"]) == ("budget", 3, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], "torch"),
        (["generate", "--help"], "torch"),
        (["inspect", f"{SHIPPED}/demo-30-0.17.json"], "diffusers"),
    ],
)
def test_from_an_empty_folder_it_is_light_and_needs_no_unicode(tmp_path, words, absent):
    code = "import sys; from ertacache.cli import main\ntry: main()\nexcept SystemExit as stop: assert not stop.code\n"
    code += f"assert {absent!r} not in sys.modules"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT / "common"), "COLUMNS": "100"}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if words[0] == "inspect":
        cached = Plan.load(SHIPPED / "demo-30-0.17.json").cached
        assert f"? 1.000  {' '.join('.' if i in cached else '#' for i in range(30))}   ? 0.000" in done.stdout


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_compares_with_the_same_seeds_and_batches(run, pipe, plans, files):
    order = []
    with CallCounter(pipe.transformer) as calls:
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: order.append(hasattr(pipe.scheduler, "plan")))
        lines = run("generate", DEMO, "--plan", files[2], *FOUR, *FLAGS, "--batch-size", 2, "--compare", "--seed", 7)
        hook.remove()
    assert calls.count == 3 * (6 + 3) and order == ([False] * 6 + [True] * 3) * 3  # warm-up, and two batches in turn
    both = [images(pipe, plan, seed=7) for plan in (None, plans[2])]
    for name, wanted in zip(("baseline", "budget"), both, strict=True):
        for j in range(4):
            found = np.asarray(Image.open(f"sample/{j:03d}-{name}.png"), int)
            assert np.abs(found - media.to_uint8(wanted[j])).max() <= 1
    assert len(os.listdir("sample")) == 9 and Image.open("sample/comparison.png").width > 3 * 64
    assert lines[0] == "4 images in sample/" and "3 steps computed, 3 skipped" in lines[1] and "2 calls" in lines[1]
    assert f"PSNR {mean(psnr, *both):.1f} dB (worst " in lines[2] and f"SSIM {mean(ssim, *both):.4f}" in lines[2]
    ratio, before, after = map(
        float, re.match(r"([\d.]+)× faster calls \(([\d.]+) s → ([\d.]+) s\)", lines[2]).groups()
    )
    assert ratio == pytest.approx(before / after, rel=0.1)


def test_without_a_plan_it_is_the_uncached_run(run, pipe):
    assert run("generate", DEMO, "--prompt", PROMPTS[0], *FLAGS, "--out", "here") == ["1 image in here/"]
    assert os.listdir("here") == ["000-baseline.png"]
    wanted = media.to_uint8(images(pipe, prompts=PROMPTS[:1]))
    assert np.array_equal(np.asarray(Image.open("here/000-baseline.png")), wanted[0])


def test_another_guidance_than_the_plans_is_one_warning(run, files):
    words = [3 if word == 3.5 else word for word in FLAGS]
    with pytest.warns(UserWarning, match=r"guidance_scale 3.5, now 3.0.*the same guidance_scale, or") as caught:
        run("generate", DEMO, "--plan", files[2], "--prompt", PROMPTS[0], *words)
    assert len([w for w in caught if "calibrated at" in str(w.message)]) == 1


def test_a_shipped_plan_says_what_it_was_not_made_for(run):
    """Neither true CFG nor other noise levels: its file records no true_cfg_scale, and no sigmas but the grid."""
    words = ["generate", DEMO, *PLAN, "--prompt", PROMPTS[0], *[30 if word == 6 else word for word in FLAGS]]
    with no_warning():
        run(*words, "--on-drift", "ignore")
    sigmas = json.dumps((np.linspace(1, 1 / 30, 30) ** 2).tolist())
    others = ["--set", "true_cfg_scale=4", "--negative-prompt", "a rocket", "--set", f"sigmas={sigmas}"]
    with pytest.warns(UserWarning) as caught:
        run(*words, *others, "--on-drift", "ignore")
    conditions, levels = (str(w.message) for w in caught if "quality may be lower" in str(w.message))
    assert conditions.startswith("the plan was calibrated at true_cfg_scale 1.0, now 4; quality may be lower: give")
    assert levels.startswith("this run has other noise levels than the plan's calibration (step ")


def test_where_a_run_drifts_more_steps_are_computed(run, pipe, plans, tmp_path):
    """Calibration errors of next to nothing: every run is beyond them, from the second computed step on."""
    plan = plans[2]
    tiny = tuple(tuple(1e-9 for _ in row) for row in plan.prediction_errors)
    dataclasses.replace(plan, prediction_errors=tiny).save(tmp_path / "tight.json")
    words = ["generate", DEMO, "--plan", tmp_path / "tight.json", "--prompt", PROMPTS[0], *FLAGS]
    assert f"{plan.nfe} steps computed" in run(*words, "--on-drift", "ignore")[-1]
    skipped = plan.computed[1] - 1
    assert f"{6 - skipped} steps computed, {skipped} skipped" in run(*words, "--on-drift", "compute")[-1]


def test_a_video(run, tmp_path):
    import imageio.v3 as imageio

    room, prompt = open_model_folder("wan"), "a red circle moving left slowly on a blue background"
    call = ["--steps", 3, "--frames", 5, "--height", 32, "--width", 32, "--guidance", 4, "--negative-prompt", "blurry"]
    call += ["--set", "max_sequence_length=16"]
    assert run("generate", room.sampler.FOLDER / "demo", "--prompt", prompt, *call, "--out", "v") == ["1 video in v/"]
    options = {"height": 32, "width": 32, "num_frames": 5, "guidance": 4.0, "negative_prompt": "blurry"}
    wanted = room.stock(room.pipe, [prompt], [1000], 3, output_type="np", **options)[0]
    found = imageio.imread(tmp_path / "v" / "000-baseline.mp4")
    assert found.shape == wanted.shape == (5, 32, 32, 3)
    assert np.abs(found / 255 - wanted).mean() < 0.03


# --- evaluate ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluate_measures_what_a_script_measures(run, pipe, plans, files, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    command = ["evaluate", DEMO, "--plan", files[2], "--plan", files[3], "--prompts", "prompts.txt", *FLAGS]
    order = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: order.append(len(pipe.scheduler.timesteps)))
    lines = run(*command, "--repeats", 3, "--json", "rows.json")
    hook.remove()
    steps_and_calls = ((6, 6), (2, 2), (3, 3), (6, 3), (6, 2))  # uncached, fewer steps, the plans
    turn = [steps for steps, count in steps_and_calls for _ in range(count)]
    assert order == turn * (2 + 3)
    rows, reference = json.loads((tmp_path / "rows.json").read_text()), images(pipe, prompts=PROMPTS[:2])
    by_hand = [(2, images(pipe, prompts=PROMPTS[:2], num_inference_steps=2))]
    by_hand += [(3, images(pipe, prompts=PROMPTS[:2], num_inference_steps=3))]
    by_hand += [(plan.nfe, images(pipe, plan, PROMPTS[:2])) for plan in plans.values()]
    assert [row["method"] for row in rows] == ["none", "fewer-steps", "fewer-steps", "budget", "budget"]
    assert rows[0]["psnr"] is None and rows[0]["speedup_end_to_end"] == 1 and "6 of 6" in lines[2]
    for row, (nfe, found), line in zip(rows[1:], by_hand, lines[3:], strict=False):
        assert (row["nfe"], row["speedup_nfe"], row["prompts"]) == (nfe, 6 / nfe, 2)
        assert row["psnr"] == pytest.approx(mean(psnr, reference, found), abs=1e-3)
        assert row["ssim"] == pytest.approx(mean(ssim, reference, found), abs=1e-5)
        assert row["speedup_end_to_end"] == rows[0]["end_to_end_s"] / row["end_to_end_s"]
        for part in (f"{nfe} of 6", f"{6 / nfe:.2f}×", f"{row['psnr']:.1f}", f"{row['ssim']:.4f}"):
            assert part in line
    assert rows[3]["plan"] == files[2] and rows[3]["settings"]["max_sequence_length"] == 16
    assert lines[-1].endswith("scripts/evaluate.py in a clone of the repository")


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(run, tmp_path, monkeypatch, capsys):
    """refused(words …): the one line that a command says before it ends with 2."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["ertacache", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        lines = said.err.strip().splitlines()
        assert stop.value.code == 2 and said.out == "" and len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return command


ONE = ["--prompt", "a red ring", "--out", "out"]
PLAN = ["--plan", SHIPPED / "demo-30-budget-15.json"]


def test_a_plan_of_a_scheduler_with_more_calls_than_steps_names_the_steps_to_give(refused, plans, tmp_path):
    requirements = dataclasses.replace(plans[2].requirements, scheduler={"class": "PNDMScheduler"})
    dataclasses.replace(plans[2], requirements=requirements).save(tmp_path / "pndm.json")  # 6 calls: 5 steps
    words = ["generate", DEMO, *ONE, "--plan", "pndm.json", "--height", 64, "--width", 64]
    assert "the plan is for 6 steps, the run has 7: give --steps 5, or" in refused(*words, "--steps", 6)
    assert "PNDMScheduler" in refused(*words, "--steps", 5)  # goes on to what else differs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "/no/model", *ONE], "no model /no/model: give a folder that is there, or a Hub id"),
        (["generate", "gone", *ONE], "no model gone: give a folder"),
        (["generate", ".", *ONE], ". has no model_index.json"),
        (["generate", "nobody/no-such-model", *ONE], "cannot load nobody/no-such-model ("),
        (["generate", DEMO, *ONE, "--plan", "none.json"], "no plan file none."),
        (
            ["generate", DEMO, *ONE, *PLAN, "--steps", 20],
            "the plan is for 30 steps, the run has 20: give --steps 30, or",
        ),
        (["generate", DEMO, *ONE, *PLAN], "the plan is for 30 steps, the run has 28: give --steps 30, or"),
        (
            ["generate", DEMO, *ONE, "--set", "heigth=64"],
            "FluxPipeline's call has no heigth: leave it out, or try height",
        ),
        (["generate", DEMO, *ONE, "--set", "height"], "--set height: write NAME=VALUE"),
        (["generate", DEMO, *ONE, "--set", "latents=0"], "--set latents=0: latents is set by the command"),
        (["generate", DEMO, *ONE, "--height", 64, "--set", "height=32"], "--set height=32: height is given twice"),
        (["generate", DEMO, *ONE, "--frames", 5], "--frames 5: FluxPipeline's call has no num_frames"),
        (["generate", DEMO, *ONE, "--set", "num_inference_steps=few"], "num_inference_steps = 'few': give --steps"),
        (["generate", DEMO, *ONE, *FLAGS, "--set", "guidance_scale=x"], "guidance_scale is given twice"),
        (["generate", DEMO, *ONE, "--set", "joint_attention_kwargs=1"], "FluxPipeline's call failed ('int' object"),
        (["generate", DEMO, *ONE, "--steps", 2, "--height", 7], " with --steps 2 --height 7: check these arguments"),
        (["generate", DEMO, *ONE, "--set", "max_sequence_length=-1"], "--set max_sequence_length=-1: give a number"),
        (["generate", DEMO, *ONE, "--guidance", "nan"], "--guidance nan: give a finite number"),
        (["generate", DEMO, *ONE, "--set", "height=0"], "--set height=0: give a whole number of at least 1"),
        (["generate", DEMO, *ONE, "--set", "height=true"], "--set height=true: give a whole number of at least 1"),
        (["generate", DEMO, *ONE, "--set", "width=64.5"], "--set width=64.5: give a whole number of at least 1"),
        (["generate", DEMO, *ONE, "--set", "sigmas=[]"], "--set sigmas=[]: give a number for each step, or leave it"),
        (["generate", DEMO, *ONE, "--set", f"heigth={'[' * 20000}"], "[[ …: FluxPipeline's call has no heigth"),
        (
            ["generate", DEMO, *ONE, "--steps", 2, "--height", 65, "--width", 64],
            "(`height` and `width` have to be divisible by 16 but are 65 and 64) with --steps 2 --height 65 --width 64",
        ),
        (["generate", DEMO, *ONE, *FLAGS, "--fps", 5], "--fps 5: a FluxPipeline makes images, leave it out"),
        (["generate", DEMO, *ONE, *FLAGS, "--on-drift", "compute"], "--on-drift compute without --plan or --speedup"),
        (["generate", DEMO, *ONE, *FLAGS, "--revision", "main"], "--revision main: the folder "),
        (["generate", DEMO, *ONE, *FLAGS, "--plan", ""], "plan = '': give a plan, the path of one, or hf://"),
        (["generate", DEMO, *ONE, *PLAN, "--steps", 30, "--speedup", 3], "--speedup 3: the plans are for 2; give"),
        (
            ["generate", DEMO, "--prompt", "a red ring", "--out", ""],
            "'--out': '' is no path: give one, or leave it out",
        ),
        (["evaluate", DEMO, *ONE, "--json", ""], "'--json': '' is no path: give one, or leave it out"),
        (["calibrate", DEMO, "--prompts", "", "--out", "out"], "'--prompts': '' is no path: give one, or leave it out"),
        (["generate", "", *ONE], "no model '': give a folder that is there, or a Hub id"),
        (["calibrate", DEMO, *ONE, *FLAGS, "--speedups", ","], "--speedups ',': give numbers, like 2,3"),
        (["calibrate", DEMO, *ONE, *FLAGS, "--speedups", "2", "--set", "joint_attention_kwargs=1"], "call failed ("),
        (["generate", DEMO, "--out", "out"], "no prompt: give --prompt TEXT, or --prompts FILE"),
        (
            ["generate", DEMO, "--prompts", "empty.txt", "--out", "out"],
            "no prompts in empty.txt: write one prompt a line",
        ),
        (["generate", DEMO, *ONE, "--prompts", "empty.txt"], "--prompt and --prompts exclude each other"),
        (["generate", DEMO, "--prompt", " ", "--out", "out"], "--prompt is empty: say what should be seen"),
        (["generate", DEMO, *ONE, "--compare"], "--compare without --plan"),
        (["generate", DEMO, "--prompt", "a", "--out", "empty.txt/out"], "cannot write to empty.txt/out ("),
        (["calibrate", DEMO, *ONE, "--speedups", "abc"], "--speedups 'abc' is no list of numbers"),
        (["calibrate", DEMO, *ONE, "--speedups", "0.5"], "--speedups 0.5: a speed-up is a number of at least 1"),
        (["calibrate", DEMO, *ONE, "--steps", 2], "--speedups 2: at most 1 of 2 steps"),
        (["calibrate", DEMO, "--prompts", "empty.txt", "--out", "out"], "no prompts in empty.txt"),
        (["calibrate", DEMO, "--prompt", "a", "--out", "empty.txt/out"], "cannot write to empty.txt/out ("),
        (["evaluate", DEMO, "--prompt", "a", "--plan", "none"], "no plan file none"),
        (
            ["evaluate", DEMO, "--prompt", "a", *PLAN, "--steps", 30, "--set", "sigmas=[1,0.5]"],
            "--set sigmas fixes the",
        ),
        (
            ["evaluate", DEMO, "--prompt", "a", *PLAN, "--steps", 30, "--json", "empty.txt/r.json"],
            "cannot write to empty",
        ),
        (["inspect", "nothing.json"], "no plan file nothing."),
        (["inspect", "."], "no plan"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(refused, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.txt").write_text("# only a comment\n\n")
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path / "home"))
    assert message in refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize("command", [["generate", *PLAN, "--steps", 30], ["calibrate", "--steps", 6]])
def test_noise_levels_that_come_to_nothing_are_one_line(refused, command):
    """At 1024 × 1024 the demo's scheduler shifts them by a number that overflows, of which numpy warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        line = refused(command[0], DEMO, *ONE, *command[1:], "--height", 1024, "--width", 1024)
    assert "must fall from noise to data" in line


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_help_of_a_command_ends_with_an_example_of_it(run, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "160")
    lines = [line for line in run(name, "--help") if line.strip()]
    assert lines[-1].strip() == f"Example: {EXAMPLES[name]}"


@pytest.mark.parametrize("words", EXAMPLES.values(), ids=EXAMPLES)
def test_the_example_of_a_command_has_options_that_it_takes(run, refused, tmp_path, words):
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    _, command, _, *others = shlex.split(words)
    assert "no model gone: give a folder" in refused(command, "gone", *others)


@pytest.mark.slow
def test_usage_errors_end_with_2_and_write_nothing(tmp_path):
    command = [sys.executable, "-m", "ertacache", "generate", DEMO, "--bogus"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "No such option" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
