"""Procedural scenes with captions, and the oracle that reads a scene from an image.

A scene is one coloured shape on a textured ground, for example "a big red cross at the left on a dotted teal
background". The demo models are trained on these images. Because the scenes are procedural, `read` can tell exactly
which caption a generated image shows. Coordinates are in units of the image's height, x to the right, y downwards,
(0, 0) in the centre.
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
    """The attributes that a caption names; an optional one is None where the caption leaves it open."""

    size: str | None
    colour: str
    shape: str
    position: str | None
    texture: str | None
    ground: str | None

    def caption(self) -> str:
        """Return the caption, for example "a big red cross at the left"."""
        words = [self.size, self.colour, self.shape]
        text = with_article(" ".join(w for w in words if w))
        if self.position:
            text += f" {self.position}"
        if self.texture or self.ground:
            text += " on " + with_article(" ".join(w for w in (self.texture, self.ground, "background") if w))
        return text


def with_article(words: str) -> str:
    """Return words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def all_scenes() -> list[Scene]:
    """Return all fully described scenes, 10,080 of them; ground and shape never share a colour."""
    grid = product(SIZES, COLOURS, SHAPES, POSITIONS, TEXTURES, COLOURS)
    return [Scene(*values) for values in grid if values[1] != values[5]]


def is_held_out(scene) -> bool:
    """Return whether a scene, still or moving, is never trained or calibrated on: one in ten, by its caption alone."""
    return int(hashlib.sha256(scene.caption().encode()).hexdigest(), 16) % 10 == 0


def sample_scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """Return `count` different scenes of the grammar.

    Args:
        count: Number of scenes.
        seed: Of the choice.
        held_out: Whether to choose from the held-out scenes instead of the training scenes.
    """
    pool = [scene for scene in all_scenes() if is_held_out(scene) == held_out]
    order = np.random.default_rng(seed).permutation(len(pool))
    return [pool[i] for i in order[:count]]


def sample_captions(count: int, seed: int, held_out: bool = False, leave_open: bool = False) -> list[str]:
    """Return captions of `sample_scenes`. leave_open: each leaves a random part of the optional attributes open."""
    return captions_of(sample_scenes(count, seed, held_out), OPTIONAL if leave_open else (), seed)


def captions_of(scenes: list, optional: tuple[str, ...], seed: int) -> list[str]:
    """Return captions of scenes, still or moving, that each leave some of these attributes open, at least one."""
    rng, captions = np.random.default_rng(seed), []
    for scene in scenes:
        left = [name for name in optional if rng.random() < 0.5] or [*optional[:1]]
        captions.append(replace(scene, **dict.fromkeys(left)).caption())
    return captions


def loosen(scene: Scene, rng: np.random.Generator, probability: float = 0.1) -> Scene:
    """Return a scene whose optional attributes are each left open with a probability."""
    return replace(scene, **{name: None for name in OPTIONAL if rng.random() < probability})


def parse(caption: str) -> Scene | None:
    """Return the scene that a caption of the grammar describes, or None for any other text."""
    attributes = dict.fromkeys(("size", "colour", "shape", "position", "texture", "ground"))
    head, _, tail = caption.strip().lower().partition(" on a")
    for position in POSITIONS:
        if head.endswith(position):
            attributes["position"], head = position, head.removesuffix(position)
    head_values = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}
    tail_values = {"texture": TEXTURES, "ground": COLOURS}
    for text, values in ((head, head_values), (tail.removeprefix("n "), tail_values)):
        for word in text.split():
            name = next((n for n, words in values.items() if word in words), None)
            if name:
                attributes[name] = word
            elif word not in ("a", "an", "background"):
                return None
    return Scene(**attributes) if attributes["colour"] and attributes["shape"] else None


# --- drawing -----------------------------------------------------------------------------------------------------


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Return the signed distance to a shape's outline, negative inside, exact near straight edges.

    Args:
        shape: One of SHAPES.
        x, y: Coordinates from the shape's centre, of one shape.
        r: Radius.
    """
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * r) - 0.28 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
    if shape == "cross":
        long, short = r, 0.34 * r
        vertical_bar = np.maximum(np.abs(x) - short, np.abs(y) - long)
        horizontal_bar = np.maximum(np.abs(x) - long, np.abs(y) - short)
        return np.minimum(vertical_bar, horizontal_bar)
    corners = 3 if shape == "triangle" else 5
    tips = np.pi * (0.5 + 2 * np.arange(corners) / corners)  # directions of the corners, one upright
    if shape == "triangle":
        return np.max([-(x * np.cos(a) - y * np.sin(a)) for a in tips], axis=0) - 0.55 * r
    # A pentagram is the set of points outside of at most one of its five half-planes: the second largest distance.
    lines = np.sort([x * np.cos(a) - y * np.sin(a) for a in tips], axis=0)
    return lines[-2] - 1.1 * r * np.cos(2 * np.pi / 5)


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of all pixel centres, [H, W] each."""
    y, x = np.mgrid[0:height, 0:width]
    return (x + 0.5 - width / 2) / height, (y + 0.5 - height / 2) / height


def blend(image: np.ndarray, colour: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return an image [H, W, 3] with a colour where a signed distance [H, W] is negative."""
    cover = np.clip(0.5 - distance * image.shape[0], 0, 1)[..., None]  # one pixel of anti-aliasing
    return image * (1 - cover) + colour * cover


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene with random values for the attributes that its caption leaves open."""
    choices = {"size": list(SIZES), "position": list(POSITIONS), "texture": list(TEXTURES)}
    choices["ground"] = [name for name in COLOURS if name != scene.colour]
    return replace(scene, **{n: str(rng.choice(choices[n])) for n in OPTIONAL if getattr(scene, n) is None})


def render(scene: Scene, rng: np.random.Generator, height: int = 64, width: int = 64) -> np.ndarray:
    """Draw a scene with small random variations in position, brightness and texture phase.

    Args:
        scene: Attributes that are None are chosen at random.
        rng: Of all random choices.
        height, width: In pixels.

    Returns:
        An image, uint8 [H, W, 3].
    """
    scene = complete(scene, rng)
    x, y = coordinates(height, width)
    ground = np.array(COLOURS[scene.ground]) * (1 + rng.uniform(-1, 1) * BRIGHTNESS_JITTER)
    image = np.broadcast_to(ground, (height, width, 3))
    u, v = rng.uniform(0, 1, 2)
    if scene.texture == "striped":
        image = blend(image, SHADE * ground, _periodic(y, STRIPE_PERIOD, u, np.abs) - STRIPE_PERIOD / 4)
    elif scene.texture == "dotted":
        distance = np.hypot(_periodic(x, DOT_PERIOD, u), _periodic(y, DOT_PERIOD, v))
        image = blend(image, SHADE * ground, distance - DOT_RADIUS)
    cx, cy = np.array(POSITIONS[scene.position]) + rng.uniform(-1, 1, 2) * POSITION_JITTER
    colour = np.array(COLOURS[scene.colour]) * (1 + rng.uniform(-1, 1) * BRIGHTNESS_JITTER)
    image = blend(image, colour, signed_distance(scene.shape, x - cx, y - cy, SIZES[scene.size]))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _periodic(x: np.ndarray, period: float, phase: float, of=lambda x: x) -> np.ndarray:
    """Return x as the offset from the middle of its period, after `of` in units of the period."""
    return of((x / period + phase) % 1 - 0.5) * period


# --- reading -----------------------------------------------------------------------------------------------------


def read(image: np.ndarray) -> Scene | None:
    """Return the scene that an image shows, or None without a shape on a ground.

    Every pixel gets the name of the nearest palette colour. The most frequent colour of the border is the ground, the
    largest patch of other colours is the shape, and the outline with the largest overlap gives its shape, size and
    position.

    Args:
        image: uint8 [H, W, 3].
    """
    from skimage.measure import label, regionprops

    height, width = image.shape[:2]
    names = list(COLOURS)
    palette = np.array([np.array(COLOURS[n]) * s for s in (1, SHADE) for n in names])
    nearest = np.square(image[:, :, None] - palette).sum(-1).argmin(-1)  # [H, W]
    colours, shaded = nearest % len(names), nearest >= len(names)
    margin = max(height // 24, 1)
    border = np.ones((height, width), bool)
    border[margin:-margin, margin:-margin] = False
    ground = np.bincount(colours[border], minlength=len(names)).argmax()

    patches, count = label(colours != ground, connectivity=1, return_num=True)
    if not count:
        return None
    region = max(regionprops(patches), key=lambda r: r.area)
    if region.area < 0.003 * height * width:
        return None
    patch = patches == region.label
    outlines, attributes = _outlines(height, width)
    intersection = outlines @ patch.ravel().astype(np.float32)
    overlap = intersection / (outlines.sum(1) + region.area - intersection)  # intersection over union
    shape, size, position = attributes[int(overlap.argmax())]
    colour = np.bincount(colours[patch], minlength=len(names)).argmax()
    shaded_share = np.mean(shaded[~patch & (colours == ground)])
    return Scene(
        size=size,
        colour=names[colour],
        shape=shape,
        position=position,
        texture="plain" if shaded_share < 0.04 else "dotted" if shaded_share < 0.3 else "striped",
        ground=names[ground],
    )


@cache
def _outlines(height: int, width: int) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    """Return the masks of all shapes, sizes and positions, shifted by up to 3/64, and the attributes of each.

    Returns:
        Masks of 0 and 1, float32 [N, H·W], and N triples (shape, size, position).
    """
    x, y = coordinates(height, width)
    shifts = np.arange(-3, 4) / 64
    masks, attributes = [], []
    for (shape, (size, radius), (position, (cx, cy))), dx, dy in product(
        product(SHAPES, SIZES.items(), POSITIONS.items()), shifts, shifts
    ):
        masks.append(signed_distance(shape, x - cx - dx, y - cy - dy, radius).ravel() < 0)
        attributes.append((shape, size, position))
    return np.array(masks, np.float32), attributes


def agreement(scene: Scene, image: np.ndarray) -> dict[str, bool]:
    """Return for each attribute that is not None whether an image (uint8 [H, W, 3]) shows it."""
    shown = read(image)
    named = {name: value for name, value in asdict(scene).items() if value}
    return {name: shown is not None and getattr(shown, name) == value for name, value in named.items()}


def prompt_accuracy(captions: list[str], images: list[np.ndarray], pipe=None) -> float | None:
    """Return the share of images that show every attribute that their caption names.

    Args:
        captions: N captions.
        images: N images, uint8 [H, W, 3].
        pipe: Not needed: the oracle reads the images themselves.

    Returns:
        In [0, 1]; None when a caption is not of the grammar, because its image cannot be judged.
    """
    scenes = [parse(caption) for caption in captions]
    if not scenes or None in scenes:
        return None
    return float(np.mean([all(agreement(s, np.asarray(i)).values()) for s, i in zip(scenes, images, strict=True)]))
