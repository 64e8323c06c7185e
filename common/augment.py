"""Weak augmentation, the colours of the strong one, and the normalisation on the device.

Weak augmentation is a random scale, crop and flip. The usual way resizes the whole image and then
throws most of it away. Here the window is drawn first, in the coordinates of the scaled image, and
one resize reads only the source pixels under it. Strong augmentation stands in the scripts of its
methods, but for the colours that several of them share.

All draws are from torch's global generator, which the loader seeds for each sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from common import InputError

# RGB, of pixels in [0,1]: the statistics that torchvision's weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IGNORE = 255

ScaleRule = Callable[[int, int], float]  # (width, height) -> factor of the image's own size


def uniform(low: float, high: float) -> float:
    """One draw from U(low, high)."""
    return low + (high - low) * torch.rand(()).item()


@dataclass(frozen=True)
class ScaleFrom:
    """A factor chosen from a list (CPS: 0.5, 0.75, 1, 1.5, 1.75, 2)."""

    factors: tuple[float, ...]

    def __call__(self, width: int, height: int) -> float:
        return self.factors[int(torch.randint(len(self.factors), ()))]


@dataclass(frozen=True)
class ScaleBetween:
    """A factor from U(low, high) (UniMatch: 0.5..2)."""

    low: float
    high: float

    def __call__(self, width: int, height: int) -> float:
        return uniform(self.low, self.high)


@dataclass(frozen=True)
class LongSide:
    """The long side drawn uniformly, in pixels (ST++: 200..800 on VOC)."""

    low: int
    high: int

    def __call__(self, width: int, height: int) -> float:
        return int(torch.randint(self.low, self.high + 1, ())) / max(width, height)


@dataclass(frozen=True)
class HalfOrDouble:
    """U(low, 1) or U(1, high) with equal chance (U2PL: 0.5 and 2)."""

    low: float = 0.5
    high: float = 2.0

    def __call__(self, width: int, height: int) -> float:
        return uniform(self.low, 1.0) if uniform(0, 1) < 0.5 else uniform(1.0, self.high)


def scale_rule(text: str) -> ScaleRule:
    """The random scale that `--scale` names.

    Rules are "0.5,0.75,1", "uniform:0.5-2", "long:200-800", "half-or-double" and the same with
    other ends, "halves:0.1-2".

    Raises:
        InputError: none of these.
    """
    try:
        if text == "half-or-double":
            return HalfOrDouble()
        if text.startswith("long:"):
            low, high = map(int, text.removeprefix("long:").split("-"))
            if 0 < low <= high:
                return LongSide(low, high)
        elif text.startswith("halves:"):
            low, high = map(float, text.removeprefix("halves:").split("-"))
            if 0.05 <= low <= 1 <= high <= 20:
                return HalfOrDouble(low, high)
        elif text.startswith("uniform:"):
            low, high = map(float, text.removeprefix("uniform:").split("-"))
            if 0.05 <= low <= high <= 20:
                return ScaleBetween(low, high)
        else:
            factors = tuple(float(part) for part in text.split(","))
            if all(0.05 <= factor <= 20 for factor in factors):
                return ScaleFrom(factors)
    except ValueError:
        pass
    raise InputError(
        f"--scale {text}: give factors such as 0.5,1,2, or uniform:0.5-2, or halves:0.5-2, "
        "or long:200-800, or half-or-double"
    )


@dataclass(frozen=True)
class Window:
    """A crop of the scaled image.

    Attributes:
        box: (left, top, right, bottom) in source pixels; the last two are one past the end.
        size: (width, height) that the box becomes.
        flip: whether left and right are exchanged.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool


@dataclass(frozen=True)
class WeakAugment:
    """Random scale, a square crop at a random place, a horizontal flip with chance 0.5.

    A scaled image smaller than the crop stays whole; the loader pads it at the right and the
    bottom. Boxes are whole source pixels, so the scale is exact to half a pixel over the crop.

    Attributes:
        crop: its side in pixels.
        scale: draws the factor.
    """

    crop: int
    scale: ScaleRule

    def draw(self, width: int, height: int) -> Window:
        """Draw the window for an image of `width` x `height` pixels."""
        factor = self.scale(width, height)
        size_x, span_x = self.extent(width, factor)
        size_y, span_y = self.extent(height, factor)
        left = int(torch.randint(width - span_x + 1, ()))
        top = int(torch.randint(height - span_y + 1, ()))
        if factor <= 0.5:  # JPEGs are then decoded at half size: image and mask keep one grid
            left, top = left // 2 * 2, top // 2 * 2
        box = left, top, left + span_x, top + span_y
        return Window(box, (size_x, size_y), flip=uniform(0, 1) < 0.5)

    def extent(self, length: int, factor: float) -> tuple[int, int]:
        """A side of the window in scaled pixels, and the source pixels under it."""
        scaled = max(1, round(length * factor))
        size = min(self.crop, scaled)
        return size, max(1, round(size * length / scaled))


def fit(pixels: Tensor, window: Window, mode: str) -> Tensor:
    """The pixels under a window's box, resized to the window's size and flipped.

    Scaling down antialiases, like PIL's bilinear, which the released ST++ uses. OpenCV's, which the
    released CPS, CutMix-Seg and, on VOC, ClassMix use, does not.

    Args:
        pixels: (H,W,3) or (H,W) uint8; the box alone, not the whole image.
        window: what was cut.
        mode: "bilinear", antialiased, for images; torch's uint8 kernel takes a third of PIL's time
            for the same result. "nearest-exact" for masks.

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


# The colours of ST++, UniMatch and PS-MT. Source: their released code; those of the first two blur
# with another filter, PIL's, that of PS-MT with smaller ones.
COLOURS = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, hue=0.25)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        # 13 pixels are three σ each way.
        v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5),
    ]
)


def colour_jitter_and_blur(pixels: Tensor) -> Tensor:
    """Jitter, grey and blur, each by chance; (H,W,3) uint8 to the same."""
    return COLOURS(pixels.permute(2, 0, 1)).permute(1, 2, 0)


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3,) of pixels in 0..255."""
    mean = torch.tensor(IMAGENET_MEAN, device=device).mul(255)
    std = torch.tensor(IMAGENET_STD, device=device).mul(255)
    return mean, std


def normalise(pixels: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """Pixels as the network takes them.

    Args:
        pixels: (N,H,W,3) uint8 RGB.
        valid_mask: (N,H,W) bool, False on padding, which becomes 0; None where there is none.

    Returns:
        (N,3,H,W) float32 with mean 0 and deviation 1 over ImageNet; channels_last on CUDA,
        contiguous elsewhere.
    """
    mean, std = _statistics(pixels.device)
    images = (pixels.float() - mean) / std
    if valid_mask is not None:
        images = images * valid_mask[..., None]
    images = images.permute(0, 3, 1, 2)
    return images if images.is_cuda else images.contiguous()
