"""Captions of the emoji, and how their pictures are compared."""

import numpy as np
import pytest

from ertacache.demos import emoji
from helpers import refused


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


def test_a_demo_without_latents_of_the_emoji_is_one_line(random_directory, flux):
    with refused("pictures.safetensors is missing", "train_demo.py"):
        emoji.prompt_accuracy(["a rocket"], [np.zeros((64, 64, 3), np.uint8)], flux.load(str(random_directory)))
