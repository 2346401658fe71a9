"""Moving scenes with captions, and the oracle that reads a scene from a video.

A moving scene is one coloured shape that crosses a plain ground, for example "a red cross moving left quickly on a blue
background". The video demos are trained on them. Because they are drawn by a program, `read` can tell exactly which
caption a generated video shows. Coordinates are in units of the image's height, x to the right, y downwards, (0, 0) in
the centre.
"""

import hashlib
from collections.abc import Mapping
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
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.18, "quickly": 0.46}  # path of the centre from the first frame to the last, image heights
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
    """The attributes that a caption names; an optional one is None where the caption leaves it open."""

    colour: str
    shape: str
    direction: str | None
    speed: str | None
    ground: str | None

    def caption(self) -> str:
        """Return the caption, for example "a red cross moving left"."""
        words = [with_article(f"{self.colour} {self.shape}"), "moving", self.direction, self.speed]
        text = " ".join(w for w in words if w)
        return f"{text} on {with_article(self.ground)} background" if self.ground else text


def with_article(words: str) -> str:
    """Return words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def all_scenes() -> list[MovingScene]:
    """Return all fully described moving scenes, 1,792 of them; ground and shape never share a colour."""
    scenes = (MovingScene(*values) for values in product(*ATTRIBUTES.values()))
    return [s for s in scenes if s.colour != s.ground]


def is_held_out(scene: MovingScene) -> bool:
    """Return whether a scene is never trained or calibrated on: one in ten, by its caption alone."""
    return int(hashlib.sha256(scene.caption().encode()).hexdigest(), 16) % 10 == 0


def sample_scenes(count: int, seed: int, held_out: bool = False) -> list[MovingScene]:
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
    rng, captions = np.random.default_rng(seed), []
    for scene in sample_scenes(count, seed, held_out):
        left = [name for name in OPTIONAL if rng.random() < 0.5] or [OPTIONAL[0]]
        captions.append((replace(scene, **dict.fromkeys(left)) if leave_open else scene).caption())
    return captions


def loosen(scene: MovingScene, rng: np.random.Generator, probability: float = 0.1) -> MovingScene:
    """Return a scene whose optional attributes are each left open with a probability."""
    return replace(scene, **{name: None for name in OPTIONAL if rng.random() < probability})


def parse(caption: str) -> MovingScene | None:
    """Return the moving scene that a caption of the grammar describes, or None for any other text."""
    attributes = dict.fromkeys(ATTRIBUTES)
    head, _, tail = caption.strip().lower().partition(" on a")
    for word in head.split():
        name = next((n for n, options in ATTRIBUTES.items() if n != "ground" and word in options), None)
        if name:
            attributes[name] = word
        elif word not in ("a", "an", "moving"):
            return None
    for word in tail.removeprefix("n ").split():
        if word in COLOURS:
            attributes["ground"] = word
        elif word != "background":
            return None
    return MovingScene(**attributes) if attributes["colour"] and attributes["shape"] else None


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
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
    if shape == "cross":
        long, short = r, 0.34 * r
        vertical_bar = np.maximum(np.abs(x) - short, np.abs(y) - long)
        horizontal_bar = np.maximum(np.abs(x) - long, np.abs(y) - short)
        return np.minimum(vertical_bar, horizontal_bar)
    tips = np.pi * (0.5 + 2 * np.arange(3) / 3)  # directions of the triangle's corners, one upright
    return np.max([-(x * np.cos(a) - y * np.sin(a)) for a in tips], axis=0) - 0.55 * r


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of all pixel centres, [H, W] each."""
    y, x = np.mgrid[0:height, 0:width]
    return (x + 0.5 - width / 2) / height, (y + 0.5 - height / 2) / height


def blend(image: np.ndarray, colour: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return an image [H, W, 3] with a colour where a signed distance [H, W] is negative."""
    cover = np.clip(0.5 - distance * image.shape[0], 0, 1)[..., None]  # one pixel of anti-aliasing
    return image * (1 - cover) + colour * cover


def render(
    scene: MovingScene, rng: np.random.Generator, frames: int = 17, height: int = 64, width: int = 64
) -> np.ndarray:
    """Draw a moving scene with small random variations in position and brightness.

    Args:
        scene: Attributes that are None are chosen at random.
        rng: Of all random choices.
        frames: F.
        height, width: In pixels.

    Returns:
        A video, uint8 [F, H, W, 3].
    """
    choices = {name: [v for v in ATTRIBUTES[name] if v != scene.colour] for name in OPTIONAL}
    scene = replace(scene, **{n: str(rng.choice(choices[n])) for n in OPTIONAL if getattr(scene, n) is None})
    x, y = coordinates(height, width)
    ground, colour = (
        np.array(COLOURS[name]) * (1 + rng.uniform(-1, 1) * BRIGHTNESS_JITTER) for name in (scene.ground, scene.colour)
    )
    middle = rng.uniform(-1, 1, 2) * POSITION_JITTER
    path = np.array(DIRECTIONS[scene.direction]) * SPEEDS[scene.speed]
    video = []
    for time in np.linspace(-0.5, 0.5, frames):  # the path leads through the middle of the image
        cx, cy = middle + path * time
        blank = np.broadcast_to(ground, (height, width, 3))
        video.append(blend(blank, colour, signed_distance(scene.shape, x - cx, y - cy, RADIUS)))
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


# --- reading -----------------------------------------------------------------------------------------------------


def read(video: np.ndarray) -> MovingScene | None:
    """Return the moving scene that a video shows, or None when a frame has no shape on a ground, or nothing moves.

    Every pixel gets the name of the nearest palette colour. The most frequent colour of the border is the ground, and
    in each frame the largest patch of other colours is the shape. Its overlap with each outline, summed over the
    frames, gives its shape; a least-squares line through its centres gives direction and speed.

    Args:
        video: uint8 [F, H, W, 3].
    """
    from skimage.measure import label, regionprops

    frames, height, width = video.shape[:3]
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    nearest = np.square(video[..., None, :] - palette.astype(np.float32)).sum(-1).argmin(-1)  # [F, H, W]
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    ground = np.bincount(nearest[:, border].ravel(), minlength=len(names)).argmax()
    colours, centres, overlap = np.zeros(len(names)), [], np.zeros(len(SHAPES))
    for frame in nearest:
        regions = regionprops(label(frame != ground, connectivity=1))
        region = max(regions, key=lambda r: r.area, default=None)
        if region is None or region.area < 0.01 * height * width:
            return None
        colours += np.bincount(frame[tuple(region.coords.T)], minlength=len(names))
        centre = (np.mean(region.coords, 0) + 0.5 - (height / 2, width / 2)) / height
        centres.append(centre[::-1])
        overlap += _overlap(region.coords, height, width)
    (vx, vy), _ = np.polyfit(np.linspace(-0.5, 0.5, frames), np.array(centres), 1)
    distance = np.hypot(vx, vy)
    if distance < 0.05:  # the shape does not move
        return None
    return MovingScene(
        colour=names[int(colours.argmax())],
        shape=SHAPES[int(overlap.argmax())],
        direction=max(DIRECTIONS, key=lambda d: np.dot(DIRECTIONS[d], (vx, vy))),
        speed=min(SPEEDS, key=lambda s: abs(np.log(distance / SPEEDS[s]))),
        ground=names[ground],
    )


def _overlap(coords: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the best intersection over union of a patch (pixels [N, 2]: row, column) with each shape, [shapes]."""
    corner = np.rint(coords.mean(0)).astype(int) - height // 2  # the patch is moved to the middle of a square
    inside = coords - corner
    inside = inside[np.all((inside >= 0) & (inside < height), axis=1)]
    patch = np.zeros((height, height), np.float32)
    patch[tuple(inside.T)] = 1
    outlines = _outlines(height)
    intersection = outlines @ patch.ravel()
    union = outlines.sum(1) + patch.sum() - intersection
    return (intersection / union).reshape(len(SHAPES), -1).max(1)


@cache
def _outlines(height: int) -> np.ndarray:
    """Return masks of all shapes in the middle of a square, shifted by up to 3/64: float32 [shapes · shifts, H·H]."""
    x, y = coordinates(height, height)
    shifts = np.arange(-3, 4) / 64
    masks = [signed_distance(s, x - dx, y - dy, RADIUS).ravel() < 0 for s, dx, dy in product(SHAPES, shifts, shifts)]
    return np.array(masks, np.float32)


def agreement(scene: MovingScene, video: np.ndarray) -> dict[str, bool]:
    """Return for each attribute that is not None whether a video (uint8 [F, H, W, 3]) shows it."""
    shown = read(video)
    named = {name: value for name, value in asdict(scene).items() if value}
    return {name: shown is not None and getattr(shown, name) == value for name, value in named.items()}


def prompt_accuracy(captions: list[str], videos: list[np.ndarray], pipe=None) -> float | None:
    """Return the share of videos that show every attribute that their caption names.

    Args:
        captions: N captions.
        videos: N videos, uint8 [F, H, W, 3].
        pipe: Not needed: the oracle reads the videos themselves.

    Returns:
        In [0, 1]; None when a caption is not of the grammar, because its video cannot be judged.
    """
    scenes = [parse(caption) for caption in captions]
    if not scenes or None in scenes:
        return None
    return float(np.mean([all(agreement(s, np.asarray(v)).values()) for s, v in zip(scenes, videos, strict=True)]))
