"""Hard labels of interpolated logits, with their confidence and entropy.

    z = bilinear(logits)
    p = softmax_c(z)
    label = argmax_c z
    confidence = max_c p
    entropy = -sum_c p log p                                       (nats)

With d = z - max_c z, Z = sum_c exp d and T = sum_c d exp d:

    confidence = 1 / Z
    entropy = log Z - T / Z

So two passes over the classes suffice, one for the maximum and one for both sums, at one
exponential for each pixel and class. The kernel computes in powers of two: it multiplies the logits
by log2(e) when it loads them, and the entropy by ln 2 at the end.

PyTorch interpolates to an N x C x H x W tensor and reads or writes it two times for the label
alone, twelve times for all three. The kernel reads the logits twice and writes the maps: 9
bytes a pixel. One lane owns a cell (see `interpolation.py`).

With a threshold, label = 255 where confidence < threshold, or where a pixel is not valid. Both
passes are needed, but no map of confidences is written: 1 byte a pixel, and 1 is read of the valid
mask. A second launch adds up how many labels the programs have kept.

sm_90, 129 -> 513: 96 registers, nothing spilled, 13 instructions a pixel and class (label alone:
64 and 6; with a threshold 80 and 12), at least 20 µs for a batch of 8 on an H200. Measured: 50 µs
(27; 44).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.interpolation import (
    CELL_LANES,
    LN2,
    accumulator,
    ceil_div,
    cell_axis,
    cell_corners,
    cell_jit,
    chunks,
    implementation,
    interpolate_row,
    load_corners,
    on_its_device,
    plan,
    tl,
    tl_type,
    upsample,
    use_triton,
)

IGNORE = 255  # the label of what is not kept


class PseudoLabel(NamedTuple):
    """Maps of (N,H,W) and a number: the labels, and None for each that was not asked for.

    Attributes:
        label: uint8.
        confidence: float32, in (0,1].
        entropy: float32, nats.
        kept: with a threshold how many labels are not 255, int64 ().
    """

    label: Tensor
    confidence: Tensor | None
    entropy: Tensor | None
    kept: Tensor | None = None


def pseudo_label_reference(
    logits: Tensor,
    size: tuple[int, int],
    align_corners: bool,
    with_confidence: bool,
    with_entropy: bool,
    threshold: float | None,
    valid_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation in plain PyTorch, a few images at a time and in place; results as `launch`."""
    label, confidence, entropy, kept = empty_maps(
        logits, size, with_confidence, with_entropy, threshold is not None
    )
    if threshold is not None:
        kept.zero_()
    for some in chunks(logits, size):
        z = upsample(logits[some], size, align_corners)
        # On a CPU three to five times as fast as argmax(1), which strides over the pixels.
        highest, best = z.max(1, keepdim=True)
        label[some] = best[:, 0]
        if not (with_confidence or with_entropy) and threshold is None:
            continue
        total = torch.zeros_like(highest[:, 0])  # Z
        weighted_sum = torch.zeros_like(total)  # T
        # Class by class, so that no second full-resolution tensor is needed.
        for plane in z.unbind(1):
            d = plane - highest[:, 0]
            e = d.exp()
            total += e
            if with_entropy:
                weighted_sum.addcmul_(e, d)
        sure = (1 / total).float()
        if with_confidence:
            confidence[some] = sure
        if with_entropy:
            entropy[some] = (total.log() - weighted_sum / total).clamp_min(0)
        if threshold is not None:
            dropped = ~(sure >= threshold)  # so that NaN is no confidence
            if valid_mask is not None:
                dropped |= ~valid_mask[some]
            label[some].masked_fill_(dropped, IGNORE)
            kept += (~dropped).sum()
    return label, confidence, entropy, kept


def empty_maps(
    logits: Tensor,
    size: tuple[int, int],
    with_confidence: bool,
    with_entropy: bool,
    with_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors for the results: label uint8, confidence and entropy float32, kept int64.

    The maps are (N,H,W) and the number is (); what was not asked for is empty.
    """
    shape = (len(logits), *size)
    return (
        logits.new_empty(shape, dtype=torch.uint8),
        logits.new_empty(shape if with_confidence else 0, dtype=torch.float32),
        logits.new_empty(shape if with_entropy else 0, dtype=torch.float32),
        logits.new_empty(() if with_kept else 0, dtype=torch.int64),
    )


@cell_jit
def pseudo_label_kernel(
    logits_ptr,  # (N,C,h,w)
    label_ptr,  # (N,H,W) uint8
    confidence_ptr,  # (N,H,W) float32, or None
    entropy_ptr,  # (N,H,W) float32, or None
    valid_ptr,  # (N,H,W) bool: where labels may be kept; None for everywhere
    kept_ptr,  # (N,tiles,programs) int64: how many labels are kept; None without a threshold
    first_y_ptr,  # (h+2,)
    weight_y_ptr,  # (H,)
    first_x_ptr,  # (w+2,)
    weight_x_ptr,  # (W,)
    threshold,  # of the confidence, float32; not read without `kept_ptr`
    h,
    w,
    H,
    W,
    C: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    IGNORE: tl.constexpr,
):
    """Maps of one tile of each cell, ROWS x COLUMNS of its pixels; one lane a cell."""
    ON_NODE: tl.constexpr = RATIO > 0 and RATIO <= ROWS and RATIO <= COLUMNS
    image = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    cell = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row = cell // (w + 1)
    column = cell % (w + 1)
    here = row <= h
    row = tl.minimum(row, h)
    row_slot = tile // COLUMN_TILES * ROWS
    column_slot = tile % COLUMN_TILES * COLUMNS
    y, weight_y, exists_y = cell_axis(row, first_y_ptr, weight_y_ptr, row_slot, H, ROWS, RATIO, ACC)
    x, weight_x, exists_x = cell_axis(
        column, first_x_ptr, weight_x_ptr, column_slot, W, COLUMNS, RATIO, ACC
    )
    kept = tl.zeros([LANES], tl.int32)
    if tl.max((here & exists_y[0] & exists_x[0]).to(tl.int32), 0) > 0:
        corners = cell_corners(row, column, h, w)
        plane = h * w
        logits_ptr += image * C * plane
        label_ptr += image * H * W
        if confidence_ptr is not None:
            confidence_ptr += image * H * W
        if entropy_ptr is not None:
            entropy_ptr += image * H * W
        if valid_ptr is not None:
            valid_ptr += image * H * W
        highest = ()
        best = ()
        for k in tl.static_range(ROWS * COLUMNS):
            highest = highest + (tl.full([LANES], float("-inf"), ACC),)
            best = best + (tl.zeros([LANES], tl.int32),)
        class_ptr = logits_ptr
        for c in range(C):
            corner = load_corners(class_ptr, corners, ACC)
            class_ptr += plane
            higher = ()
            better = ()
            for r in tl.static_range(ROWS):
                z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
                for s in tl.static_range(COLUMNS):
                    better = better + (
                        tl.where(z[s] > highest[r * COLUMNS + s], c, best[r * COLUMNS + s]),
                    )
                    higher = higher + (tl.maximum(highest[r * COLUMNS + s], z[s]),)
            highest = higher
            best = better

        total = ()  # Z
        weighted_sum = ()  # T, in base 2
        if confidence_ptr is not None or entropy_ptr is not None or kept_ptr is not None:
            for k in tl.static_range(ROWS * COLUMNS):
                total = total + (tl.zeros([LANES], ACC),)
                weighted_sum = weighted_sum + (tl.zeros([LANES], ACC),)
            class_ptr = logits_ptr
            for _ in range(C):
                corner = load_corners(class_ptr, corners, ACC)
                class_ptr += plane
                more = ()
                more_weighted = ()
                for r in tl.static_range(ROWS):
                    z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
                    for s in tl.static_range(COLUMNS):
                        d = z[s] - highest[r * COLUMNS + s]
                        e = tl.exp2(d)
                        more = more + (total[r * COLUMNS + s] + e,)
                        more_weighted = more_weighted + (weighted_sum[r * COLUMNS + s] + e * d,)
                total = more
                weighted_sum = more_weighted

        for r in tl.static_range(ROWS):
            for s in tl.static_range(COLUMNS):
                pixel = y[r] * W + x[s]
                exists = here & exists_y[r] & exists_x[s]
                label = best[r * COLUMNS + s]
                if kept_ptr is not None:
                    # The number that is stored as the confidence, so that both agree.
                    sure = (1.0 / total[r * COLUMNS + s]).to(tl.float32)
                    keep = exists & (sure >= threshold)
                    if valid_ptr is not None:
                        keep &= tl.load(valid_ptr + pixel, mask=exists, other=0) != 0
                    label = tl.where(keep, label, IGNORE)
                    kept += keep.to(tl.int32)
                tl.store(label_ptr + pixel, label.to(tl.uint8), mask=exists)
                if confidence_ptr is not None:
                    tl.store(confidence_ptr + pixel, 1.0 / total[r * COLUMNS + s], mask=exists)
                if entropy_ptr is not None:
                    bits = (
                        tl.log2(total[r * COLUMNS + s])
                        - weighted_sum[r * COLUMNS + s] / total[r * COLUMNS + s]
                    )
                    # Not by `tl.maximum`, which makes NaN to 0, as if the network were sure.
                    entropy = tl.where(bits < 0.0, 0.0, bits * LN2)
                    tl.store(entropy_ptr + pixel, entropy, mask=exists)
    if kept_ptr is not None:
        program = tl.program_id(1) * tl.num_programs(2) + tile
        program = program * tl.num_programs(0) + tl.program_id(0)
        tl.store(kept_ptr + program, tl.sum(kept, 0).to(tl.int64))


@on_its_device
def launch(
    logits: Tensor,
    size: tuple[int, int],
    align_corners: bool,
    with_confidence: bool,
    with_entropy: bool,
    threshold: float | None,
    valid_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel: label, confidence, entropy, kept.

    What was not asked for is an empty tensor.
    """
    n, classes, h, w = logits.shape
    logits = logits.contiguous()
    thresholded = threshold is not None
    label, confidence, entropy, kept = empty_maps(
        logits, size, with_confidence, with_entropy, False
    )
    walk = plan(logits, size, align_corners, max_pixels=20)
    grid = (ceil_div((h + 1) * (w + 1), CELL_LANES), n, walk.row_tiles * walk.column_tiles)
    if thresholded:
        kept = logits.new_empty((n, grid[2], grid[0]), dtype=torch.int64)
    pseudo_label_kernel[grid](
        logits, label, confidence if with_confidence else None, entropy if with_entropy else None,
        None if valid_mask is None else valid_mask.contiguous(), kept if thresholded else None,
        *walk.tables, threshold, h, w, *size,
        C=classes, RATIO=walk.ratio, ROWS=walk.rows, COLUMNS=walk.columns,
        COLUMN_TILES=walk.column_tiles, ACC=tl_type(accumulator(logits.dtype)), LANES=CELL_LANES,
        IGNORE=IGNORE, num_warps=1,
    )  # fmt: skip
    return label, confidence, entropy, kept.sum() if thresholded else kept


@torch.library.custom_op("semiseg::pseudo_label", mutates_args=())
def pseudo_label_op(
    logits: Tensor,
    height: int,
    width: int,
    align_corners: bool,
    with_confidence: bool,
    with_entropy: bool,
    threshold: float | None,
    valid_mask: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> label, confidence, entropy, kept; an empty tensor for each that was not asked for."""
    compute = launch if use_triton(impl, logits.device) else pseudo_label_reference
    maps = (with_confidence, with_entropy, threshold, valid_mask)
    return compute(logits, (height, width), align_corners, *maps)


@pseudo_label_op.register_fake
def _(
    logits, height, width, align_corners, with_confidence, with_entropy, threshold, valid_mask, impl
):
    maps = (with_confidence, with_entropy, threshold is not None)
    return empty_maps(logits, (height, width), *maps)


@torch.no_grad()
def pseudo_label(
    logits: Tensor,
    size: tuple[int, int] | None = None,
    *,
    align_corners: bool = True,
    with_confidence: bool = False,
    with_entropy: bool = False,
    threshold: float | None = None,
    valid_mask: Tensor | None = None,
    impl: str = "auto",
) -> PseudoLabel:
    """Label each pixel of the interpolated logits.

    Args:
        logits: (N,C,h,w) float16, bfloat16, float32 or float64, before softmax, finite; C <= 254.
        size: (H,W) of the result; None for the logits' own.
        align_corners: how the bilinear interpolation places its corners.
        with_confidence: also return the largest probability.
        with_entropy: also return the entropy.
        threshold: in [0,1]; the label is 255 where the largest probability is below it.
        valid_mask: (N,H,W) bool, only with a threshold; the label is 255 where it is False.
        impl: "auto", what `set_backend` chose; "triton"; or "torch".

    Returns:
        `PseudoLabel`, without gradient. Of equal logits the lowest class wins.

    Raises:
        ValueError: logits of another rank, more than 254 classes, an empty size, a threshold
            outside [0,1], a mask that does not fit or comes without a threshold, an unknown impl,
            or "triton" without a GPU, or with 2^31 logits or more, or as many pixels of an image.
    """
    if logits.ndim != 4 or logits.shape[1] > 254:
        raise ValueError(f"logits (N,C,h,w) with C <= 254 are needed, not {tuple(logits.shape)}")
    height, width = size or logits.shape[2:]
    if height < 1 or width < 1:
        raise ValueError(f"size {(height, width)}: at least 1 x 1")
    if threshold is None and valid_mask is not None:
        raise ValueError("valid_mask needs a threshold; with 0 every valid pixel keeps its label")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold}: a probability in [0,1]")
    shape = (len(logits), height, width)
    if valid_mask is not None and (valid_mask.shape != shape or valid_mask.dtype != torch.bool):
        raise ValueError(
            f"valid_mask must be {shape} bool, not {tuple(valid_mask.shape)} {valid_mask.dtype}"
        )
    threshold = None if threshold is None else float(threshold)
    maps = (with_confidence, with_entropy, threshold, valid_mask)
    impl = implementation(impl, logits.device)
    label, confidence, entropy, kept = pseudo_label_op(
        logits, height, width, align_corners, *maps, impl
    )
    return PseudoLabel(
        label,
        confidence if with_confidence else None,
        entropy if with_entropy else None,
        None if threshold is None else kept,
    )
