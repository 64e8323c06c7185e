"""Weak augmentation: random scale, crop, flip, padding; and the normalisation that follows on the device.

The usual way resizes the whole picture and then throws most of it away. Here the window is drawn first, in the
coordinates of the scaled picture, and one resize reads only the source pixels under it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from common import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of pixels in [0,1]; the statistics torchvision's weights were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)
IGNORE = 255

ScaleRule = Callable[[int, int], float]  # (width, height) -> factor of the picture's own size


def uniform(low: float, high: float) -> float:
    """One draw from torch's global generator, which the loader seeds for each sample."""
    return low + (high - low) * torch.rand(()).item()


@dataclass(frozen=True)
class ScaleFrom:
    """A factor chosen from a list (CPS: 0.5, 0.75, 1, 1.5, 1.75, 2)."""

    factors: tuple[float, ...]

    def __call__(self, width: int, height: int) -> float:
        return self.factors[int(torch.randint(len(self.factors), ()))]


@dataclass(frozen=True)
class LongSide:
    """The long side drawn uniformly, in pixels (ST++: 200..800 on VOC)."""

    low: int
    high: int

    def __call__(self, width: int, height: int) -> float:
        return int(torch.randint(self.low, self.high + 1, ())) / max(width, height)


@dataclass(frozen=True)
class HalfOrDouble:
    """U(0.5, 1) or U(1, 2) with equal chance (U2PL)."""

    def __call__(self, width: int, height: int) -> float:
        return uniform(0.5, 1.0) if uniform(0, 1) < 0.5 else uniform(1.0, 2.0)


def scale_rule(text: str) -> ScaleRule:
    """The random scale that `--scale` names: "0.5,0.75,1", "long:200-800" or "half-or-double".

    Raises:
        InputError: none of these.
    """
    try:
        if text == "half-or-double":
            return HalfOrDouble()
        if text.startswith("long:"):
            low, high = map(int, text[5:].split("-"))
            if 0 < low <= high:
                return LongSide(low, high)
        else:
            factors = tuple(float(part) for part in text.split(","))
            if all(0.05 <= factor <= 20 for factor in factors):
                return ScaleFrom(factors)
    except ValueError:
        pass
    raise InputError(f"--scale {text}: give factors such as 0.5,1,2, or long:200-800, or half-or-double")


@dataclass(frozen=True)
class Window:
    """A crop of the scaled picture: `box` (left, top, right, bottom) in source pixels becomes `size` (width, height)."""

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool


@dataclass(frozen=True)
class WeakAugment:
    """Random scale, a square crop at a random place, a horizontal flip with chance 0.5.

    A scaled picture smaller than the crop stays whole; the loader pads it at the right and the bottom. Boxes are whole source
    pixels, so the scale is exact to half a pixel over the crop.
    """

    crop: int
    scale: ScaleRule

    def draw(self, width: int, height: int) -> Window:
        """Draw the window for a picture of `width` x `height` pixels."""
        factor = self.scale(width, height)
        scaled = max(1, round(width * factor)), max(1, round(height * factor))
        size = min(self.crop, scaled[0]), min(self.crop, scaled[1])
        span = max(1, round(size[0] * width / scaled[0])), max(1, round(size[1] * height / scaled[1]))  # source pixels
        left, top = (int(torch.randint(whole - part + 1, ())) for whole, part in zip((width, height), span))
        if factor <= 0.5:  # JPEGs are then decoded at half size: keep picture and mask on the same grid
            left, top = left // 2 * 2, top // 2 * 2
        return Window((left, top, left + span[0], top + span[1]), size, flip=uniform(0, 1) < 0.5)


def fit(pixels: Tensor, window: Window, mode: str) -> Tensor:
    """The pixels under a window's box, resized to the window's size and flipped.

    Scaling down antialiases, like PIL's bilinear, which the released ST++ uses. OpenCV's, which the
    released CPS and CutMix-Seg use, does not.

    Args:
        pixels: (H,W,3) or (H,W) uint8; the box alone, not the whole image.
        window: what was cut.
        mode: "bilinear" (antialiased; torch's uint8 kernel takes a third of PIL's time for the same
            result) or "nearest-exact", for masks.

    Returns:
        (height,width,3) or (height,width) uint8.
    """
    if tuple(pixels.shape[1::-1]) != window.size:
        # [None] first: torch then sees a channels_last image, which it resizes in half the time.
        batch = pixels[None].permute(0, 3, 1, 2) if pixels.ndim == 3 else pixels[None, None]
        antialias = mode == "bilinear"
        batch = F.interpolate(batch, size=window.size[::-1], mode=mode, antialias=antialias)
        pixels = batch[0].permute(1, 2, 0) if pixels.ndim == 3 else batch[0, 0]
    return pixels.flip(1) if window.flip else pixels


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    scale = torch.tensor(IMAGENET_STD, device=device).mul(255)
    return torch.tensor(IMAGENET_MEAN, device=device).mul(255), scale


def normalise(pixels: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """Pixels as the network takes them.

    Args:
        pixels: (N,H,W,3) uint8 RGB.
        valid_mask: (N,H,W) bool, False on padding, which becomes 0; None where there is none.

    Returns:
        (N,3,H,W) float32, ImageNet mean 0 and deviation 1; channels_last on CUDA, contiguous elsewhere.
    """
    mean, std = _statistics(pixels.device)
    images = (pixels.float() - mean) / std
    if valid_mask is not None:
        images = images * valid_mask[..., None]
    images = images.permute(0, 3, 1, 2)
    return images if images.is_cuda else images.contiguous()


# Strong augmentations take and return pixels (H,W,3) uint8 and draw from torch's global generator, which the loader seeds for
# each sample.


@lru_cache
def _photometric(jitter: tuple[float, float, float, float], blur: bool) -> v2.Transform:
    steps = [v2.RandomApply([v2.ColorJitter(*jitter)], p=0.8), v2.RandomGrayscale(p=0.2)]
    if blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5))  # 13: three sigmas each way
    return v2.Compose(steps)


def colour_jitter(pixels: Tensor) -> Tensor:
    """Brightness, contrast, saturation 0.4, hue 0.1 (chance 0.8); grey (0.2).

    Source: the released CutMix-Seg with its follow-up paper, arXiv:2110.04487.
    """
    return _photometric((0.4, 0.4, 0.4, 0.1), False)(pixels.permute(2, 0, 1)).permute(1, 2, 0)


def colour_jitter_and_blur(pixels: Tensor) -> Tensor:
    """ST's: brightness, contrast, saturation 0.5, hue 0.25 (chance 0.8); grey (0.2); blur (0.5).

    The blur's σ is drawn from U(0.1, 2). Source: the released ST++, with another blur filter (see
    the differences in stpp.py).
    """
    return _photometric((0.5, 0.5, 0.5, 0.25), True)(pixels.permute(2, 0, 1)).permute(1, 2, 0)


def cutout(pixels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """ST's Cutout, with chance 0.5: a box of random pixels, ignored in the target.

    Area, aspect ratio and corner are drawn together and rejected together until the box lies inside
    the image. A large box seldom fits at a uniform corner, so small ones prevail: the mean area of
    a box is 0.14 of a square image, not the 0.21 of U(0.02, 0.4).

        area ~ U(0.02, 0.4) · H·W,   aspect = rows / columns ~ U(0.3, 1/0.3),
        corner uniform over the pixels

    Source: the released ST++.

    Args:
        pixels: (H,W,3) uint8.
        target: (H,W) uint8.

    Returns:
        New tensors, or the same ones where nothing is cut.
    """
    height, width = target.shape
    if uniform(0, 1) >= 0.5:
        return pixels, target
    while True:
        area, aspect = uniform(0.02, 0.4) * height * width, uniform(0.3, 1 / 0.3)
        rows, columns = int((area * aspect) ** 0.5), int((area / aspect) ** 0.5)
        top, left = int(torch.randint(height, ())), int(torch.randint(width, ()))
        if top + rows <= height and left + columns <= width:
            break
    pixels, target = pixels.clone(), target.clone()
    # Values 0 to 254: the release draws U(0, 255) and drops the fraction.
    noise = torch.randint(0, 255, (rows, columns, 3), dtype=torch.uint8)
    pixels[top : top + rows, left : left + columns] = noise
    target[top : top + rows, left : left + columns] = IGNORE
    return pixels, target
