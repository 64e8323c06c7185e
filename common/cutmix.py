"""Mixing two images: CutMix's boxes, ClassMix's classes.

Sources: French et al., BMVC 2020, arXiv:1906.01916; CPS, arXiv:2106.01226, section 3; UniMatch,
arXiv:2208.09910; ClassMix, arXiv:2007.07936.

Boxes are drawn on the CPU for the global batch under (seed, iteration), and each process rasterises
its own share: the masks do not depend on how many processes there are. The same holds for the
numbers by which ClassMix chooses.
"""

import math
import random

import torch
from torch import Tensor

from common import distributed
from common.runtime import derive_seed


def draw_boxes(
    count: int,
    boxes: int,
    area: tuple[float, float],
    size: int,
    generator: torch.Generator,
    even_width: bool = False,
) -> Tensor:
    """Random boxes inside a square image.

        a ~ U(area),   u ~ U(0,1),   height = exp(u ln a),   width = a / height

    in units of the image's side: a box of area a and a random aspect ratio that fits the image.
    With several boxes, both sides of each are scaled by sqrt(1 / boxes). The corner is uniform over
    all places at which the box lies inside; rounded, so that the two ends come half as often.

    Source: the released CutMix-Seg and CPS.

    Args:
        count: images.
        boxes: boxes an image.
        area: range of the area share, each in (0,1].
        size: side of the image, pixels.
        generator: CPU generator.
        even_width: draw the width from U(a,1) instead; the height is then a / width.

    Returns:
        (count,boxes,4) int64: top, left, bottom, right in pixels, the last two exclusive.
    """
    share = torch.full((count, boxes), area[0])
    if area[0] < area[1]:
        share = torch.empty(count, boxes).uniform_(*area, generator=generator)
    draw = torch.rand(count, boxes, generator=generator)

    if even_width:  # U2PL: width ~ U(a,1)
        height = share / (share + (1 - share) * draw)
    else:  # CutMix-Seg, CPS: the height is log-uniform in [a,1]
        height = torch.exp(draw * share.log())
    width = share / height

    sides = torch.stack([height, width], dim=-1) * math.sqrt(1 / boxes)
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


def box_masks(
    count: int,
    size: int,
    seed: int,
    iteration: int,
    device: torch.device,
    *,
    boxes: int = 1,
    area: tuple[float, float] = (0.5, 0.5),
    even_width: bool = False,
) -> Tensor:
    """CutMix masks of this process's images in an iteration.

    Args:
        count: images a process.
        size: side of the images, pixels.
        seed: the run's.
        iteration: masks of two iterations are independent.
        device: where to put them.
        boxes, area, even_width: see `draw_boxes`.

    Returns:
        (count,size,size) bool, True inside an odd number of the image's boxes.
    """
    mine = boxes_of_process(count, size, seed, iteration, boxes, area, even_width)
    return rasterise(mine.to(device, non_blocking=True), size)


def boxes_of_process(
    count: int,
    size: int,
    seed: int,
    iteration: int,
    boxes: int = 1,
    area: tuple[float, float] = (0.5, 0.5),
    even_width: bool = False,
) -> Tensor:
    """The boxes of `box_masks`, (count,boxes,4) int64 on the CPU; see `draw_boxes`."""
    generator = torch.Generator().manual_seed(derive_seed(seed, iteration, 0xC07))
    everywhere = count * distributed.world_size()
    drawn = draw_boxes(everywhere, boxes, area, size, generator, even_width)
    first = count * distributed.rank()
    return drawn[first : first + count]


def half_area_masks(
    count: int, size: int, seed: int, iteration: int, device: torch.device
) -> Tensor:
    """CutMix-Seg's masks, (count,size,size) bool: one box of half the image's area."""
    return box_masks(count, size, seed, iteration, device)


def wide_box_masks(
    count: int, size: int, seed: int, iteration: int, device: torch.device
) -> Tensor:
    """U2PL's masks, (count,size,size) bool: one box of half the image's area.

    Its width is drawn from half to the whole of the image's.
    """
    return box_masks(count, size, seed, iteration, device, even_width=True)


def xor_box_masks(
    count: int, size: int, seed: int, iteration: int, device: torch.device
) -> Tensor:
    """CPS's masks, (count,size,size) bool: the XOR of three boxes.

    Their areas add up to a quarter to half of the image's.
    """
    return box_masks(count, size, seed, iteration, device, boxes=3, area=(0.25, 0.5))


def draw_small_box(size: int, generator: random.Random) -> tuple[int, int, int, int]:
    """UniMatch's box: with chance 0.5 none, else a small one of a random aspect ratio.

        area ~ U(0.02, 0.4),   aspect = height / width ~ U(0.3, 1/0.3),
        corner uniform over the pixels

    Aspect ratio and corner are drawn again until the box lies inside the image; the area stays.
    More boxes are taller than wide (73 %), since U(0.3, 1/0.3) favours aspects above 1.

    Source: the released UniMatch.

    Args:
        size: side of the image, pixels.
        generator: what to draw from. It is Python's own: a box takes six tries on average, of three
            single numbers each, and one of torch's takes tens of times as long to draw.

    Returns:
        top, left, bottom, right in pixels, the last two exclusive; all 0 where there is no box.
    """
    if generator.random() >= 0.5:
        return 0, 0, 0, 0
    area = generator.uniform(0.02, 0.4) * size * size
    while True:
        aspect = generator.uniform(0.3, 1 / 0.3)
        height, width = int(math.sqrt(area * aspect)), int(math.sqrt(area / aspect))
        top, left = generator.randrange(size), generator.randrange(size)
        if top + height <= size and left + width <= size:
            return top, left, top + height, left + width


def small_box_masks(
    count: int, size: int, seed: int, iteration: int, view: int, device: torch.device
) -> Tensor:
    """UniMatch's masks of this process's images, (count,size,size) bool, True inside the box.

    Args:
        count: images a process.
        size: side of the images, pixels.
        seed: the run's.
        iteration: masks of two iterations are independent ...
        view: ... and so are those of two views.
        device: where to put them.
    """
    generator = random.Random(derive_seed(seed, iteration, view, 0x5B0))
    everywhere = count * distributed.world_size()
    drawn = torch.tensor([draw_small_box(size, generator) for _ in range(everywhere)])
    first = count * distributed.rank()
    mine = drawn[first : first + count, None]  # (count,1,4)
    return rasterise(mine.to(device, non_blocking=True), size)


def class_masks(
    labels: Tensor, num_classes: int, seed: int, iteration: int, round_up: bool = False
) -> Tensor:
    """ClassMix's masks: the pixels of a random half of the K classes in each image.

    Chosen are ⌊K/2⌋ of them, so that an image of one class is not pasted at all. Source: Olsson et
    al., arXiv:2007.07936, and its released code.

    Everything happens on the labels' device and nothing waits for it: no loop asks which classes an
    image has.

    Args:
        labels: (N,H,W) labels of this process's images; 255 is no class and never inside.
        num_classes: C.
        seed: the run's.
        iteration: masks of two iterations are independent.
        round_up: choose ⌈K/2⌉ instead, as DACS does (Tranheden et al., arXiv:2007.08702).

    Returns:
        (N,H,W) bool, True on the chosen classes.
    """
    count, device = len(labels), labels.device
    flat = labels.flatten(1).long()  # (N,H·W)
    present = torch.zeros(count, 256, dtype=torch.bool, device=device).scatter_(1, flat, True)
    present = present[:, :num_classes]  # (N,C)

    # A number for each class of each image, drawn for all processes; the lowest are chosen.
    generator = torch.Generator().manual_seed(derive_seed(seed, iteration, 0xC1A))
    drawn = torch.rand(count * distributed.world_size(), num_classes, generator=generator)
    first = count * distributed.rank()
    drawn = drawn[first : first + count].to(device, non_blocking=True)
    rank = drawn.masked_fill(~present, 2).argsort(1).argsort(1)  # absent classes come last
    half = (present.sum(1, keepdim=True) + round_up) // 2

    chosen = torch.zeros(count, 256, dtype=torch.bool, device=device)
    chosen[:, :num_classes] = rank < half
    return chosen.gather(1, flat).view(labels.shape)


def mix(mask: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """`inside` where `mask` (N,H,W) is True, else `outside`.

    These are maps (N,H,W), or images or probabilities (N,C,H,W).
    """
    return torch.where(mask if inside.ndim == 3 else mask[:, None], inside, outside)
