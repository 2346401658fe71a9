"""Moving scenes with captions, and the oracle that reads a video back.

A moving scene is one coloured shape that crosses a plain ground, e.g. "a red cross moving left quickly on a blue
background". The video demos are trained on them; shapes, colours and coordinates are those of `scenes`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product

import numpy as np

from ertacache.demos.scenes import COLOURS, _blend, _coordinates, _distance, _with_article, is_held_out

SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.18, "quickly": 0.46}  # way of the centre from the first frame to the last, picture heights
RADIUS = 0.24
POSITION_JITTER, BRIGHTNESS_JITTER = 1 / 64, 0.05
OPTIONAL = ("direction", "speed", "ground")
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "ground": tuple(COLOURS),
}


@dataclass(frozen=True)
class MovingScene:
    """What a caption says; an optional attribute is None when the caption leaves it open."""

    colour: str
    shape: str
    direction: str | None
    speed: str | None
    ground: str | None

    def caption(self) -> str:
        words = [_with_article(f"{self.colour} {self.shape}"), "moving", self.direction, self.speed]
        text = " ".join(w for w in words if w)
        return f"{text} on {_with_article(self.ground)} background" if self.ground else text


def all_scenes() -> list[MovingScene]:
    """Every fully described moving scene, 1,792 in all; ground and shape never share a colour."""
    scenes = (MovingScene(*values) for values in product(*ATTRIBUTES.values()))
    return [s for s in scenes if s.colour != s.ground]


def sample_scenes(count: int, seed: int, held_out: bool = False) -> list[MovingScene]:
    """`count` different scenes from the training part (or the held-out part) of the grammar."""
    pool = [scene for scene in all_scenes() if is_held_out(scene) == held_out]
    order = np.random.default_rng(seed).permutation(len(pool))
    return [pool[i] for i in order[:count]]


def loosen(scene: MovingScene, rng: np.random.Generator, probability: float = 0.1) -> MovingScene:
    """Leave each optional attribute out of the caption with this probability."""
    return replace(scene, **{name: None for name in OPTIONAL if rng.random() < probability})


def parse(caption: str) -> MovingScene | None:
    """The moving scene that a caption of the grammar describes, or None for any other text."""
    found = dict.fromkeys(ATTRIBUTES)
    head, _, tail = caption.strip().lower().partition(" on a")
    for word in head.split():
        name = next((n for n, options in ATTRIBUTES.items() if n != "ground" and word in options), None)
        if name:
            found[name] = word
        elif word not in ("a", "an", "moving"):
            return None
    for word in tail.removeprefix("n ").split():
        if word in COLOURS:
            found["ground"] = word
        elif word != "background":
            return None
    return MovingScene(**found) if found["colour"] and found["shape"] else None


# --- drawing -----------------------------------------------------------------------------------------------------


def render(
    scene: MovingScene, rng: np.random.Generator, frames: int = 17, height: int = 64, width: int = 64
) -> np.ndarray:
    """Draw a moving scene with random variation in place and brightness. uint8 [F, H, W, 3]."""
    choices = {name: [v for v in ATTRIBUTES[name] if v != scene.colour] for name in OPTIONAL}
    scene = replace(scene, **{n: str(rng.choice(choices[n])) for n in OPTIONAL if getattr(scene, n) is None})
    x, y = _coordinates(height, width)
    ground, colour = (
        np.array(COLOURS[name]) * (1 + rng.uniform(-1, 1) * BRIGHTNESS_JITTER) for name in (scene.ground, scene.colour)
    )
    middle = rng.uniform(-1, 1, 2) * POSITION_JITTER
    way = np.array(DIRECTIONS[scene.direction]) * SPEEDS[scene.speed]
    video = []
    for moment in np.linspace(-0.5, 0.5, frames):  # the way leads through the middle of the picture
        cx, cy = middle + way * moment
        blank = np.broadcast_to(ground, (height, width, 3))
        video.append(_blend(blank, colour, _distance(scene.shape, x - cx, y - cy, RADIUS)))
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


# --- reading -----------------------------------------------------------------------------------------------------


def read(video: np.ndarray) -> MovingScene | None:
    """The moving scene that a video shows (uint8 [F, H, W, 3]), or None when a frame has no shape on a ground.

    In each frame every pixel is named after the nearest palette colour; the border votes for the ground, and the
    largest patch of another colour is the shape. Its outline votes for the shape, and the line through its centres
    (least squares over the frames) gives direction and speed.
    """
    from skimage.measure import label, regionprops

    frames, height, width = video.shape[:3]
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    family = np.square(video[..., None, :] - palette.astype(np.float32)).sum(-1).argmin(-1)  # [F, H, W]
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    ground = np.bincount(family[:, border].ravel(), minlength=len(names)).argmax()
    colours, centres, overlap = np.zeros(len(names)), [], np.zeros(len(SHAPES))
    for frame in family:
        regions = regionprops(label(frame != ground, connectivity=1))
        region = max(regions, key=lambda r: r.area, default=None)
        if region is None or region.area < 0.01 * height * width:
            return None
        colours += np.bincount(frame[tuple(region.coords.T)], minlength=len(names))
        centre = (np.mean(region.coords, 0) + 0.5 - (height / 2, width / 2)) / height
        centres.append(centre[::-1])
        overlap += _overlap(region.coords, height, width)
    (vx, vy), _ = np.polyfit(np.linspace(-0.5, 0.5, frames), np.array(centres), 1)
    way = np.hypot(vx, vy)
    if way < 0.05:  # it stands still
        return None
    return MovingScene(
        colour=names[int(colours.argmax())],
        shape=SHAPES[int(overlap.argmax())],
        direction=max(DIRECTIONS, key=lambda d: np.dot(DIRECTIONS[d], (vx, vy))),
        speed=min(SPEEDS, key=lambda s: abs(np.log(way / SPEEDS[s]))),
        ground=names[ground],
    )


def _overlap(coords: np.ndarray, height: int, width: int) -> np.ndarray:
    """Best intersection over union of a patch (pixels [N, 2]: row, column) with each shape near it: [shapes]."""
    corner = np.rint(coords.mean(0)).astype(int) - height // 2  # the patch is moved to the middle of a square
    inside = coords - corner
    inside = inside[np.all((inside >= 0) & (inside < height), axis=1)]
    patch = np.zeros((height, height), np.float32)
    patch[tuple(inside.T)] = 1
    outlines = _outlines(height)
    shared = outlines @ patch.ravel()
    union = outlines.sum(1) + patch.sum() - shared
    return (shared / union).reshape(len(SHAPES), -1).max(1)


@cache
def _outlines(height: int) -> np.ndarray:
    """Every shape in the middle of a square, shifted by up to 3/64: float32 [shapes · shifts, H·H] of 0 and 1."""
    x, y = _coordinates(height, height)
    shifts = np.arange(-3, 4) / 64
    rows = [_distance(s, x - dx, y - dy, RADIUS).ravel() < 0 for s, dx, dy in product(SHAPES, shifts, shifts)]
    return np.array(rows, np.float32)


def agreement(asked: MovingScene, video: np.ndarray) -> dict[str, bool]:
    """For each attribute that the caption names: does the video show it?"""
    seen = read(video)
    return {name: seen is not None and getattr(seen, name) == value for name, value in asdict(asked).items() if value}


def prompt_accuracy(captions: list[str], videos: list[np.ndarray]) -> float | None:
    """Share of videos (uint8 [F, H, W, 3]) whose every named attribute is read back as asked, in [0, 1].

    None when a caption is not of the grammar, because then there is nothing exact to compare with.
    """
    asked = [parse(caption) for caption in captions]
    if not asked or None in asked:
        return None
    return float(np.mean([all(agreement(s, np.asarray(v)).values()) for s, v in zip(asked, videos, strict=True)]))
