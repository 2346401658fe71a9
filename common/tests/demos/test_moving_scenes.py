"""Moving scenes: captions, drawing, and an oracle that reads exactly what was drawn and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from ertacache.demos import moving_scenes


def test_captions_parse_back_and_hold_out_one_in_ten():
    scenes = moving_scenes.all_scenes()
    assert len(scenes) == 1792 and len({s.caption() for s in scenes}) == 1792
    assert all(moving_scenes.parse(s.caption()) == s for s in scenes)
    assert 0.08 < np.mean([moving_scenes.is_held_out(s) for s in scenes]) < 0.12
    rng = np.random.default_rng(0)
    for scene in scenes[::50]:
        loose = moving_scenes.loosen(scene, rng, 0.5)
        assert moving_scenes.parse(loose.caption()) == loose


@pytest.mark.parametrize(
    "text", ["a red sphere moving left", "a video of a cat", "", "red moving", "a red circle on fire"]
)
def test_other_text_is_no_caption(text):
    assert moving_scenes.parse(text) is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [(17, 64, 64), (9, 48, 80), (33, 128, 128)])
def test_the_oracle_reads_what_was_drawn(size):
    rng = np.random.default_rng(1)
    for scene in moving_scenes.sample_scenes(40, seed=2):
        assert moving_scenes.read(moving_scenes.render(scene, rng, *size)) == scene


@pytest.mark.slow
def test_the_oracle_sees_through_noise_and_a_blink():
    rng = np.random.default_rng(1)
    for scene in moving_scenes.sample_scenes(20, seed=3):
        video = moving_scenes.render(scene, rng)
        noisy = np.clip(video + rng.normal(0, 15, video.shape), 0, 255).astype(np.uint8)
        assert moving_scenes.read(noisy) == scene


def test_the_oracle_notices_each_wrong_attribute():
    rng = np.random.default_rng(4)
    scene = moving_scenes.MovingScene("red", "cross", "left", "slowly", "blue")
    others = {"colour": "green", "shape": "circle", "direction": "up", "speed": "quickly", "ground": "white"}
    for name, value in others.items():
        video = moving_scenes.render(replace(scene, **{name: value}), rng)
        assert [n for n, right in moving_scenes.agreement(scene, video).items() if not right] == [name]
    backwards = moving_scenes.render(scene, rng)[::-1]
    assert moving_scenes.read(backwards) == replace(scene, direction="right")


def test_a_video_without_a_moving_shape_is_nothing():
    rng = np.random.default_rng(5)
    still = moving_scenes.render(moving_scenes.MovingScene("red", "cross", "left", "slowly", "blue"), rng)[[0] * 17]
    empty = np.full((17, 64, 64, 3), 200, np.uint8)
    vanishing = moving_scenes.render(moving_scenes.MovingScene("red", "cross", "left", "slowly", "blue"), rng)
    vanishing[9] = vanishing[0, 0, 0]
    assert (
        moving_scenes.read(still) is None
        and moving_scenes.read(empty) is None
        and moving_scenes.read(vanishing) is None
    )


def test_prompt_accuracy_is_a_share_or_nothing():
    rng = np.random.default_rng(6)
    scenes = moving_scenes.sample_scenes(4, seed=7)
    videos = [moving_scenes.render(s, rng) for s in scenes]
    captions = [s.caption() for s in scenes]
    assert moving_scenes.prompt_accuracy(captions, videos) == 1.0
    assert moving_scenes.prompt_accuracy(captions, videos[::-1]) < 1.0
    assert moving_scenes.prompt_accuracy(["a cat", *captions[1:]], videos) is None


def test_open_captions_leave_something_open_and_nothing_else():
    full, loose = (moving_scenes.sample_captions(64, 5, True, leave_open) for leave_open in (False, True))
    for caption, same in zip(full, loose, strict=True):
        scene, left = moving_scenes.parse(caption), vars(moving_scenes.parse(same))
        assert moving_scenes.is_held_out(scene) and None in left.values() and None not in vars(scene).values()
        assert all(value in (None, getattr(scene, name)) for name, value in left.items())
        assert left["colour"] and left["shape"]
