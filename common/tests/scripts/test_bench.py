"""scripts/bench/latency.py: every method on every architecture at toy size, counted; nothing is said about time."""

import json
import math
import runpy
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import latency as bench_latency
from conftest import FOLDERS, ROOT
from ertacache.caches import third_party
from ertacache.demos.model_folder import load_model_folder
from ertacache.demos.random_models import MODELS, random_module
from ertacache.evaluation import latency
from ertacache.evaluation.latency import METHODS, NUMBERS, Latency, bisect_threshold, computed_steps, observed
from ertacache.numerics.blocks import blocks_of

STEPS = 12
COUNTS = {"baseline": 12, "threshold": 6, "threshold-blocks": 6, "budget": 6, "teacache": 6}


def options(*arguments):
    return bench_latency.parse_arguments(["--size", "small", "--device", "cpu", "--repeats", "1", *arguments])


@pytest.fixture
def flux_latency():
    sampler, args = load_model_folder(ROOT / "ERTACache4FLUX"), options()
    pipe = bench_latency.open_pipeline(sampler, args)
    settings = {**MODELS["ERTACache4FLUX"].small.settings, "steps": STEPS}
    return Latency(sampler, pipe, sampler.settings_of(pipe, **settings), repeats=1)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_method_on_every_architecture(folder):
    rows = bench_latency.rows_of(load_model_folder(ROOT / folder), options("--steps", str(STEPS), "--compile", "no"))
    rows = {row["method"]: row for row in rows}
    assert list(rows) == list(METHODS)
    unfit = {"dbcache"} if find_spec("cache_dit") is None or "OpenSora" in folder else set()
    for name, row in rows.items():
        assert (row["error"] is None) == (name not in unfit), row["error"]
        assert row["peak_memory_mib"] is None and row["folder"] == folder and row["steps"] == STEPS
        if name not in unfit:
            assert all(math.isfinite(row[number]) for number in NUMBERS) and row["latency_s"] > 0
            assert row["speedup_nfe"] == pytest.approx(STEPS / row["computed"])
            cost = row["latency_s"] / row["baseline_latency_s"]
            assert row["overhead"] == pytest.approx(cost * STEPS / row["computed"] - 1)
            assert row["speedup_latency"] == pytest.approx(1 / cost)
    assert {name: rows[name]["computed"] for name in COUNTS} == COUNTS
    assert 5 <= rows["first-block"]["computed"] <= 7 and rows["first-block"]["threshold"] > 0
    assert "dbcache" in unfit or 8 <= rows["dbcache"]["computed"] < STEPS  # its first eight steps are always computed


@pytest.mark.parametrize(
    ("folder", "billions"),
    zip(FOLDERS, (11.90, 1.42, 1.69, 1.21), strict=True),
)
def test_the_published_sizes(folder, billions):
    def new(kind, *arguments, **options):
        return random_module("meta", torch.bfloat16, kind, *arguments, **options)

    pipe = MODELS[folder].build(ROOT / folder / "demo", MODELS[folder].full, new)
    assert round(sum(p.numel() for p in pipe.transformer.parameters()) / 1e9, 2) == billions


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_random_weights_have_the_dtypes_of_loaded_ones(folder, tmp_path):
    pipe = bench_latency.open_pipeline(load_model_folder(ROOT / folder), options("--dtype", "bfloat16"))
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert dtypes(pipe.transformer) == dtypes(loaded) and torch.get_default_dtype() == torch.float32


def dtypes(model):
    return {name: t.dtype for part in (model.named_parameters(), model.named_buffers()) for name, t in part}


@pytest.mark.slow
def test_compiled_blocks_are_counted_and_put_back(flux_latency):
    model = flux_latency.model
    methods = ["baseline", "budget", "first-block"]
    rows = flux_latency.rows(methods, "eager")
    assert [row["error"] for row in rows] == [None] * 3 and {row["compile"] for row in rows} == {"eager"}
    assert [row["computed"] for row in rows[:2]] == [12, 6] and 5 <= rows[2]["computed"] <= 7
    assert all("forward" not in block.__dict__ for block in blocks_of(model))


def test_a_block_that_is_skipped_is_not_counted(flux_latency):
    with observed(flux_latency.model) as passes:
        flux_latency.loop()
        assert passes.total == 2 * STEPS  # the last double and the last single block
        flux_latency.stock(lambda: third_party.first_block(flux_latency.subject, 1e9))
        assert passes.total == 2 * STEPS + 2
    flux_latency.loop()
    assert passes.total == 2 * STEPS + 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("cache_dit") is None, reason="needs cache_dit: sh scripts/setup.sh peers")
def test_dbcache_leaves_nothing_behind(flux_latency):
    plain = flux_latency.sampler.denoise(flux_latency.pipe, flux_latency.inputs)
    order = list(flux_latency.model._modules)
    flux_latency.stock(lambda: third_party.cache_dit(flux_latency.subject, 0.5))
    assert list(flux_latency.model._modules) == order and "forward" not in flux_latency.model.__dict__
    assert torch.equal(flux_latency.sampler.denoise(flux_latency.pipe, flux_latency.inputs), plain)


@pytest.mark.slow
def test_what_fails_is_a_row(flux_latency, monkeypatch):
    def broken(*arguments):
        raise torch.OutOfMemoryError("tried to allocate\n80 GiB")

    monkeypatch.setitem(latency.SEARCHED, "first-block", broken)
    baseline, failed, budget = flux_latency.rows(["baseline", "first-block", "budget"])
    assert failed["error"] == "OutOfMemoryError: tried to allocate 80 GiB" and failed["latency_s"] is None
    assert baseline["error"] is None and budget["computed"] == 6
    monkeypatch.setattr(flux_latency, "loop", broken)
    assert all("80 GiB" in row["error"] for row in flux_latency.rows(["threshold", "budget"]))


def test_a_model_that_does_not_fit(monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench_latency, "open_pipeline", too_large)
    args = options("--methods", "baseline,budget", "--backend", "eager")
    rows = list(bench_latency.rows_of(Namespace(FOLDER=Path("ERTACache4FLUX")), args))
    assert [(row["method"], row["compile"]) for row in rows] == [
        (m, c) for c in ("no", "eager") for m in ("baseline", "budget")
    ]
    assert {row["error"] for row in rows} == {"OutOfMemoryError: no room"} and rows[0]["steps"] == 30
    assert bench_latency.table(rows).count("no room") == 4


def test_bisection_finds_the_count():
    def count(threshold):  # a step is computed while its change reaches the threshold
        return sum(change >= threshold for change in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6))

    assert count(bisect_threshold(count, 3)) == 3
    assert count(bisect_threshold(count, 4.4, tolerance=0.5)) == 4
    assert bisect_threshold(lambda threshold: 7, 3) > 0  # never near: any of those tried


def test_half_of_the_steps():
    assert computed_steps(4) == (0, 3)
    assert len(computed_steps(30)) == 15 and len(computed_steps(50)) == 25


@pytest.fixture
def program(monkeypatch, capsys):
    """Run a program under scripts/ in this process, and return what it prints."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(ROOT / "scripts" / name))["main"]()
        return capsys.readouterr().out

    return run


def script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "latency.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command(tmp_path):
    arguments = "--size small --device cpu --steps 6 --repeats 1 --compile no --methods budget,baseline --json"
    done = script(str(ROOT / "ERTACache4FLUX"), *arguments.split(), str(tmp_path / "new" / "rows.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert [(row["method"], row["computed"]) for row in rows] == [("budget", 3), ("baseline", 6)]
    assert rows[0]["settings"]["height"] == 64 and rows[0]["dtype"] == "float32" and rows[0]["libraries"]["torch"]
    assert done.stdout.count("\n| ERTACache4FLUX |") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--size small --methods magic", "--methods magic: choose from baseline"),
        ("--size small --repeats 0", "--repeats 0: give a whole number of at least 1"),
        ("--size small --steps 3", "--steps 3: give a whole number from 4 to 1000"),
        ("--size small --backend magic", "--backend magic: choose from"),
        ("--size small --device gpu", "invalid choice: 'gpu'"),
        ("--device cpu", "--size full: the published sizes need a GPU"),
        ("--size medium", "invalid choice: 'medium'"),
        ("common --size small", "common is not a folder that this knows: choose from ERTACache4FLUX"),
    ],
)
def test_what_cannot_be_measured(arguments, words):
    with pytest.raises(bench_latency.UserError, match=r"\A[^\n]*\Z") as caught:
        bench_latency.parse_arguments(arguments.split())
    assert words in str(caught.value)


@pytest.mark.slow
def test_a_bad_argument_ends_with_one_line():
    done = script("--size", "small", "--steps", "0")
    assert done.returncode == 2 and done.stderr.startswith("error: --steps 0") and done.stderr.count("\n") == 1


# --- scripts/bench/planner.py ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_closed_form_problem_is_a_folder_like_the_others_at_any_hardness(program, tmp_path):
    """Captions, calibration prompts and prompt accuracy of the demo hold for a model with another b."""
    words = [ROOT / "scripts" / "bench" / "closed_form", "--model", "b=1", "--guidance", "1", "--steps", "12"]
    words += ["--methods", "fewer-steps,budget", "--speedups", "2", "--count", "8", "--latency-repeats", "0"]
    program("evaluate.py", *words, "--work", tmp_path / "work", "--json", tmp_path / "rows.json")
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["budget"]["model"] == "b=1" and rows["none"]["prompt_accuracy"] is not None
    assert rows["budget"]["psnr"] > rows["fewer-steps"]["psnr"] + 10


@pytest.mark.slow
def test_every_method_on_the_closed_form_problem(program, tmp_path):
    """A smooth problem, guidance 1 and wide points: plans are far above all that know less."""
    words = ["--steps", "12", "--guidances", "1", "--widths", "1", "--speedups", "2", "--efforts", "quick,normal"]
    words += ["--out", tmp_path / "out.json", "--draws"]
    program("bench/planner.py", *words, "1")
    (first,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    said = program("bench/planner.py", *words, "2")  # goes on with the second draw
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(row["draws"]) == 2 and row["draws"][0] == first["draws"][0] != row["draws"][1]
    assert (row["steps"], row["guidance"], row["width"], row["speedup"]) == (12, 1.0, 1.0, "2")
    means = {name: np.mean([draw[name]["mean"] for draw in row["draws"]]) for name in row["draws"][0]}
    rivals = {name: value for name, value in means.items() if name not in ("quick", "normal")}
    assert len(rivals) == 5 and means["normal"] >= means["quick"] - 1 > max(rivals.values())
    assert means["OSS"] >= means["fewer steps"] - 1
    lead = min(draw["quick"]["mean"] - max(draw[name]["mean"] for name in rivals) for draw in row["draws"])
    assert f"| {means['normal']:.1f} / " in said and f"| {lead:+.1f} / " in said
    assert program("bench/planner.py", *words, "2").strip() == said[said.rindex("\n\n| T ") :].strip()


# --- scripts/bench/noise.py ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plans_do_not_amplify_the_networks_noise(program):
    said = program("bench/noise.py", ROOT / "ERTACache4FLUX", "--speedups", 3, "--count", 2, "--batch-size", 2)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()[2:6]]
    found = {name: [float(text.split()[0]) for text in texts if text != "–"] for name, _, *texts in cells}
    assert list(found) == ["float32", "1 % noise", "bfloat16", "int8 activations"] and len(found["float32"]) == 2
    exact = found["float32"]
    for name in list(found)[1:]:
        plan, fewer, again = found[name]
        assert plan > min(exact[0], again) - 6 and plan > fewer + 6
        assert again != pytest.approx(exact[0], abs=0.05) and fewer == pytest.approx(exact[1], abs=3)
