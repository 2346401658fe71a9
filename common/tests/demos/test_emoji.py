"""Captions of the FLUX demo, and retrieval accuracy: the nearest picture in the VAE's latent space."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ertacache.demos import emoji
from ertacache.utils.files import read_prompts
from ertacache.utils.media import to_uint8
from helpers import refused


@pytest.fixture(scope="module")
def references(flux):
    return load_file(flux.FOLDER / "demo" / emoji.REFERENCES)["latents"]


@pytest.fixture(scope="module")
def pictures(demo, references):
    """A picture of every emoji: the decoded references."""
    with torch.no_grad():
        decoded = demo.vae.decode(references.float()).sample / 2 + 0.5
    return list(to_uint8(decoded.clamp(0, 1).permute(0, 2, 3, 1).numpy()))


def test_every_emoji_has_one_caption_and_a_file():
    captions = [e.caption for e in emoji.all_emoji()]
    assert 400 <= len(captions) <= 700 and len(set(captions)) == len(captions)
    assert len({e.file for e in emoji.all_emoji()}) == len(captions)
    assert not set(captions) & {e.kind for e in emoji.all_emoji()}


def test_articles_are_right():
    for subject in emoji.answers():
        article, _, rest = subject.partition(" ")
        vowel = rest.startswith((*"aeiou", "hour")) and not rest.startswith("unicorn")
        assert article not in ("a", "an") or (article == "an") == vowel, subject


def test_captions_are_parsed_and_other_texts_are_not():
    for subject, indices in emoji.answers().items():
        for phrase in emoji.PHRASES:
            assert emoji.parse(phrase.format(subject)) == indices
    apple = next(i for i, e in enumerate(emoji.all_emoji()) if e.caption == "a red apple")
    assert emoji.parse("A red  apple") == emoji.parse("red apple") == (apple,)
    assert apple in emoji.parse("a fruit") and len(emoji.parse("a picture of a fruit")) > 10
    assert emoji.parse("a red lighthouse") is None and emoji.parse("") is None


@pytest.mark.parametrize("leave_open", [False, True])
def test_captions_for_plans_and_for_measuring_are_kept_apart(leave_open):
    samples = [emoji.sample_captions(64, 3, held_out, leave_open) for held_out in (False, True)]
    assert not set(samples[0]) & set(samples[1])
    for texts in samples:
        assert all((len(emoji.parse(text)) > 1) == leave_open for text in texts)
        assert len(set(texts)) >= (64 if not leave_open else 40)
    assert samples[0] == emoji.sample_captions(64, 3, False, leave_open)


def test_shipped_prompts_keep_calibration_and_evaluation_apart(flux):
    calibration = read_prompts(flux.FOLDER / "prompts" / "calibration-demo.txt")
    shown = read_prompts(flux.FOLDER / "prompts" / "demo.txt")
    assert all(map(emoji.parse, [*calibration, *shown]))
    assert not any(map(emoji.is_held_out, calibration)) and all(map(emoji.is_held_out, shown))
    assert any(len(emoji.parse(p)) > 1 for p in calibration) and any(len(emoji.parse(p)) > 1 for p in shown)


def test_place_and_size_do_not_matter():
    def drawn(side, left, top):
        image = np.full((64, 64, 3), 255, np.uint8)
        image[top : top + side, left : left + side] = 40
        image[top : top + side // 2, left : left + side // 2] = (200, 30, 30)
        return image

    middle = emoji.centred(drawn(40, 12, 12)).astype(float)
    for other in (drawn(40, 3, 20), drawn(20, 44, 0), drawn(60, 2, 2)):
        assert np.abs(emoji.centred(other) - middle).mean() < 6
    assert (emoji.centred(np.full((64, 64, 3), 255, np.uint8)) == 255).all()


def test_each_picture_shows_itself_and_no_other(demo, references, pictures):
    found = emoji.shown(demo.vae, references, pictures)
    assert np.mean(np.array(found) == np.arange(len(pictures))) > 0.98
    horse = next(i for i, e in enumerate(emoji.all_emoji()) if e.caption == "a horse")
    assert emoji.shown(demo.vae, references, [pictures[horse][:, ::-1]]) == [horse]


def test_prompt_accuracy_is_a_share_or_nothing(demo, pictures):
    index = {e.caption: i for i, e in enumerate(emoji.all_emoji())}
    apple, rocket = pictures[index["a red apple"]], pictures[index["a rocket"]]
    assert emoji.prompt_accuracy(["a fruit", "an emoji of a rocket"], [apple, rocket], demo) == 1.0
    assert emoji.prompt_accuracy(["a fruit", "a rocket"], [rocket, rocket], demo) == 0.5
    assert emoji.prompt_accuracy(["a lighthouse in a storm"], [apple], demo) is None


def test_a_demo_without_latents_of_the_emoji_is_one_line(random_directory, flux):
    with refused("pictures.safetensors is missing", "train_demo.py"):
        emoji.prompt_accuracy(["a rocket"], [np.zeros((64, 64, 3), np.uint8)], flux.load(str(random_directory)))
