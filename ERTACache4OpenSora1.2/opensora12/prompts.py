"""How Open-Sora 1.2 writes its prompts: scores are appended, then the text is cleaned as in training."""

from diffusers import PixArtAlphaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from ertacache.utils.errors import UserError


def append_scores(
    prompt: str,
    aesthetic_score: float | None = 6.5,
    motion_score: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """The prompt with " aesthetic score: 6.5." and so on behind it, without those that are None or already in it."""
    scores = {
        "aesthetic score:": None if aesthetic_score is None else f"{aesthetic_score:.1f}",
        "motion score:": None if motion_score is None else f"{motion_score:.1f}",
        "camera motion:": camera_motion,
    }
    for marker, value in scores.items():
        if value is not None and marker not in prompt:
            prompt = f"{prompt} {marker} {value}."
    return prompt


def clean(prompt: str) -> str:
    """Lower case, without links, markup and odd punctuation: the cleaner of PixArt-α, twice."""
    if not (is_bs4_available() and is_ftfy_available()):
        raise UserError("cleaning prompts needs two more packages: pip install ftfy beautifulsoup4")
    for _ in range(2):
        prompt = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, prompt)  # of self it reads a constant only
    return prompt
