"""The built-in data set: patterned figures of any colour on patchy ground.

Images are drawn on the fly; no file is read or written. Image `index` is always the same image.
There are twelve classes: background and the eleven `FIGURES`. As in photographs,

- a class is its outline and its pattern of light and dark. Colour says nothing, so that the jitter
  of colours and the grey images of strong augmentations keep what an image shows;
- figures stand more or less upright, are stretched, differ in size, overlap and leave the frame;
- some classes are rarer than others: each is 0.9 times as frequent as the one before it. In the
  imbalanced variant, `shapes-zipf`, the k-th class is 1/k times as frequent as the first;
- images differ in difficulty: a number in [0,1], mostly small. It makes light uneven, contrast
  weak, the image blurred and noisy, figures small, and adds clutter: small blots of no class.

A network learns little of this from a few dozen masks and random weights. As with photographs, it
starts from a backbone that has seen many other images (`common/pretrain.py`).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage

SIZE = 64  # pixels, both sides
TRAIN, VAL = 256, 256  # images of each variant
RARER = 0.9  # how frequent a class is, compared with the one before it
SEED = 20260102
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue; ITU-R BT.601

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Pattern(NamedTuple):
    """Light and dark on a figure.

    Attributes:
        kind: one of `KINDS`.
        frequency: of stripes, checks, dots and rings, in radians a radius of the figure; of
            "sectors", how many light ones there are. For "top" and "bottom" it says how sharp the
            edge between light and dark is, for "core" how small and sharp; "plain" has none.
    """

    kind: str
    frequency: float = 0.0


# "upright", "level" and "diagonal" are stripes; "core" is a bright middle.
KINDS = (
    "plain", "upright", "level", "diagonal", "checks", "dots", "rings", "sectors", "top", "bottom",
    "core",
)  # fmt: skip
# The classes after the background, the most frequent first.
FIGURES = {
    "disc": Pattern("rings", 8),
    "square": Pattern("upright", 8),
    "triangle": Pattern("level", 8),
    "cross": Pattern("core", 3),
    "ring": Pattern("sectors", 6),
    "star": Pattern("plain"),
    "bar": Pattern("checks", 7),
    "crescent": Pattern("top", 4),
    "angle": Pattern("dots", 9),
    "bow": Pattern("diagonal", 8),
    "dome": Pattern("bottom", 4),
}
CLASSES = ("background", *FIGURES)
COLOURS = (
    (30, 30, 30), (220, 60, 60), (240, 200, 40), (60, 180, 75), (0, 130, 200), (180, 80, 220),
    (245, 130, 40), (70, 225, 225), (235, 120, 190), (150, 100, 50), (170, 220, 90),
    (125, 120, 255),
)  # fmt: skip


def shares(weights: np.ndarray) -> np.ndarray:
    """Numbers that sum to one, in the ratios of `weights`."""
    return weights / weights.sum()


RANKS = np.arange(len(FIGURES))
FREQUENCIES = {"shapes": shares(RARER**RANKS), "shapes-zipf": shares(1 / (1 + RANKS))}
VARIANTS = tuple(FREQUENCIES)


def inside(figure: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where a figure covers the plane, bool.

    Args:
        figure: one of `FIGURES`.
        u, v: coordinates to the right and down, in units of the figure's radius.
    """
    square = u * u + v * v
    match figure:
        case "disc":
            return square < 0.85
        case "square":
            return np.maximum(abs(u), abs(v)) < 0.8
        case "triangle":
            return (v < 0.6) & (v > 1.8 * abs(u) - 1.0)
        case "cross":
            return (np.minimum(abs(u), abs(v)) < 0.34) & (np.maximum(abs(u), abs(v)) < 1.0)
        case "ring":
            return (square > 0.25) & (square < 1.0)
        case "star":
            return np.sqrt(square) < 0.68 + 0.32 * np.cos(5 * np.arctan2(u, v))
        case "bar":
            return (abs(u) < 1.1) & (abs(v) < 0.4)
        case "crescent":
            return (square < 1.0) & ((u - 0.55) ** 2 + v * v > 0.6)
        case "angle":
            return (np.maximum(abs(u), abs(v)) < 0.85) & ((u < -0.15) | (v < -0.15))
        case "bow":
            return (abs(v) < 0.1 + 0.9 * abs(u)) & (abs(u) < 0.9)
        case "dome":
            return (u * u + (v - 0.4) ** 2 < 1.1) & (v < 0.4)
    raise ValueError(f"no figure '{figure}'")


def light_and_dark(pattern: Pattern, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A pattern in [-1,1] at coordinates `u`, `v`: it moves, turns and grows with its figure."""
    k = pattern.frequency
    match pattern.kind:
        case "plain":
            return np.zeros_like(u)
        case "upright":
            return np.tanh(3 * np.sin(k * u))
        case "level":
            return np.tanh(3 * np.sin(k * v))
        case "diagonal":
            return np.tanh(3 * np.sin(0.7 * k * (u + v)))
        case "checks":
            return np.tanh(4 * np.sin(k * u) * np.sin(k * v))
        case "dots":
            return np.tanh(3 * (np.cos(k * u) + np.cos(k * v) - 0.6))
        case "rings":
            return np.tanh(3 * np.cos(k * np.sqrt(u * u + v * v)))
        case "sectors":
            return np.tanh(3 * np.sin(k * np.arctan2(v, u)))
        case "top":
            return np.tanh(-k * v)
        case "bottom":
            return np.tanh(k * v)
        case "core":
            return np.tanh(3 - 2 * k * np.sqrt(u * u + v * v))
    raise ValueError(f"no pattern '{pattern.kind}'")


# ---------------------------------------------------------------------------------------- the set


def numbers(variant: str) -> range:
    """The numbers of a variant's images: first `TRAIN` for training, then `VAL` for validation."""
    first = VARIANTS.index(variant) * (TRAIN + VAL)
    return range(first, first + TRAIN + VAL)


@cache
def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask number `index`.

    `numbers` says which ones belong to which variant.

    Returns:
        The image (64,64,3) uint8 RGB and the target (64,64) uint8 with labels 0 to 11; nothing is
        ignored. Both are cached: do not write into them.
    """
    variant = VARIANTS[index // (TRAIN + VAL)]
    rng = np.random.default_rng([SEED, index])
    scene = Scene(rng, SIZE, difficulty=rng.random() ** 2)
    target = np.zeros((SIZE, SIZE), np.uint8)
    scene.add_clutter(most=3, largest=8)

    for _ in range(rng.integers(2, 4)):
        label = 1 + int(rng.choice(len(FIGURES), p=FREQUENCIES[variant]))
        figure = CLASSES[label]
        place = rng.uniform(4, SIZE - 4, 2)
        # Uniform to the power 0.7 prefers large figures, to 1.7 small ones.
        radius = 11 + 9 * rng.random() ** (0.7 + scene.difficulty)

        u, v = scene.frame(place, radius)
        cover = inside(figure, u, v)
        scene.paint(cover, light_and_dark(FIGURES[figure], u, v))
        target[cover] = label
    return scene.photograph(), target


# ----------------------------------------------------------------------------------- the renderer


class Scene:
    """A square image that is being painted.

    Args:
        rng: draws everything.
        size: pixels of a side.
        difficulty: in [0,1].

    Attributes:
        image: (size,size,3) float RGB, mostly in [0,1].
        level: luminance of the ground.
    """

    def __init__(self, rng: np.random.Generator, size: int, difficulty: float):
        self.rng, self.size, self.difficulty = rng, size, difficulty
        self.rows, self.columns = np.mgrid[0:size, 0:size].astype(np.float32)
        self.level = rng.uniform(0.42, 0.58)
        self.image = self.ground()

    def ground(self) -> np.ndarray:
        """Waves and blotches around the level, nearly grey."""
        rng = self.rng
        period, angle, phase = rng.uniform(5, 14), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        along = np.cos(angle) * self.columns + np.sin(angle) * self.rows
        wave = np.sin(2 * np.pi / period * along + phase)

        coarse = rng.normal(0, 1, (7, 7))
        blotches = ndimage.zoom(coarse, self.size / 7, order=1)
        light = self.level + 0.03 * wave + rng.uniform(0.02, 0.06) * blotches
        return light[..., None] * colour(hue=rng.uniform(), saturation=rng.uniform(0, 0.12))

    def frame(self, place: tuple[float, float], radius: float) -> tuple[np.ndarray, np.ndarray]:
        """The pixels in the coordinates of a figure that is nearly upright, and a little stretched.

        Args:
            place: column and row of its middle.
            radius: in pixels.

        Returns:
            `u`, `v` (size,size) in units of the radius: to the figure's right, and down.
        """
        angle, stretch = self.rng.normal(0, 0.15), self.rng.uniform(0.85, 1.18)
        x, y = self.columns - place[0], self.rows - place[1]
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
        return (cos * x + sin * y) * stretch, (cos * y - sin * x) / stretch

    def paint(self, cover: np.ndarray, wave: np.ndarray, strength: float = 0.5) -> None:
        """Paint a figure over what is there: lighter or darker than the ground, in any colour.

        Args:
            cover: (size,size) bool.
            wave: (size,size) in [-1,1], its pattern.
            strength: of the pattern, as a share of the figure's luminance.
        """
        rng = self.rng
        step = rng.uniform(0.18, 0.40) * (1 - 0.5 * self.difficulty)
        light = self.level + step if rng.random() < 0.5 else self.level - step
        shade = light * (1 + strength * (1 - 0.4 * self.difficulty) * wave)
        tint = colour(hue=rng.uniform(), saturation=rng.uniform(0.2, 0.8))
        self.image[cover] = shade[cover][:, None] * tint

    def add_clutter(self, most: int, largest: float) -> None:
        """Paint blots of no class: up to `most`, of a radius from 3 pixels up to `largest`.

        Each is there with a probability that is the scene's difficulty.
        """
        for _ in range(self.rng.binomial(most, self.difficulty)):
            place = self.rng.uniform(0, self.size, 2)
            u, v = self.frame(place, self.rng.uniform(3, largest))
            self.paint(blot(self.rng)(u, v), np.zeros_like(u))

    def photograph(self) -> np.ndarray:
        """The image (size,size,3) uint8 as a camera takes it.

        Light falls off to a side and has a cast of colour; the image is blurred and noisy. All but
        the cast grows with difficulty.
        """
        rng, difficulty = self.rng, self.difficulty
        slope_x, slope_y = rng.normal(0, 0.25 * difficulty, 2)
        light = 1 + slope_x * (self.columns / self.size - 0.5)
        light += slope_y * (self.rows / self.size - 0.5)
        cast = rng.normal(1, 0.06, 3)
        image = self.image * light[..., None] * rng.uniform(0.8, 1.15) * cast

        sigma = 1.3 * difficulty * rng.random()  # pixels
        if sigma > 0.3:  # less would not be seen
            image = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
        noise = 0.01 + 0.08 * difficulty * rng.random()
        image = image + rng.normal(0, noise, image.shape)
        return (image.clip(0, 1) * 255).astype(np.uint8)


def colour(hue: float, saturation: float) -> np.ndarray:
    """RGB of luminance 1, of a hue in turns and a saturation in [0,1]."""
    wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hue - np.array([0.0, 1 / 3, 2 / 3])))
    tint = 1 - saturation * (1 - wheel)
    return tint / (tint @ LUMINANCE)


def blot(rng: np.random.Generator) -> Outline:
    """A random closed curve: its radius is a sum of six waves around the middle."""
    amplitudes = rng.normal(0, 1, 6) * np.array([0.1, 0.25, 0.25, 0.2, 0.15, 0.1])
    phases = rng.uniform(0, 2 * np.pi, 6)

    def covers(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        theta = np.arctan2(v, u)
        bend = np.zeros_like(u)
        for number, (amplitude, phase) in enumerate(zip(amplitudes, phases, strict=True), start=1):
            bend += amplitude * np.cos(number * theta + phase)
        return np.sqrt(u * u + v * v) < 0.75 * (1 + bend).clip(0.15, 1.6)

    return covers
