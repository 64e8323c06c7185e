"""The built-in data set: coloured figures on a textured grey ground, drawn on the fly, no file read or written.

Picture `index` is always the same picture. Six classes: background, disc, square, triangle, cross, ring. What tells them
apart is graded on purpose, so that more labels help and unlabelled pictures can stand in for some of them:
- the outline is always right, but objects overlap, leave the frame, turn and vary in size;
- the hue comes from a class's own range, and neighbouring ranges overlap;
- the stripes have a class's own spacing four times out of five, another class's otherwise;
- light and contrast vary between and across pictures, and the ground has stripes and blotches of its own.
"""

from functools import cache

import numpy as np

CLASSES = ("background", "disc", "square", "triangle", "cross", "ring")
SIZE = 64  # pixels, both sides
TRAIN, VAL = 128, 128  # pictures; numbers 0 to 127 train, 128 to 255 validation
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
    """A sine wave of random direction and phase over the picture, in [-1,1]."""
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    return np.sin((np.cos(angle) * COLUMNS + np.sin(angle) * ROWS) * (2 * np.pi / period) + phase)


@cache
def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture and mask number `index`.

    Returns:
        image (64,64,3) uint8 RGB and target (64,64) uint8 with labels 0..5; nothing is ignored. Both are cached: do not
        write into them.
    """
    rng = np.random.default_rng([20260101, index])
    blotches = np.kron(rng.normal(0, 0.06, (8, 8)), np.ones((8, 8)))
    ground = rng.uniform(0.3, 0.7) + 0.05 * stripes(rng, rng.uniform(3, 12)) + blotches
    image = ground[..., None] * (1 + rng.normal(0, 0.06, 3))
    target = np.zeros((SIZE, SIZE), np.uint8)

    for _ in range(rng.integers(3, 6)):
        kind = int(rng.integers(1, len(CLASSES)))
        (y, x), radius, angle = rng.uniform(4, SIZE - 4, 2), rng.uniform(10, 20), rng.uniform(0, 2 * np.pi)
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
        cover = inside(kind, cos * (COLUMNS - x) + sin * (ROWS - y), cos * (ROWS - y) - sin * (COLUMNS - x))
        tint = colour((kind - 1) / 5 + rng.normal(0, HUE_SPREAD), rng.uniform(0.4, 0.8))
        texture = kind if rng.random() < STRIPES_RELIABLE else int(rng.integers(1, len(CLASSES)))
        wave = 1 + 0.25 * stripes(rng, STRIPE_PERIODS[texture - 1])
        image[cover] = (rng.uniform(0.4, 0.9) * wave[..., None] * tint)[cover]
        target[cover] = kind

    light = 1 + rng.normal(0, 0.2) * (COLUMNS / SIZE - 0.5) + rng.normal(0, 0.2) * (ROWS / SIZE - 0.5)
    image = image * light[..., None] * rng.uniform(0.7, 1.2) * rng.normal(1, 0.08, 3) + rng.normal(0, 0.04, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), target
