"""What programs under scripts/ refuse in one line, before they measure anything."""

import json
import runpy
import sys

import pytest

from conftest import ROOT
from helpers import refused

FLUX = ROOT / "ERTACache4FLUX"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("bench/census.py", "Flux --json damaged.json", "damaged.json was not written by an earlier run ("),
        ("bench/census.py", "Flux --json .", ". was not written by an earlier run ([Errno 21] Is a directory"),
        ("bench/planner.py", "--out damaged.json", "damaged.json was not written by an earlier run ("),
        ("bench/planner.py", "--out rows.json --steps 2", "--steps 2: give a whole number from 3"),
        ("bench/planner.py", "--out rows.json --steps 8 --speedups 5", "--speedups 5: at most 4 of 8 steps"),
        (
            "bench/planner.py",
            "--out quick.json --efforts thorough --draws 2",
            "--efforts thorough: quick.json has rows of quick, give",
        ),
        ("bench/planner.py", "--out half.json", "half.json was not written by an earlier run ("),
        ("bench/planner.py", "--out damaged.json/rows.json", "cannot write to damaged.json"),
        ("bench/schedulers.py", "--count 1", "--count 1: give a whole number of at least 2"),
        ("bench/schedulers.py", "--b 0", "--b 0.0: give a finite number above 0"),
        ("bench/schedulers.py", "--speedups x", "--speedups 'x' is no list of numbers"),
        ("bench/schedulers.py", "--guidance nan", "--guidance nan: give a number from 0"),
        ("bench/unets.py", "--intervals 0", "--intervals '0': give whole numbers of at least 1"),
        ("bench/strength.py", "--out damaged.json/rows.json", "cannot write to damaged.json"),
        ("bench/study.py", f"{FLUX} transfer --sizes 64x64,70x64", "--height 70: must be a multiple of 16"),
        ("bench/study.py", f"{FLUX} drift --guidances 2,nan", "--guidance nan: give a number from 0"),
        ("evaluate.py", f"{FLUX} --speedups 2 --count 3 --prompts page.md", "--count 3: the prompts are all those of"),
        ("evaluate.py", f"{FLUX} --speedups 2 --json=", "argument --json: '' is no path: give one, or leave it out"),
        ("evaluate.py", f"{FLUX} --speedups 2 --effort 4", "--effort 4: give quick, normal, thorough"),
        ("calibrate.py", f"{FLUX} --speedups 2 --effort 0", "--effort 0: give quick, normal, thorough or a number of"),
        ("bench/planner.py", "--out rows.json --efforts quick,4", "--efforts 4: give quick, normal, thorough"),
        ("report/hardness.py", "empty", "no .json file in empty: give files of rows, or"),
        ("report/remake.py", "page.md", "page.md: no table below shell commands: see --list"),
        ("report/remake.py", "page.md --only x", "page.md: no table below shell commands and such a heading: see"),
        ("report/remake.py", "binary.md", "cannot read binary.md ("),
        ("train/train_demo.py", "ERTACache4Nothing", "there is a recipe for ERTACache4FLUX"),
        ("train/train_demo.py", "ERTACache4FLUX --set vae=many", "--set vae=many: give NAME=NUMBER with a name of vae"),
        ("train/train_demo.py", "ERTACache4Wan2.1 --set distilled=3", "--set distilled=3"),
    ],
)
def test_one_line_before_any_work(program, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.json").write_text("{")
    row = {"steps": 8, "guidance": 1.0, "width": 0.1, "speedup": "2", "draws": [{"quick": {}}]}
    (tmp_path / "quick.json").write_text(json.dumps({"rows": [row]}))
    (tmp_path / "half.json").write_text('{"rows": [{"steps": 8}]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.md").write_text("# A page\n")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.iterdir())
    monkeypatch.syspath_prepend((ROOT / "scripts" / program).parent)
    monkeypatch.setattr(sys, "argv", [program, *words.split()])
    with refused(message):
        runpy.run_path(str(ROOT / "scripts" / program))["main"]()
    assert sorted(tmp_path.iterdir()) == before
