"""Plans: exact round trip, refusals that name both values and the remedy, damaged files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import FOLDERS, ROOT
from ertacache import BudgetPlan, Plan, PlanError, PlanSet, Requirements, ThresholdPlan
from helpers import no_warning, refused

REQUIREMENTS = Requirements(
    steps=5,
    model={"class": "FluxTransformer2DModel", "num_layers": 19, "guidance_embeds": True},
    scheduler={"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    settings={"guidance": 3.5, "height": 64, "width": 64, "dtype": "float32"},
)
PLAN = ThresholdPlan(
    requirements=REQUIREMENTS,
    threshold=0.1,
    cached=(1, 3),
    site="blocks",
    native_sigmas=tuple(np.linspace(1, 0, 6).astype(np.float32).tolist()),
    phi_definition="velocity",
    phi=(1.0, 0.3, 1.0, 0.7, 1.0),
    rectified=True,
    k=(0.0, 0.1, 0.0, 1 / 3, 0.0),
    b=(-2.0, -1.9, -2.0, -2.2, -2.0),
    provenance={"model": "demo", "seeds": [0, 1]},
)


def test_round_trip_is_exact(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    loaded = ThresholdPlan.load(path)
    assert loaded == PLAN
    assert ThresholdPlan.load(path.with_suffix(".safetensors")) == PLAN
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]


def test_a_path_that_no_plan_can_have_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    for save in (PLAN.save, PlanSet({2.5: PLAN}).save):
        for path, words in (
            (5, "path = 5: give a path"),
            (None, "path = None: give a path"),
            ("", "path = '': give a path"),
            ("plan.txt", "path = 'plan.txt': give a name that ends with .json"),
            ("folder.json", "cannot write to folder.json, which is a folder"),
        ):
            with refused(words):
                save(path)
    for read in (Plan.load, PlanSet.load, Plan.from_pretrained, PLAN.save_pretrained):
        for path in (5, None, ""):
            with refused(f"= {path!r}: give a path"):
                read(path)
    with refused("plans = 5: give {speed-up: plan}"):
        PlanSet(5)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


SHIPPED = [path for folder in FOLDERS for path in sorted((ROOT / folder / "cache").glob("*.json"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parents[1].name}/{path.stem}")
def test_shipped_files_load_and_are_saved_again_byte_for_byte(path, tmp_path):
    saved = Plan.load(path).save(tmp_path / path.name)
    for suffix in (".json", ".safetensors"):
        assert saved.with_suffix(suffix).read_bytes() == path.with_suffix(suffix).read_bytes()


def test_every_model_folder_ships_both_kinds_of_plan():
    kinds = {(path.parents[1].name, Plan.load(path).kind) for path in SHIPPED}
    assert kinds == {(folder, kind) for folder in FOLDERS for kind in ("budget", "threshold")}


def test_the_json_is_readable(tmp_path):
    fields = json.loads(PLAN.save(tmp_path / "plan.json").read_text("utf-8"))
    assert (fields["format"], fields["version"], fields["kind"]) == ("ertacache-plan", 1, "threshold")
    assert (fields["threshold"], fields["steps"], fields["nfe"], fields["cached"]) == (0.1, 5, 3, [1, 3])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": 0.0}, ("threshold 0.0", "above 0")),
        ({"threshold": float("nan")}, ("threshold = nan", "finite")),
        ({"cached": (0, 3)}, ("[0, 3]", "1 … 3")),
        ({"cached": (1, 4)}, ("[1, 4]", "1 … 3")),
        ({"cached": (3, 1)}, ("[3, 1]", "ascend")),
        ({"site": "middle"}, ("'middle'", "output", "blocks")),
        ({"phi_definition": "best"}, ("'best'", "velocity")),
        ({"phi": (1.0, 1.3, 1.0, 0.7, 1.0)}, ("phi", "[0, 1]")),
        ({"phi": (1.0, 0.3, 0.9, 0.7, 1.0)}, ("phi", "1 on computed steps")),
        ({"k": (0.0, 0.1)}, ("k must", "finite", "[5]")),
        ({"b": (0.0, 0.1, 0.0, float("inf"), 0.0)}, ("b must", "finite", "[5]")),
        ({"native_sigmas": (1.0, 0.8, 0.6, 0.6, 0.4, 0.0)}, ("native_sigmas", "step 2 leads from 0.6 to 0.6")),
        ({"native_sigmas": (1.0, 0.8, 0.4, 0.6, 0.2, 0.0)}, ("native_sigmas", "step 2 leads from 0.4 to 0.6")),
        ({"requirements": replace(REQUIREMENTS, steps=2)}, ("steps = 2", "from 3 to 1000")),
    ],
)
def test_a_plan_that_makes_no_sense_is_not_built(changes, words):
    with refused("not a valid plan", *words, error=PlanError):
        replace(PLAN, **changes)


REMEDY = "calibrate one with --threshold 0.1"


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (replace(REQUIREMENTS, steps=50), ("5 steps", "50")),
        (replace(REQUIREMENTS, scheduler={**REQUIREMENTS.scheduler, "shift": 1.0}), ("shift 3.0", "1.0", "scheduler")),
        (replace(REQUIREMENTS, scheduler={"class": "UniPC", "shift": 3.0}), ("FlowMatchEuler", "UniPC")),
        (replace(REQUIREMENTS, model={**REQUIREMENTS.model, "num_layers": 2}), ("num_layers 19", "2", "model")),
    ],
)
def test_another_run_is_refused_naming_both_values_and_the_remedy(run, words):
    with refused(*words, REMEDY, error=PlanError):
        PLAN.check(run, REMEDY)


def test_other_settings_are_one_warning_that_names_both_values():
    run = replace(REQUIREMENTS, settings={**REQUIREMENTS.settings, "guidance": 5.0, "height": 128})
    with pytest.warns(UserWarning) as caught:
        PLAN.check(run, REMEDY)
    assert len(caught) == 1
    for word in ("guidance 3.5, now 5.0", "height 64, now 128", REMEDY):
        assert word in str(caught[0].message)


def test_the_same_run_and_keys_of_newer_libraries_pass_silently():
    newer = replace(REQUIREMENTS, scheduler={**REQUIREMENTS.scheduler, "added_in_a_later_release": 7})
    with no_warning():
        PLAN.check(REQUIREMENTS, REMEDY)
        PLAN.check(newer, REMEDY)


def test_damaged_files_are_named(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    whole, arrays = path.read_text("utf-8"), path.with_suffix(".safetensors").read_bytes()

    def is_refused(*words):
        with refused(path, *words, error=PlanError):
            ThresholdPlan.load(path)

    path.write_text(whole[: len(whole) // 2], "utf-8")
    is_refused("truncated", "copy it again")
    path.write_text(whole.replace('"threshold": 0.1', '"threshold": 0.2'), "utf-8")
    is_refused("edited", "copy it again")
    path.write_text(whole.replace('"version": 1', '"version": 9'), "utf-8")
    is_refused("version 9", "upgrade")
    path.write_text("[1, 2]", "utf-8")
    is_refused("not an ERTACache plan")
    path.write_text(whole, "utf-8")
    path.with_suffix(".safetensors").write_bytes(arrays[:-8])
    is_refused("truncated", "copy it again")
    path.with_suffix(".safetensors").write_bytes(arrays[:-8] + b"\1" * 8)
    is_refused("edited", "copy it again")
    path.with_suffix(".safetensors").unlink()
    with refused(path.with_suffix(".safetensors"), "calibrate one", error=PlanError):
        ThresholdPlan.load(path)


def test_an_interrupted_save_leaves_the_old_plan_or_none(tmp_path, monkeypatch):
    path = PLAN.save(tmp_path / "plan.json")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with refused(path.with_suffix(".safetensors"), "No space left", "another folder"):
        replace(PLAN, threshold=0.3).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and ThresholdPlan.load(path) == PLAN
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("seed", range(20))
def test_a_grid_of_its_own_moves_the_noise_levels_of_computed_steps_only(seed):
    """On any native grid: they fall, the computed ones are the plan's own, and there are as many as before."""
    rng = np.random.default_rng(seed)
    steps, own = 12, 24
    native = np.append(np.sort(rng.uniform(0.01, 1, steps))[::-1], 0.0)
    grid = np.linspace(native[0], 0.0, own + 1)
    computed = (0, *sorted(rng.choice(np.arange(1, own), rng.integers(1, steps), replace=False).tolist()))
    rows = ((0.1,),) * len(computed)
    requirements = Requirements(steps, {}, {})
    plan = BudgetPlan(requirements, computed, rows, tuple(native.tolist()), "exact", tuple(grid.tolist()))
    levels, places = plan.on(torch.tensor(native))
    assert len(levels) == steps + 1 and torch.all(levels.diff() < 0) and places[0] == 0
    assert np.allclose(levels[list(places)], grid[list(computed)])
    others = [i for i in range(steps) if i not in places]
    assert np.array_equal(levels[others], native[others])
    assert plan.calibrated_levels() == levels.tolist()
