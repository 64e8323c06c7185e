"""CutMix masks and mixing.

Source: French et al., BMVC 2020, arXiv:1906.01916; CPS, arXiv:2106.01226, section 3.

Boxes are drawn on the CPU for the global batch under (seed, iteration), and each process rasterises its own share: the
masks do not depend on how many processes there are.
"""

import math

import torch
from torch import Tensor

from common.runtime import Runtime, derive_seed


def draw_boxes(
    count: int, boxes: int, area: tuple[float, float], size: int, generator: torch.Generator, even_width: bool = False
) -> Tensor:
    """Random boxes inside a square image.

    The total area share a is U(area), the height exp(u ln a) with u ~ U(0,1), the width a / height (a random aspect ratio
    that fits the image); with several boxes both sides are scaled by sqrt(1 / boxes). The corner is
    uniform over all places at which the box lies inside. Source: the released CutMix-Seg and CPS.

    Args:
        count: pictures.
        boxes: boxes a picture.
        area: range of the area share, each in (0,1].
        size: side of the picture, pixels.
        generator: CPU generator.
        even_width: draw the width from U(a,1) instead, and the height is a / width.

    Returns:
        (count,boxes,4) int64: top, left, bottom, right in pixels, the last two exclusive.
    """
    share = (
        torch.empty(count, boxes).uniform_(*area, generator=generator)
        if area[0] < area[1]
        else torch.full((count, boxes), area[0])
    )
    draw = torch.rand(count, boxes, generator=generator)
    height = share / (share + (1 - share) * draw) if even_width else torch.exp(draw * share.log())
    sides = torch.stack([height, share / height], dim=-1) * math.sqrt(1 / boxes)
    sides = (sides * size).round()
    corner = ((size - sides) * torch.rand(count, boxes, 2, generator=generator)).round()
    return torch.cat([corner, corner + sides], dim=-1).long()


def rasterise(boxes: Tensor, size: int) -> Tensor:
    """Masks (N,size,size) bool of boxes (N,B,4): True inside an odd number of boxes (their XOR)."""
    line = torch.arange(size, device=boxes.device)
    top, left, bottom, right = boxes[..., None].unbind(2)  # (N,B,1) each
    rows = (line >= top) & (line < bottom)  # (N,B,size)
    columns = (line >= left) & (line < right)
    return (rows[..., :, None] & columns[..., None, :]).sum(1) % 2 == 1


def _masks(
    boxes: int,
    area: tuple[float, float],
    batch: int,
    size: int,
    rt: Runtime,
    seed: int,
    iteration: int,
    even_width: bool = False,
) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, iteration, 0xC07))
    drawn = draw_boxes(batch * rt.world, boxes, area, size, generator, even_width)
    mine = drawn[batch * rt.rank : batch * (rt.rank + 1)]
    return rasterise(mine.to(rt.device, non_blocking=True), size)


def half_area_masks(batch: int, size: int, rt: Runtime, seed: int, iteration: int) -> Tensor:
    """CutMix-Seg's masks, (batch,size,size) bool: one box of half the picture's area."""
    return _masks(1, (0.5, 0.5), batch, size, rt, seed, iteration)


def wide_box_masks(batch: int, size: int, rt: Runtime, seed: int, iteration: int) -> Tensor:
    """U2PL's masks, (batch,size,size) bool: one box of half the picture's area, its width from half to the whole."""
    return _masks(1, (0.5, 0.5), batch, size, rt, seed, iteration, even_width=True)


def xor_box_masks(batch: int, size: int, rt: Runtime, seed: int, iteration: int) -> Tensor:
    """CPS's masks, (batch,size,size) bool: three boxes whose areas are drawn from a quarter to half, XOR-ed."""
    return _masks(3, (0.25, 0.5), batch, size, rt, seed, iteration)


def mix(mask: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """`inside` where `mask` (N,H,W) is True, else `outside`; (N,H,W) maps or (N,C,H,W) images and probabilities."""
    return torch.where(mask if inside.ndim == 3 else mask[:, None], inside, outside)
