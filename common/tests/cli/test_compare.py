"""`ertacache evaluate MODEL` without a plan, or with --out: the comparison with other methods, its report and JSON."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_commands import DEMO, files, pipe, plans, refused, run  # noqa: F401
from test_without_a_plan_file import Dies, dies_after, home  # noqa: F401

from conftest import ROOT, VIDEOS, open_model_folder
from ertacache.caches.registry import CACHES
from ertacache.cli.compare_files import without_paths
from ertacache.evaluation import other_methods
from ertacache.evaluation.metrics import share_below
from ertacache.evaluation.report import sections
from ertacache.evaluation.rows import Source, check_row, read_source
from helpers import CallCounter

CALL = ["--steps", 6, "--height", 64, "--width", 64, "--guidance", 3.5, "--set", "max_sequence_length=16"]
TWO = ["--prompt", "a red apple", "--prompt", "a steam train", "--batch-size", 4]
METHODS = ("budget", "fewer-steps", "fewer-steps-tuned", "oss", "first-block", "taylorseer")
LEARN = ["--calibration-prompts", "learn.txt"]
FILE_FIELDS = {
    *("kind", "schema", "model", "revision", "weights", "pipeline", "denoisers", "scheduler", "dtype", "offload"),
    *("machine", "libraries", "steps", "settings", "conditions", "batch_size", "repeats", "prompts", "seeds"),
    *("calibration_prompts", "date", "command", "rows"),
}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Four calibration prompts, three shifts, and few settings of the caches."""
    (tmp_path / "learn.txt").write_text("a sailing boat\na fruit\na house\na green pear\n")
    monkeypatch.setattr(other_methods, "SHIFTS", (0.7, 1.0, 1.4))
    for name, values in {"first-block": (0.12, 0.5), "taylorseer": (2, 4)}.items():
        monkeypatch.setitem(CACHES, name, replace(CACHES[name], values=values))


class Texts(HTMLParser):
    """The texts of a page's table cells, and its title."""

    def __init__(self, page):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_data(self, data):
        if {"td", "th", "title"} & set(self.open[-2:]):
            self.cells.append(data.strip())


@pytest.mark.slow
def test_one_command_compares_writes_a_report_and_a_file_that_can_be_sent(run, pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "here"
    lines = run("evaluate", DEMO, *TWO, *LEARN, *CALL, "--repeats", 1, "--out", out, "--json", tmp_path / "rows.json")
    text = (out / "evaluation.json").read_text()
    found = json.loads(text)
    rows = found["rows"]
    assert found.keys() == FILE_FIELDS and (found["kind"], found["schema"]) == ("ertacache evaluation", 1)
    assert (found["model"], found["pipeline"], found["dtype"]) == ("demo", "FluxPipeline", "float32")
    assert found["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler" and found["revision"] is None
    assert found["prompts"] == TWO[1:4:2] and found["seeds"] == [1000, 1001] and len(found["calibration_prompts"]) == 4
    assert found["settings"]["height"] == 64 and found["conditions"]["text_length"] == 16
    assert str(tmp_path) not in text and str(ROOT) not in text
    assert found["command"].startswith("ertacache evaluate demo --prompt 'a red apple'")
    assert "--out here --json rows.json" in found["command"]

    at = {(row["method"], row["asked"]): row for row in rows}
    assert at.keys() == {("none", None), *((name, asked) for name in METHODS for asked in (2, 3))}
    for number, row in enumerate(rows):
        check_row(row, f"row {number}")
        assert len(row["repeats_s"]) == 1 and row["end_to_end_s"] > 0 and row["flops"] > 0
    for (method, asked), row in at.items():
        if method in METHODS[:4]:
            assert row["nfe"] == 6 / asked and row["speedup_flops"] == pytest.approx(asked)
        if method != "none":
            psnrs = row["values"]["psnr"]
            assert len(psnrs) == 2 and row["psnr"] == pytest.approx(sum(psnrs) / 2)
            assert row["psnr_worst"] == min(psnrs) <= row["psnr_p10"] and 0 < row["ssim"] <= 1
            assert row["below_30db"] == share_below(np.array(psnrs))
            assert row["psnr_8bit_worst"] == min(row["values"]["psnr_8bit"])
    assert at["fewer-steps-tuned", 2]["settings"]["shift"] in (0.7, 1.0, 1.4)
    assert at["oss", 2]["family"] == "steps" and at["first-block", 2]["settings"]["value"] >= 0.12
    assert read_source(tmp_path / "rows.json").rows[1]["label"] == rows[1]["label"]

    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    texts = Texts((out / "report.html").read_text())
    assert "ERTACache evaluated on demo" in texts.cells and {row["label"] for row in rows[1:]} <= set(texts.cells)
    page = (out / "report.html").read_text()
    assert str(tmp_path) not in page and "ertacache evaluate</code>" in page and "image/png" in page
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "report.html"]
    assert lines[-1] == f"{out}/report.html: the report; {out}/evaluation.json: all numbers, to be kept or sent"
    assert not hasattr(pipe.transformer, "_diffusers_hook") or not pipe.transformer._diffusers_hook.hooks


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(run, files, monkeypatch, capsys):
    command = ["evaluate", DEMO, "--plan", files[2], *TWO, *LEARN, *CALL, "--repeats", 1, "--out", "result"]
    dies_after(monkeypatch, 3)  # the first call, uncached and with the plan
    with pytest.raises(Dies):
        run(*command)
    said = capsys.readouterr().err
    assert "comparison on FluxPipeline: 3 of 6 steps, 2 held-out prompts" in said and "results in result/" in said
    assert "about " in said and "model calls with 4 prompts each" in said and "the first call took" in said
    made = dies_after(monkeypatch, 99)
    for name in ("errors_on", "optimal_steps", "flops"):  # what was fitted is not fitted again
        monkeypatch.setattr(other_methods.OtherMethods, name, lambda *_: pytest.fail("fitted again"))
    run(*command)
    rows = json.loads(Path("result/evaluation.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", "budget", *METHODS[1:]]
    # the first call, uncached, all but the plan; then seconds, for which the plan warms up
    assert len(made) == 2 + (len(rows) - 2) + 1 + len(rows)
    assert rows[1]["label"] == files[2] and not Path("result/.ertacache").exists()


@pytest.mark.slow
def test_a_video_pipeline_whose_grid_cannot_be_shifted(run, capsys, monkeypatch):
    wan = open_model_folder("wan").sampler.FOLDER / "demo"
    call = ["--steps", 6, "--frames", 5, "--height", 32, "--width", 32, "--set", "max_sequence_length=16"]
    prompts = ["--prompt", VIDEOS[0], "--batch-size", 4, *LEARN]
    run("evaluate", wan, *prompts, *call, "--repeats", 1, "--out", "result")
    rows = json.loads(Path("result/evaluation.json").read_text())["rows"]
    assert [row["method"] for row in rows if row["asked"] == 2] == [
        "budget", "fewer-steps", "oss", "first-block", "taylorseer",
    ]  # fmt: skip
    assert sections([Source("rows", "", [{**row, "samples": None} for row in rows])])


@pytest.mark.slow
def test_without_the_packages_of_the_report_it_is_markdown(run, files, monkeypatch):
    monkeypatch.setattr("ertacache.cli.compare_files.missing_packages", lambda: ["jinja2"])
    lines = run("evaluate", DEMO, "--plan", files[2], *TWO, *LEARN, *CALL, "--repeats", 1, "--out", "result")
    assert any("jinja2 is not installed" in line for line in lines)
    assert "| OSS (3) |" in Path("result/report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*LEARN, "--out", "foreign"], "foreign/report.html is there already, and of something else: give another"),
        ([*LEARN, "--out", "other"], "other/evaluation.json is of OWNER/MODEL: give another --out"),
        ([*LEARN, "--out", "learn.txt"], "cannot write to learn.txt ("),
        (["--calibration-prompts", "none.txt"], "cannot read prompts from none.txt"),
        (
            ["--calibration-prompts", "same.txt"],
            "1 of the prompts, the first 'a red apple', are those that plans learn",
        ),
        ([*LEARN, "--plan", "plan.json"], "--calibration-prompts without --out"),
        ([*LEARN, "--set", "sigmas=[1,0.5]"], "--set sigmas fixes the steps"),
        ([*LEARN, "--set", "stride=2"], "FluxPipeline's call has no stride"),
        ([*LEARN, "--seed", -1], "seed"),
        ([*LEARN, "--set", "num_inference_steps=5"], "which 5 steps are too few for: give --steps 6 or more"),
    ],
)
def test_bad_input_is_one_line_before_anything_long(refused, files, pipe, tmp_path, words, message):
    for name, file, text in (
        ("foreign", "report.html", "mine"),
        ("other", "evaluation.json", '{"kind": "ertacache evaluation", "model": "OWNER/MODEL"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    (tmp_path / "same.txt").write_text("a fruit\na red apple\n")
    words = [files[2] if word == "plan.json" else word for word in words]
    call = CALL[2:] if "num_inference_steps=5" in words else CALL
    with CallCounter(pipe.transformer) as calls:
        assert message in refused("evaluate", DEMO, *TWO, *call, *words)
    assert calls.count == 0 and (tmp_path / "foreign" / "report.html").read_text() == "mine"
    assert not (tmp_path / "ertacache-evaluation").exists()


def test_home_directories_are_taken_out_of_texts():
    paths = {"a": "/home/jane/models/x", "b": ["C:\\Users\\jane\\x", 3, None], "c": "/Users/jane"}
    assert without_paths(paths) == {"a": "~/models/x", "b": ["~\\x", 3, None], "c": "~"}
