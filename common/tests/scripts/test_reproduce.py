"""The paper's numbers as data, their joining with measured rows, and the programs behind scripts/reproduce_*.sh."""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

import figures
import tables
from conftest import FOLDERS, ROOT
from ertacache import UserError
from ertacache.evaluation.methods import METHODS
from ertacache.evaluation.trajectories import on_plane, trajectory
from ertacache.utils import media
from tables import asked, fastest, join, paper, requests, table
from toy import Pipe, ToySampler

TABLES = ("table1", "table2", "table3", "table4")
SCRIPTS = sorted((ROOT / "scripts" / "reproduce").glob("*.sh"))
TOY = {
    "folder": "toy",
    "rows": [
        {"name": "Toy", "method": "none", "speedup": 1, "psnr": None},
        {"name": "Other", "method": "teacache", "speedup": Decimal("2.00"), "psnr": Decimal("20.10")},
        {"name": "Lost", "method": "pab", "speedup": Decimal("1.5"), "psnr": Decimal("9.0")},
        {"name": "Slow", "method": "ertacache", "lambda": Decimal("0.1"), "speedup": 2, "psnr": Decimal("30.0")},
        {"name": "Fast", "method": "ertacache", "lambda": Decimal("0.3"), "speedup": 3, "psnr": Decimal("25.0")},
    ],
}


def measured(method, asked=None, threshold=None, **values):
    settings = {} if threshold is None else {"threshold": threshold}
    return {"method": method, "label": method, "asked": asked, "settings": settings, "speedup_nfe": 2.0, **values}


def cells(rows):
    lines = table(["speedup", "vbench", "psnr"], join(TOY, rows)).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_measured_and_printed_numbers_never_share_a_column():
    rows = [measured("none"), measured("teacache", 2.0, speedup_end_to_end=1.874, psnr=40.0)]
    tail = {"psnr_p10": 52.5, "psnr_worst": 41.25, "below_30db": 0.0625}
    rows += [measured("ertacache", 3.0, psnr=33.333), measured("budget", 2.0, psnr=60.0, **tail)]
    head, _, *body = cells(rows)
    assert head[:5] == ["method", "measured as", "speed-up", "speed-up, paper", "VBench (%), paper"]
    extra = ["10th percentile (dB)", "worst (dB)", "below 30 dB", "T/NFE"]
    assert head[5:] == ["PSNR (dB)", "PSNR (dB), paper", *extra]
    none = ["–", "–", "–"]
    assert body == [
        ["Toy", "none", "–", "1×", "–", "–", "–", *none, "2.00×"],
        ["Other", "teacache", "1.87×", "2.00×", "–", "40.00", "20.10", *none, "2.00×"],
        ["Lost", "–", "–", "1.5×", "–", "–", "9.0", *none, "–"],
        ["Slow", "–", "–", "2×", "–", "–", "30.0", *none, "–"],
        ["Fast", "ertacache", "–", "3×", "–", "33.33", "25.0", *none, "2.00×"],
        ["not in the paper", "budget", "–", "–", "–", "60.00", "–", "52.50", "41.25", "0.06", "2.00×"],
    ]


def test_rows_that_came_from_a_threshold_are_joined_by_it():
    _, _, *body = cells(
        [measured("ertacache", threshold=0.3, psnr=1.0), measured("ertacache", threshold=0.2, psnr=2.0)]
    )
    assert [row[0] for row in body if row[5] != "–"] == ["Fast", "not in the paper"]


def test_the_parts_of_the_ablation_find_their_rows():
    (wan, _), names = paper("table3")["models"], ["uniform", "policy", "policy + time (velocity)"]
    names += ["policy + time (difference)", "policy + rectification", "policy + time (velocity) + rectification"]
    pairs = join(wan, [measured(name, 2.17) for name in names])
    found = [(printed and printed["name"], row["method"]) for printed, row in pairs]
    assert found == [
        ("Uniform Cache", "uniform"),
        ("Offline Policy", "policy"),
        ("+ Time Adjustment", "policy + time (velocity)"),
        ("+ Time Adjustment", "policy + time (difference)"),
        ("+ Error Rectification", "policy + time (velocity) + rectification"),
        (None, "policy + rectification"),
    ]


def test_what_evaluate_is_asked_for():
    assert requests(TOY, full=False, extra=["budget"]) == [
        ("teacache", "--speedups", "2.00"),
        ("pab", "--speedups", "1.5"),
        ("ertacache,budget", "--speedups", "2,3"),
    ]
    full = requests(TOY, full=True, extra=["budget"])
    assert ("ertacache", "--thresholds", "0.1,0.3") in full and ("budget", "--speedups", "2,3") in full


@pytest.mark.parametrize(("name", "count"), [("table1", 22), ("table2", 3), ("table3", 8), ("table4", 8)])
def test_the_data_of_the_paper(name, count):
    printed = paper(name)
    assert sum(len(model["rows"]) for model in printed["models"]) == count and printed["table"] == int(name[-1])
    for model in printed["models"]:
        assert model["folder"] in FOLDERS
        columns = model.get("columns") or printed["columns"]
        assert all(set(row) & set(columns) for row in model["rows"])
        for row in (asked(model, row) for row in model["rows"]):
            assert row["method"] in METHODS
            assert all(0 < row[key] < 1 for key in ("ssim", "lpips", "clip", "lambda") if row.get(key) is not None)
            if "latency_s" in row and "speedup" in columns:  # a speed-up is a ratio of latencies, as printed
                ratio = model["rows"][0]["latency_s"] / row["latency_s"]
                assert float(ratio) == pytest.approx(float(row["speedup"]), abs=0.011)


def test_what_the_paper_prints_in_two_places_is_the_same():
    (_, _, wan), (flux,), ablations = (paper(name)["models"] for name in TABLES[:3])
    for model, ablation in zip((wan, flux), ablations, strict=True):
        ours, whole = model["rows"][-1], ablation["rows"][-1]
        for key in ("vbench", "clip", "lpips", "ssim", "psnr"):
            if key in whole:
                assert float(ours[key]) == pytest.approx(float(whole[key]), abs=0.005)
    (opensora, *_), (_, cost) = paper("table1")["models"], paper("table4")["models"]
    assert [cost["rows"][i]["latency_s"] for i in (0, 1, 3)] == [opensora["rows"][i]["latency_s"] for i in (0, 6, 8)]
    assert str(fastest("ERTACache4FLUX", "ertacache")["psnr"]) == "20.5146"


def test_trajectories_in_the_plane():
    start, along, across = np.array([1.0, 2, 3]), np.array([4.0, 0, 0]), np.array([0, 0, 2.0])
    paths = {"uncached": np.stack([start, start + along]), "policy": np.stack([start, start + along / 2 + across])}
    found = on_plane(paths)
    assert np.allclose(found["uncached"], [[0, 0], [1, 0]]) and np.allclose(found["policy"], [[0, 0], [0.5, 0.5]])


def test_a_trajectory_is_the_run():
    sampler, pipe = ToySampler(), Pipe(np.eye(3))
    inputs = sampler.prepare(pipe, ["a"], [0], steps=4)
    path = trajectory(sampler, pipe, inputs)
    wanted = sampler.denoise(pipe, inputs)[0].flatten().numpy()
    assert path.shape == (5, wanted.size) and np.array_equal(path[-1], wanted)


@pytest.mark.slow
def test_first_and_last_frame(tmp_path):
    """Of a video whose frames go from black to white: black on the left, white on the right."""
    media.save_mp4(tmp_path / "a.mp4", np.linspace(0, 1, 9)[:, None, None, None] * np.ones((1, 64, 64, 3)), 8)
    found = figures.first_and_last(tmp_path / "a.mp4")
    assert found.shape == (64, 64 + figures.GAP + 64, 3)
    assert found[:, :60].max() < 0.1 and found[:, 72:].min() > 0.9


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_figure_2_of_the_demo(tmp_path):
    prompts = tmp_path / "calibration.txt"
    prompts.write_text("a red apple\na steam train\n")
    arguments = ["--calibration-prompts", str(prompts), "--prompts", str(prompts), "--seed", "0", "--batch-size", "1"]
    arguments += ["--count", "2", "--steps", "6", "--speedup", "2"]
    done = run("reproduce/figures.py", "figure2", *arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "figure2a.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["step"]) for row in rows] == [(p, str(i)) for p in "01" for i in range(1, 6)]
    assert all(0.001 < float(row[name]) < 2 for row in rows for name in ("residual", "output"))
    expected, found = (np.array([float(row[name]) for row in rows]) for name in ("teacache", "output"))
    assert expected.mean() == pytest.approx(found.mean(), rel=1e-3)  # least squares on these very runs
    assert np.square(expected - found).sum() < np.square(found - found.mean()).sum()

    plane = json.loads((tmp_path / "out" / "figure2b.json").read_text())
    ends = {row["run"]: (row["along"], row["across"]) for row in plane["rows"] if row["step"] == 6}
    assert ends["uncached"] == pytest.approx((1, 0), abs=1e-4) and ends["policy"][1] > 0
    apart = plane["relative ℓ2 distance at the end"]
    assert apart["uncached"] == 0 < apart["policy"] < 0.5 and plane["computed"]["policy"] < 6
    for name in ("figure2a.png", "figure2b.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (tables, "table7", "invalid choice: 'table7'"),
        (tables, "table1 --folders ERTACache4Sora", "--folders ERTACache4Sora: choose from"),
        (tables, "table2 --folders ERTACache4Wan2.1", "--folders ERTACache4Wan2.1: table2 is about ERTACache4FLUX"),
        (tables, "table1 --model random", "no images, so no table1: use demo or full"),
        (tables, "table2 --prompts nowhere.txt", "cannot read prompts from nowhere.txt"),
        (tables, "table4 --model full", "--model full needs --prompts FILE"),
        (tables, "table2 --extra magic", "--extra magic: choose from"),
        (tables, "table2 --checkpoints there", "--checkpoints there is of --model full: leave it out"),
        (
            tables,
            "table2 --model full --prompts two.txt --checkpoints there --folders ERTACache4FLUX",
            "no FLUX.1-dev in",
        ),
        (figures, "figure5 --counts 2,two", "'2,two' is no list of numbers"),
        (figures, "figure5 --counts 0", "--counts '0': give whole numbers of at least 1"),
        (figures, "figure5 --counts 3 --calibration-prompts two.txt", "two.txt has 2 prompts"),
        (figures, "figure5 --model full --prompts two.txt", "needs --calibration-prompts FILE"),
        (figures, "figure2 --speedup 0.5", "a speed-up is a number of at least 1"),
    ],
)
def test_what_cannot_be_reproduced(script, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    monkeypatch.setattr(sys, "argv", ["program", *arguments.split(), "--out", "out"])
    with pytest.raises(UserError) as refused:
        script.main()
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "what", "lines"),
    [
        (figures, "figure2", 1),
        (figures, "figure3", 2),
        (figures, "figure5", 2),
        (tables, "table2", 2),
        (tables, "table3", 1),
        (tables, "table4", 2),
    ],
)
def test_a_dry_run_says_how_many_rows_steps_and_hours(script, what, lines, tmp_path, monkeypatch, capsys):
    """The scripts that measure, which are processes of their own, are run in this one."""

    def main_of(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(ROOT / "scripts" / name))["main"]()

    monkeypatch.setattr(tables, "run", main_of)
    words = ["--folders", "ERTACache4FLUX"] if what != "table4" else []
    words += ["--count", "2", "--counts", "2,4"] if script is figures else ["--extra", ""]
    arguments = [what, *words, "--dry-run", "--step-seconds", "7", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
    script.main()
    said = capsys.readouterr().out.splitlines()
    pattern = r"ERTACache4\S+?(, figure 2)?: about \d+ rows, \d+ prompts?, \d+ steps, \d+\.\d hours; .* on top"
    assert len(said) == lines and all(re.fullmatch(pattern, line) for line in said), said
    assert what != "table3" or "about 8 rows" in said[0]  # the uncached run and seven parts of a threshold plan
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".txt"]  # those are the prompts of figure 5


def test_what_a_measuring_script_prints_is_the_result_of_a_dry_run_alone(monkeypatch):
    outputs = []
    done = Namespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda command, stdout: outputs.append(stdout) or done)
    tables.run("evaluate.py", "--dry-run")
    tables.run("evaluate.py")
    assert outputs == [None, sys.stderr]


@pytest.mark.slow
def test_the_exit_code_of_the_script_that_measures_is_ours(tmp_path):
    done = run("reproduce/tables.py", "table2", "--latency-repeats", "-1", "--out", str(tmp_path))
    command, said = done.stderr.splitlines()
    assert done.returncode == 2 and command.startswith("$ evaluate.py") and said.startswith("error: --latency-repeats")


def test_checkpoints_in_a_folder_have_their_names_on_the_hub():
    args = Namespace(model="full", prompts=None, checkpoints=Path("/models"))
    assert tables.folder_flags(args, "ERTACache4FLUX")[:2] == ["--model", "/models/FLUX.1-dev"]
    args.checkpoints = None
    assert tables.folder_flags(args, "ERTACache4FLUX")[:2] == ["--model", "black-forest-labs/FLUX.1-dev"]


def test_there_is_a_script_for_each_table_and_figure():
    names = [*TABLES, "figure2", "figure3", "figure5"]
    assert {path.stem for path in SCRIPTS} == set(names)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_real_checkpoints_need_prompts(path, tmp_path):
    """Said before anything is set up."""
    assert subprocess.run(["sh", "-n", str(path)]).returncode == 0 and len(path.read_text().splitlines()) <= 25
    environment = {**os.environ, "MODEL": "full", "PROMPTS": "", "OUT": str(tmp_path / "out")}
    done = subprocess.run(["sh", str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: MODEL=full needs PROMPTS=FILE\n"
    assert not (tmp_path / "out").exists()
