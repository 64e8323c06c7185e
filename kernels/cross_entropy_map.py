"""The cross-entropy of each pixel, or its sum, without gradient.

The loss of a pixel is log sum_c exp z(c) - z(t), with z interpolated from the logits. The kernel
passes over the classes twice, for the maximum and for the sum of exponentials, and then fetches
the four corners of the label's class. One lane owns a cell (see `interpolation.py`); nothing is
joined between lanes, so that this is the kernel to read before `cross_entropy.py`.

It serves reduction="none" (hard example mining) and losses that are only reported.

sm_90, 129 -> 513: 64 registers, nothing spilled, 9.7 instructions a pixel and class, at least 15
µs for a batch of 8 on an H200; its time was not measured.
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
    in_full_precision,
    interpolate_row,
    jit,
    load_corners,
    log_sum_exp,
    on_its_device,
    plan,
    tl,
    tl_type,
    upsample,
    use_triton,
)

SUM_BLOCK = 4096  # partial sums that `sum_kernel` adds at a time


class Pixels(NamedTuple):
    """What both references of the cross-entropy make of some images, in the type to compute in.

    Attributes:
        label: (n,1,H,W) int64; 0 where a pixel is ignored.
        weight: (n,H,W), pixel_weight · class_weight; 0 where a pixel is ignored.
        loss: (n,H,W), weight · loss of each pixel.
        exponentials: (n,C,H,W), exp(z - max_c z).
        total: (n,1,H,W), their sum over the classes.
    """

    label: Tensor
    weight: Tensor
    loss: Tensor
    exponentials: Tensor
    total: Tensor


def pixels_of(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    some: slice,
) -> Pixels:
    """Losses and softmax of `some` images of the batch; one full-resolution tensor is alive.

    Arguments as in `cross_entropy`.
    """
    dtype, size = accumulator(logits.dtype), tuple(target.shape[1:])
    label = target[some].long()
    # As in the kernels, a label outside the classes does not count; CPUs refuse it before.
    valid = (label != ignore_index) & (label >= 0) & (label < logits.shape[1])
    label = label.where(valid, 0)[:, None]
    weight = valid.to(dtype)
    if pixel_weight is not None:
        weight *= pixel_weight[some]
    if class_weight is not None:
        weight *= class_weight.to(dtype)[label[:, 0]]

    z = upsample(logits[some], size, align_corners)
    if logits.shape[2:] == size and logits.dtype == dtype:  # these are the logits themselves
        z = z.clone()

    # log sum_c exp z(c) - z(t), with the maximum taken out of the sum
    of_label = z.gather(1, label)
    highest = z.amax(1, keepdim=True)
    exponentials = z.sub_(highest).exp_()
    total = exponentials.sum(1, keepdim=True)
    loss = weight[:, None] * (total.log() + highest - of_label)
    loss = loss.where(valid[:, None], 0)[:, 0]
    return Pixels(label, weight, loss, exponentials, total)


@in_full_precision
def cross_entropy_map_reference(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """The operation in plain PyTorch, a few images at a time: weight · loss of each pixel, (N,H,W).

    Arguments as in `cross_entropy`.
    """
    inputs = (logits, target, pixel_weight, class_weight, ignore_index, align_corners)
    size = tuple(target.shape[1:])
    loss_map = logits.new_empty(target.shape, dtype=accumulator(logits.dtype))
    for some in chunks(logits, size):
        loss_map[some] = pixels_of(*inputs, some).loss
    return loss_map


@cell_jit
def forward_kernel(
    logits_ptr,  # (N,C,h,w)
    target_ptr,  # (N,H,W) integers
    pixel_weight_ptr,  # (N,H,W) or None
    class_weight_ptr,  # (C,) or None
    loss_ptr,  # (N,H,W): weight · loss of each pixel, or None
    partial_ptr,  # (N,tiles,programs,2) float64: sums of weight · loss and of weight, or None
    first_y_ptr,  # (h+2,)
    weight_y_ptr,  # (H,)
    first_x_ptr,  # (w+2,)
    weight_x_ptr,  # (W,)
    h,
    w,
    H,
    W,
    C: tl.constexpr,
    IGNORE: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
):
    """Loss of one tile of each cell, ROWS x COLUMNS of its pixels; one lane a cell."""
    ON_NODE: tl.constexpr = RATIO > 0 and RATIO <= ROWS and RATIO <= COLUMNS
    image = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    plane = h * w
    logits_ptr += image * C * plane
    target_ptr += image * H * W
    if pixel_weight_ptr is not None:
        pixel_weight_ptr += image * H * W
    if loss_ptr is not None:
        loss_ptr += image * H * W
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
    loss_sum = tl.zeros([LANES], ACC)
    weight_sum = tl.zeros([LANES], ACC)
    if tl.max((here & exists_y[0] & exists_x[0]).to(tl.int32), 0) > 0:
        corners = cell_corners(row, column, h, w)
        log_sum = log_sum_exp(
            logits_ptr, corners, plane, weight_y, weight_x, C, ROWS, COLUMNS, ON_NODE, ACC
        )
        for r in tl.static_range(ROWS):
            for s in tl.static_range(COLUMNS):
                pixel = y[r] * W + x[s]
                exists = here & exists_y[r] & exists_x[s]
                t = tl.load(target_ptr + pixel, mask=exists, other=0).to(tl.int32)
                tl.device_assert(((t >= 0) & (t < C)) | (t == IGNORE), "label outside the classes")
                valid = exists & (t != IGNORE) & (t >= 0) & (t < C)
                weight = tl.where(valid, 1.0, 0.0).to(ACC)
                if pixel_weight_ptr is not None:
                    weight *= tl.load(pixel_weight_ptr + pixel, mask=valid, other=0.0).to(ACC)
                if class_weight_ptr is not None:
                    weight *= tl.load(class_weight_ptr + t, mask=valid, other=0.0).to(ACC)
                corner = load_corners(logits_ptr + tl.where(valid, t, 0) * plane, corners, ACC)
                z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
                loss = tl.where(valid, weight * (log_sum[r * COLUMNS + s] - z[s]) * LN2, 0.0)
                if loss_ptr is not None:
                    tl.store(loss_ptr + pixel, loss, mask=exists)
                loss_sum += loss
                weight_sum += weight
            # Keeps the compiler from having the loads of all rows in flight, in more registers than
            # there are.
            tl.debug_barrier()
    if partial_ptr is not None:
        program = tl.program_id(1) * tl.num_programs(2) + tile
        program = program * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial_ptr + 2 * program, tl.sum(loss_sum, 0).to(tl.float64))
        tl.store(partial_ptr + 2 * program + 1, tl.sum(weight_sum, 0).to(tl.float64))


@jit
def sum_kernel(
    partial_ptr,  # (count,2) float64: sums of weight · loss and of weight
    loss_ptr,  # ()
    weight_ptr,  # ()
    count,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,  # count / BLOCK, rounded up
):
    """Add up what the programs of a cross-entropy have left, in one program and a fixed order."""
    losses = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    for turn in range(TURNS):
        at = turn * BLOCK + tl.arange(0, BLOCK)
        losses += tl.load(partial_ptr + 2 * at, mask=at < count, other=0.0)
        weights += tl.load(partial_ptr + 2 * at + 1, mask=at < count, other=0.0)
    loss = tl.sum(losses, 0)
    weight = tl.sum(weights, 0).to(weight_ptr.dtype.element_ty)
    if MEAN:
        weight = tl.where(weight == 0, 1.0, weight)  # 0 / 0 is 0
        loss = loss / weight
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(weight_ptr, weight)


@on_its_device
def launch_sum(partial: Tensor, mean: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run the kernel: (...,2) float64 partial sums -> what `divide_by_weight` returns."""
    loss, weight = partial.new_empty((), dtype=dtype), partial.new_empty((), dtype=dtype)
    count = partial.numel() // 2
    sum_kernel[(1,)](
        partial, loss, weight, count, MEAN=mean, BLOCK=SUM_BLOCK,
        TURNS=ceil_div(count, SUM_BLOCK), num_warps=16,
    )  # fmt: skip
    return loss, weight


def divide_by_weight(loss_sum: Tensor, weight_sum: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Divide the loss for the mean.

    Returns:
        The loss, and the sum of weights. For the mean, 1 stands for a sum of 0, which no number
        is divided by: the loss and its gradient, however much it is scaled, are then 0.
    """
    if not mean:
        return loss_sum, weight_sum
    weight_sum = weight_sum.where(weight_sum != 0, 1)
    return loss_sum / weight_sum, weight_sum


@on_its_device
def launch_forward(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    loss_map: Tensor | None = None,
) -> Tensor | None:
    """Run the kernel. Arguments as in `cross_entropy`; `loss_map` takes (N,H,W) losses.

    Returns:
        What `launch_sum` adds up: (N,tiles,programs,2) float64. None where `loss_map` takes the
        losses instead.
    """
    (n, classes, h, w), size, dtype = (
        logits.shape,
        tuple(target.shape[1:]),
        accumulator(logits.dtype),
    )
    logits, target, pixel_weight, class_weight = (
        x if x is None else x.contiguous() for x in (logits, target, pixel_weight, class_weight)
    )
    walk = plan(logits, size, align_corners, max_pixels=20)
    grid = (ceil_div((h + 1) * (w + 1), CELL_LANES), n, walk.row_tiles * walk.column_tiles)
    partial = None
    if loss_map is None:
        partial = logits.new_empty((n, grid[2], grid[0], 2), dtype=torch.float64)
    forward_kernel[grid](
        logits, target, pixel_weight, class_weight, loss_map, partial, *walk.tables, h, w, *size,
        C=classes, IGNORE=ignore_index, RATIO=walk.ratio, ROWS=walk.rows, COLUMNS=walk.columns,
        COLUMN_TILES=walk.column_tiles, ACC=tl_type(dtype), LANES=CELL_LANES, num_warps=1,
    )  # fmt: skip
    return partial


@torch.library.custom_op("semiseg::cross_entropy_map", mutates_args=())
def cross_entropy_map_op(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    impl: str,
) -> Tensor:
    """-> weight · loss of each pixel, (N,H,W)."""
    check_labels(target, logits.shape[1], ignore_index)
    inputs = (logits, target, pixel_weight, class_weight, ignore_index, align_corners)
    if not use_triton(impl, logits.device):
        return cross_entropy_map_reference(*inputs)
    loss_map = logits.new_empty(target.shape, dtype=accumulator(logits.dtype))
    launch_forward(*inputs, loss_map)
    return loss_map


@cross_entropy_map_op.register_fake
def _(logits, target, pixel_weight, class_weight, ignore_index, align_corners, impl):
    return logits.new_empty(target.shape, dtype=accumulator(logits.dtype))


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError if a label on a CPU is outside the classes.

    On a GPU the question would cost a synchronisation.
    """
    if target.device.type != "cpu":
        return
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        wrong = target[outside][0].item()
        raise ValueError(
            f"label {wrong} in target, but there are {classes} classes (ignored: {ignore_index})"
        )
