"""The oracle reads back exactly what was drawn."""

import numpy as np
import pytest

from ertacache.demos import scenes


@pytest.mark.slow
def test_every_drawn_scene_is_read_back():
    rng = np.random.default_rng(0)
    for scene in scenes.sample_scenes(600, seed=1):
        assert scenes.read(scenes.render(scene, rng)) == scene


@pytest.mark.slow
def test_other_image_sizes_are_read_too():
    rng = np.random.default_rng(0)
    asked = scenes.sample_scenes(100, seed=2)
    right = [scenes.read(scenes.render(scene, rng, 128, 128)) == scene for scene in asked]
    assert np.mean(right) >= 0.98


def test_noise_and_blank_images_show_nothing_or_something_else():
    asked = ["a big red star at the left on a plain white background"]
    blank = np.full((64, 64, 3), 240, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert scenes.read(blank) is None
    assert scenes.prompt_accuracy(asked, [blank]) == 0.0
    assert scenes.prompt_accuracy(asked, [noise]) == 0.0


def test_each_wrong_attribute_is_seen():
    rng = np.random.default_rng(0)
    asked = scenes.Scene("big", "red", "star", "at the left", "plain", "white")
    others = {"size": "small", "colour": "blue", "shape": "ring", "position": "at the top", "ground": "teal"}
    for name, value in {**others, "texture": "striped"}.items():
        shown = scenes.Scene(**{**vars(asked), name: value})
        verdict = scenes.agreement(asked, scenes.render(shown, rng))
        assert [n for n, right in verdict.items() if not right] == [name]


def test_captions_are_parsed_back_and_other_texts_are_not():
    rng = np.random.default_rng(0)
    for scene in scenes.all_scenes()[::7]:
        loose = scenes.loosen(scene, rng, 0.5)
        assert scenes.parse(scene.caption()) == scene and scenes.parse(loose.caption()) == loose
    for text in ("", "a cat", "a big star", "a photo of a red star", "red"):
        assert scenes.parse(text) is None
    assert scenes.prompt_accuracy(["a photo of a cat"], [np.zeros((64, 64, 3), np.uint8)]) is None


def test_held_out_scenes_are_a_fixed_tenth_and_never_sampled_for_training():
    held_out = [s for s in scenes.all_scenes() if scenes.is_held_out(s)]
    assert len(scenes.all_scenes()) == 10080 and len(held_out) == 998
    assert not set(scenes.sample_scenes(5000, seed=0)) & set(held_out)
    assert set(scenes.sample_scenes(200, seed=0, held_out=True)) <= set(held_out)


def test_shipped_prompts_keep_calibration_and_evaluation_apart(flux):
    from ertacache.utils.files import read_prompts

    calibration = [scenes.parse(p) for p in read_prompts(flux.FOLDER / "prompts" / "calibration-demo.txt")]
    shown = [scenes.parse(p) for p in read_prompts(flux.FOLDER / "prompts" / "demo.txt")]
    assert not any(scenes.is_held_out(s) for s in calibration) and all(scenes.is_held_out(s) for s in shown)


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_articles(colour):
    assert scenes.Scene(None, colour, "ring", None, None, None).caption() == (
        f"an {colour} ring" if colour == "orange" else f"a {colour} ring"
    )
