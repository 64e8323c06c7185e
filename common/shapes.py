"""The built-in data set: coloured figures on a textured grey ground.

Images are drawn on the fly; no file is read or written. Image `index` is always the same image.

There are six classes: background, disc, square, triangle, cross and ring. What tells them apart is
graded on purpose, so that more labels help and unlabelled images can stand in for some of them:
- the outline is always right, but objects overlap, leave the frame, turn and vary in size;
- the hue comes from a class's own range, and neighbouring ranges overlap;
- the stripes have a class's own spacing four times out of five, another class's otherwise;
- light and contrast vary between and across images, and the ground has stripes and blotches of its
  own.
"""

from functools import cache

import numpy as np

CLASSES = ("background", "disc", "square", "triangle", "cross", "ring")
SIZE = 64  # pixels, both sides
TRAIN, VAL = 128, 128  # images; numbers 0 to 127 train, 128 to 255 validation
HUE_SPREAD = 0.03  # standard deviation; class centres are 0.2 apart on the colour circle
STRIPE_PERIODS = (3.0, 4.2, 5.8, 8.0, 11.0)  # pixels
STRIPES_RELIABLE = 0.8  # how often an object's stripes are its class's

ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def inside(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the figure of class `kind` covers the plane; `u`, `v` in units of its radius."""
    if kind == 1:
        return u * u + v * v < 0.9
    if kind == 2:
        return np.maximum(abs(u), abs(v)) < 0.8
    if kind == 3:
        return (v < 0.6) & (v > 1.8 * abs(u) - 1.0)
    if kind == 4:
        return (np.minimum(abs(u), abs(v)) < 0.4) & (np.maximum(abs(u), abs(v)) < 1.0)
    radius = u * u + v * v
    return (radius > 0.2) & (radius < 1.0)


def colour(hue: float, saturation: float) -> np.ndarray:
    """RGB in [0,1] of a hue in turns at full value."""
    wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (hue - np.array([0.0, 1 / 3, 2 / 3])))
    return 1.0 - saturation * (1.0 - wheel)


def stripes(rng: np.random.Generator, period: float) -> np.ndarray:
    """A sine wave of random direction and phase over the image, (64,64) in [-1,1].

    Args:
        rng: draws both.
        period: wave length in pixels.
    """
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    return np.sin((np.cos(angle) * COLUMNS + np.sin(angle) * ROWS) * (2 * np.pi / period) + phase)


@cache
def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask number `index`.

    Returns:
        The image (64,64,3) uint8 RGB and the target (64,64) uint8 with labels 0 to 5; nothing is
        ignored. Both are cached: do not write into them.
    """
    rng = np.random.default_rng([20260101, index])
    image = draw_ground(rng)
    target = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(3, 6)):
        draw_figure(rng, image, target)
    image = light_up(rng, image)
    return (image.clip(0, 1) * 255).astype(np.uint8), target


def draw_ground(rng: np.random.Generator) -> np.ndarray:
    """A nearly grey ground with stripes and blotches, (64,64,3) around 0.5."""
    blotches = np.kron(rng.normal(0, 0.06, (8, 8)), np.ones((8, 8)))
    brightness = rng.uniform(0.3, 0.7)
    period = rng.uniform(3, 12)
    ground = brightness + 0.05 * stripes(rng, period) + blotches
    return ground[..., None] * (1 + rng.normal(0, 0.06, 3))


def draw_figure(rng: np.random.Generator, image: np.ndarray, target: np.ndarray) -> None:
    """Draw a figure of a random class over what is there, in place.

    Args:
        rng: draws everything.
        image: (64,64,3) float.
        target: (64,64) uint8.
    """
    kind = int(rng.integers(1, len(CLASSES)))
    y, x = rng.uniform(4, SIZE - 4, 2)
    radius = rng.uniform(10, 20)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    u = cos * (COLUMNS - x) + sin * (ROWS - y)
    v = cos * (ROWS - y) - sin * (COLUMNS - x)
    cover = inside(kind, u, v)

    hue = (kind - 1) / 5 + rng.normal(0, HUE_SPREAD)
    tint = colour(hue, saturation=rng.uniform(0.4, 0.8))
    texture = kind if rng.random() < STRIPES_RELIABLE else int(rng.integers(1, len(CLASSES)))
    wave = 1 + 0.25 * stripes(rng, STRIPE_PERIODS[texture - 1])
    brightness = rng.uniform(0.4, 0.9)
    image[cover] = (brightness * wave[..., None] * tint)[cover]
    target[cover] = kind


def light_up(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The image (64,64,3) under light that falls off to a side, of another colour, with noise."""
    slope_x, slope_y = rng.normal(0, 0.2), rng.normal(0, 0.2)
    light = 1 + slope_x * (COLUMNS / SIZE - 0.5) + slope_y * (ROWS / SIZE - 0.5)
    brightness = rng.uniform(0.7, 1.2)
    tint = rng.normal(1, 0.08, 3)
    return image * light[..., None] * brightness * tint + rng.normal(0, 0.04, image.shape)
