"""Plans: exact round trip, refusals that name both values and the remedy, damaged files."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

from ertacache import Conditions, PlanError, ThresholdPlan

CONDITIONS = Conditions(
    steps=5,
    model={"class": "FluxTransformer2DModel", "num_layers": 19, "guidance_embeds": True},
    scheduler={"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    settings={"guidance": 3.5, "height": 64, "width": 64, "dtype": "float32"},
)
PLAN = ThresholdPlan(
    conditions=CONDITIONS,
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


def test_the_json_says_what_a_person_wants_to_know(tmp_path):
    fields = json.loads(PLAN.save(tmp_path / "plan.json").read_text("utf-8"))
    assert (fields["format"], fields["version"], fields["kind"]) == ("ertacache-plan", 1, "threshold")
    assert (fields["threshold"], fields["steps"], fields["nfe"], fields["cached"]) == (0.1, 5, 3, [1, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.0}, "λ = 0.0"),
        ({"threshold": float("nan")}, "λ = nan"),
        ({"cached": (0, 3)}, r"cached steps \[0, 3\]"),
        ({"cached": (1, 4)}, "cached steps"),
        ({"cached": (3, 1)}, "cached steps"),
        ({"site": "middle"}, "site = 'middle'"),
        ({"phi_definition": "best"}, "phi_definition = 'best'"),
        ({"phi": (1.0, 1.3, 1.0, 0.7, 1.0)}, "phi must be"),
        ({"phi": (1.0, 0.3, 0.9, 0.7, 1.0)}, "1 on computed steps"),
        ({"k": (0.0, 0.1)}, "k must hold 5"),
        ({"b": (0.0, 0.1, 0.0, float("inf"), 0.0)}, "b must hold 5 finite"),
        ({"native_sigmas": (1.0, 0.8, 0.6, 0.6, 0.2, 0.0)}, "native_sigmas must fall"),
        ({"conditions": replace(CONDITIONS, steps=2)}, "steps = 2"),
    ],
)
def test_a_plan_that_makes_no_sense_is_not_built(changes, message):
    with pytest.raises(PlanError, match=message):
        replace(PLAN, **changes)


REMEDY = "calibrate one with --threshold 0.1"


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (replace(CONDITIONS, steps=50), ("5 steps", "50")),
        (replace(CONDITIONS, scheduler={**CONDITIONS.scheduler, "shift": 1.0}), ("shift 3.0", "1.0", "scheduler")),
        (replace(CONDITIONS, scheduler={"class": "UniPC", "shift": 3.0}), ("FlowMatchEuler", "UniPC")),
        (replace(CONDITIONS, model={**CONDITIONS.model, "num_layers": 2}), ("num_layers 19", "2", "model")),
    ],
)
def test_another_run_is_refused_naming_both_values_and_the_remedy(run, words):
    with pytest.raises(PlanError) as error:
        PLAN.check(run, REMEDY)
    for word in (*words, REMEDY):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_other_settings_are_one_warning_that_names_both_values():
    run = replace(CONDITIONS, settings={**CONDITIONS.settings, "guidance": 5.0, "height": 128})
    with pytest.warns(UserWarning) as caught:
        PLAN.check(run, REMEDY)
    assert len(caught) == 1
    for word in ("guidance 3.5, now 5.0", "height 64, now 128", REMEDY):
        assert word in str(caught[0].message)


def test_the_same_run_and_keys_of_newer_libraries_pass_silently():
    newer = replace(CONDITIONS, scheduler={**CONDITIONS.scheduler, "added_in_a_later_release": 7})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PLAN.check(CONDITIONS, REMEDY)
        PLAN.check(newer, REMEDY)


def test_damaged_files_are_named(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    whole, arrays = path.read_text("utf-8"), path.with_suffix(".safetensors").read_bytes()

    def refused(match):
        with pytest.raises(PlanError, match=match) as error:
            ThresholdPlan.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    path.write_text(whole[: len(whole) // 2], "utf-8")
    refused("truncated")
    path.write_text(whole.replace('"threshold": 0.1', '"threshold": 0.2'), "utf-8")
    refused("edited")
    path.write_text(whole.replace('"version": 1', '"version": 9'), "utf-8")
    refused("version 9")
    path.write_text("[1, 2]", "utf-8")
    refused("not an ERTACache plan")
    path.write_text(whole, "utf-8")
    path.with_suffix(".safetensors").write_bytes(arrays[:-8])
    refused("truncated")
    path.with_suffix(".safetensors").write_bytes(arrays[:-8] + b"\1" * 8)
    refused("edited")
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(PlanError, match=r"no plan file .*plan\.safetensors"):
        ThresholdPlan.load(path)


def test_an_interrupted_save_leaves_the_old_plan_or_none(tmp_path, monkeypatch):
    path = PLAN.save(tmp_path / "plan.json")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(ValueError, match="No space left"):
        replace(PLAN, threshold=0.3).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and ThresholdPlan.load(path) == PLAN
    assert len(list(tmp_path.iterdir())) == 2
