"""Procedural scenes with captions, and the oracle that reads a picture back.

A scene is one coloured shape on a textured ground, e.g. "a big red cross at the left on a dotted teal
background". The demo models are trained on these pictures; because the scenes are procedural, `read` can say
exactly which caption a generated picture shows. Coordinates are in units of the picture's height, x to the
right, y downwards, (0, 0) in the centre.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product

import numpy as np

COLOURS = {
    "red": (220, 35, 40),
    "orange": (245, 130, 25),
    "yellow": (250, 220, 50),
    "green": (45, 160, 60),
    "teal": (30, 190, 185),
    "blue": (40, 75, 215),
    "purple": (140, 50, 175),
    "white": (242, 242, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
POSITIONS = {
    "in the centre": (0.0, 0.0),
    "at the left": (-0.22, 0.0),
    "at the right": (0.22, 0.0),
    "at the top": (0.0, -0.22),
    "at the bottom": (0.0, 0.22),
}
SIZES = {"small": 0.165, "big": 0.24}  # radius
TEXTURES = ("plain", "striped", "dotted")

SHADE = 0.75  # brightness of stripes and dots relative to the ground
STRIPE_PERIOD, DOT_PERIOD, DOT_RADIUS = 8 / 64, 9 / 64, 1.9 / 64
POSITION_JITTER, BRIGHTNESS_JITTER = 1 / 64, 0.05
OPTIONAL = ("size", "position", "texture", "ground")


@dataclass(frozen=True)
class Scene:
    """What a caption says; an optional attribute is None when the caption leaves it open."""

    size: str | None
    colour: str
    shape: str
    position: str | None
    texture: str | None
    ground: str | None

    def caption(self) -> str:
        words = [self.size, self.colour, self.shape]
        text = _with_article(" ".join(w for w in words if w))
        if self.position:
            text += f" {self.position}"
        if self.texture or self.ground:
            text += " on " + _with_article(" ".join(w for w in (self.texture, self.ground, "background") if w))
        return text


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def all_scenes() -> list[Scene]:
    """Every fully described scene, 10,080 in all; ground and shape never share a colour."""
    grid = product(SIZES, COLOURS, SHAPES, POSITIONS, TEXTURES, COLOURS)
    return [Scene(*values) for values in grid if values[1] != values[5]]


def is_held_out(scene) -> bool:
    """One scene (still or moving) in ten is never trained or calibrated on; the choice depends on its caption alone."""
    return int(hashlib.sha256(scene.caption().encode()).hexdigest(), 16) % 10 == 0


def sample_scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """`count` different scenes from the training part (or the held-out part) of the grammar."""
    pool = [scene for scene in all_scenes() if is_held_out(scene) == held_out]
    order = np.random.default_rng(seed).permutation(len(pool))
    return [pool[i] for i in order[:count]]


def loosen(scene: Scene, rng: np.random.Generator, probability: float = 0.1) -> Scene:
    """Leave each optional attribute out of the caption with this probability."""
    return replace(scene, **{name: None for name in OPTIONAL if rng.random() < probability})


def parse(caption: str) -> Scene | None:
    """The scene that a caption of the grammar describes, or None for any other text."""
    found = dict.fromkeys(("size", "colour", "shape", "position", "texture", "ground"))
    head, _, tail = caption.strip().lower().partition(" on a")
    for position in POSITIONS:
        if head.endswith(position):
            found["position"], head = position, head.removesuffix(position)
    tables = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}
    tail_tables = {"texture": TEXTURES, "ground": COLOURS}
    for part, options in ((head, tables), (tail.removeprefix("n "), tail_tables)):
        for word in part.split():
            name = next((n for n, table in options.items() if word in table), None)
            if name:
                found[name] = word
            elif word not in ("a", "an", "background"):
                return None
    return Scene(**found) if found["colour"] and found["shape"] else None


# --- drawing -----------------------------------------------------------------------------------------------------


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance to the outline (negative inside; exact near straight edges), in units of height."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * r) - 0.28 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
    if shape == "cross":
        long, short = r, 0.34 * r
        upright = np.maximum(np.abs(x) - short, np.abs(y) - long)
        level = np.maximum(np.abs(x) - long, np.abs(y) - short)
        return np.minimum(upright, level)
    corners = 3 if shape == "triangle" else 5
    tips = np.pi * (0.5 + 2 * np.arange(corners) / corners)  # directions of the corners, one upright
    if shape == "triangle":
        return np.max([-(x * np.cos(a) - y * np.sin(a)) for a in tips], axis=0) - 0.55 * r
    # A pentagram is where at most one of its five lines is crossed: the second largest half-plane distance.
    lines = np.sort([x * np.cos(a) - y * np.sin(a) for a in tips], axis=0)
    return lines[-2] - 1.1 * r * np.cos(2 * np.pi / 5)


def _coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:height, 0:width]
    return (x + 0.5 - width / 2) / height, (y + 0.5 - height / 2) / height


def _blend(image: np.ndarray, colour: np.ndarray, distance: np.ndarray) -> np.ndarray:
    cover = np.clip(0.5 - distance * image.shape[0], 0, 1)[..., None]  # one pixel of anti-aliasing
    return image * (1 - cover) + colour * cover


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """Fill the attributes that the caption leaves open at random."""
    choices = {"size": list(SIZES), "position": list(POSITIONS), "texture": list(TEXTURES)}
    choices["ground"] = [name for name in COLOURS if name != scene.colour]
    return replace(scene, **{n: str(rng.choice(choices[n])) for n in OPTIONAL if getattr(scene, n) is None})


def render(scene: Scene, rng: np.random.Generator, height: int = 64, width: int = 64) -> np.ndarray:
    """Draw a scene with a little random variation in place, brightness and texture phase. uint8 [H, W, 3]."""
    scene = complete(scene, rng)
    x, y = _coordinates(height, width)
    ground = np.array(COLOURS[scene.ground]) * (1 + rng.uniform(-1, 1) * BRIGHTNESS_JITTER)
    image = np.broadcast_to(ground, (height, width, 3))
    u, v = rng.uniform(0, 1, 2)
    if scene.texture == "striped":
        image = _blend(image, SHADE * ground, _periodic(y, STRIPE_PERIOD, u, np.abs) - STRIPE_PERIOD / 4)
    elif scene.texture == "dotted":
        distance = np.hypot(_periodic(x, DOT_PERIOD, u), _periodic(y, DOT_PERIOD, v))
        image = _blend(image, SHADE * ground, distance - DOT_RADIUS)
    cx, cy = np.array(POSITIONS[scene.position]) + rng.uniform(-1, 1, 2) * POSITION_JITTER
    colour = np.array(COLOURS[scene.colour]) * (1 + rng.uniform(-1, 1) * BRIGHTNESS_JITTER)
    image = _blend(image, colour, _distance(scene.shape, x - cx, y - cy, SIZES[scene.size]))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _periodic(x: np.ndarray, period: float, phase: float, of=lambda x: x) -> np.ndarray:
    return of((x / period + phase) % 1 - 0.5) * period


# --- reading -----------------------------------------------------------------------------------------------------


def read(image: np.ndarray) -> Scene | None:
    """The scene that a picture shows (uint8 [H, W, 3]), or None when there is no shape on a ground.

    Every pixel is named after the nearest palette colour; the border votes for the ground, the largest patch of
    other colours is the shape, and the outline that overlaps it most tells which shape, size and position it is.
    """
    from skimage.measure import label, regionprops

    height, width = image.shape[:2]
    names = list(COLOURS)
    palette = np.array([np.array(COLOURS[n]) * s for s in (1, SHADE) for n in names])
    nearest = np.square(image[:, :, None] - palette).sum(-1).argmin(-1)  # [H, W]
    family, dark = nearest % len(names), nearest >= len(names)
    rim = max(height // 24, 1)
    border = np.ones((height, width), bool)
    border[rim:-rim, rim:-rim] = False
    ground = np.bincount(family[border], minlength=len(names)).argmax()

    patches, count = label(family != ground, connectivity=1, return_num=True)
    if not count:
        return None
    region = max(regionprops(patches), key=lambda r: r.area)
    if region.area < 0.003 * height * width:
        return None
    patch = patches == region.label
    outlines, meanings = _outlines(height, width)
    shared = outlines @ patch.ravel().astype(np.float32)
    overlap = shared / (outlines.sum(1) + region.area - shared)  # intersection over union
    shape, size, position = meanings[int(overlap.argmax())]
    colour = np.bincount(family[patch], minlength=len(names)).argmax()
    ground_dark = np.mean(dark[~patch & (family == ground)])
    return Scene(
        size=size,
        colour=names[colour],
        shape=shape,
        position=position,
        texture="plain" if ground_dark < 0.04 else "dotted" if ground_dark < 0.3 else "striped",
        ground=names[ground],
    )


@cache
def _outlines(height: int, width: int) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    """Every shape, size and position, shifted by up to 3/64: float32 [N, H·W] of 0 and 1, and what each row means."""
    x, y = _coordinates(height, width)
    shifts = np.arange(-3, 4) / 64
    rows, meanings = [], []
    for (shape, (size, radius), (position, (cx, cy))), dx, dy in product(
        product(SHAPES, SIZES.items(), POSITIONS.items()), shifts, shifts
    ):
        rows.append(_distance(shape, x - cx - dx, y - cy - dy, radius).ravel() < 0)
        meanings.append((shape, size, position))
    return np.array(rows, np.float32), meanings


def agreement(asked: Scene, image: np.ndarray) -> dict[str, bool]:
    """For each attribute that the caption names: does the picture show it?"""
    seen = read(image)
    return {name: seen is not None and getattr(seen, name) == value for name, value in asdict(asked).items() if value}


def prompt_accuracy(captions: list[str], images: list[np.ndarray]) -> float | None:
    """Share of pictures whose every named attribute is read back as asked, in [0, 1].

    None when a caption is not of the grammar, because then there is nothing exact to compare with.
    """
    asked = [parse(caption) for caption in captions]
    if not asked or None in asked:
        return None
    return float(np.mean([all(agreement(s, np.asarray(i)).values()) for s, i in zip(asked, images, strict=True)]))
