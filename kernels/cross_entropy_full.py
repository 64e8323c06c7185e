"""Cross-entropy of logits that have the target's size already: only traffic to save.

There is nothing to interpolate. PyTorch (log_softmax, nll_loss and their backward passes) moves
the N x C x H x W tensor six times. Here the forward pass reads it once and keeps a log-sum-exp a
pixel; the backward pass reads it again and writes the gradient: three times in all. With more than
48 classes the forward pass reads it twice. Logits that are not contiguous (channels_last) are
copied first, in each of the two passes.

No script has such logits. The kernel is kept for two reasons. It is the simplest one with a
softmax over classes, one lane a pixel, and so the step of README.md's ladder between a row of
numbers and a cell. And it is the yardstick for the one idea of this package: it is as fused as a
kernel can be that reads full-resolution logits, and still has to move them three times.

sm_90, 21 classes: 40 and 40 registers, nothing spilled, 18 and 20 instructions a pixel and class;
the backward pass is bound by the traffic. Both take an H200 109 µs at 8 x 21 x 513 x 513.

Equations, arguments and reference are those of `cross_entropy.py`.
"""

import torch
from torch import Tensor

from kernels.cross_entropy_map import check_labels, launch_sum
from kernels.interpolation import (
    LN2,
    LOG2E,
    accumulator,
    ceil_div,
    check_offsets,
    jit,
    on_its_device,
    tl,
    tl_type,
)

LANES = 128
KEPT_CLASSES = 48  # as many classes fit into a lane's registers beside the rest


@jit
def full_size_kernel(
    logits_ptr,  # (N,C,H,W)
    target_ptr,  # (N,H,W) integers
    pixel_weight_ptr,  # (N,H,W) or None
    class_weight_ptr,  # (C,) or None
    partial_ptr,  # (N,programs,2) float64: sums of weight · loss and of weight
    denominator_ptr,  # (N,H,W): log-sum-exp; written going forward, read going backward
    upstream_ptr,  # (): gradient of the loss, or None
    weight_sum_ptr,  # (): what the loss has been divided by, or None
    gradient_ptr,  # (N,C,H,W) in the logits' type, or None
    pixels,
    C: tl.constexpr,
    IGNORE: tl.constexpr,
    KEEP: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
):
    """The loss going forward, or with `gradient_ptr` the gradient; one lane a pixel.

    KEEP holds all classes of a pixel in registers. Going forward they are read once instead of
    twice. Going backward they are all read before the first gradient is written: as the compiler
    cannot know that these do not overlap, it moves no load above a store, and a lane would wait
    for each of its classes in turn.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    here = pixel < pixels
    logits_ptr += image * C * pixels + pixel
    pixel = image * pixels + pixel
    t = tl.load(target_ptr + pixel, mask=here, other=0).to(tl.int32)
    tl.device_assert(((t >= 0) & (t < C)) | (t == IGNORE), "label outside the classes")
    valid = here & (t != IGNORE) & (t >= 0) & (t < C)
    weight = tl.where(valid, 1.0, 0.0).to(ACC)
    if pixel_weight_ptr is not None:
        weight *= tl.load(pixel_weight_ptr + pixel, mask=valid, other=0.0).to(ACC)
    if class_weight_ptr is not None:
        weight *= tl.load(class_weight_ptr + t, mask=valid, other=0.0).to(ACC)

    if gradient_ptr is not None:
        gradient_ptr += image * (C - 1) * pixels + pixel
        denominator = tl.load(denominator_ptr + pixel, mask=here, other=0.0) * LOG2E
        weight *= tl.load(upstream_ptr).to(ACC)
        if weight_sum_ptr is not None:
            weight /= tl.load(weight_sum_ptr)
        if KEEP:
            kept = ()
            for c in tl.static_range(C):
                kept = kept + (
                    tl.load(logits_ptr + c * pixels, mask=here, other=0.0).to(ACC) * LOG2E,
                )
            for c in tl.static_range(C):
                g = weight * (tl.exp2(kept[c] - denominator) - tl.where(t == c, 1.0, 0.0))
                tl.store(gradient_ptr + c * pixels, tl.where(valid, g, 0.0), mask=here)
        else:
            for c in range(C):
                z = tl.load(logits_ptr, mask=here, other=0.0).to(ACC) * LOG2E
                g = weight * (tl.exp2(z - denominator) - tl.where(t == c, 1.0, 0.0))
                tl.store(gradient_ptr, tl.where(valid, g, 0.0), mask=here)
                logits_ptr += pixels
                gradient_ptr += pixels
    else:
        of_label = (
            tl.load(logits_ptr + t.to(tl.int64) * pixels, mask=valid, other=0.0).to(ACC) * LOG2E
        )
        highest = tl.full([LANES], float("-inf"), ACC)
        total = tl.zeros([LANES], ACC)
        if KEEP:
            kept = ()
            for c in tl.static_range(C):
                kept = kept + (
                    tl.load(logits_ptr + c * pixels, mask=here, other=0.0).to(ACC) * LOG2E,
                )
                highest = tl.maximum(highest, kept[c])
            for c in tl.static_range(C):
                total += tl.exp2(kept[c] - highest)
        else:
            again_ptr = logits_ptr
            for _ in tl.range(C, loop_unroll_factor=4):
                highest = tl.maximum(
                    highest, tl.load(logits_ptr, mask=here, other=0.0).to(ACC) * LOG2E
                )
                logits_ptr += pixels
            for _ in tl.range(C, loop_unroll_factor=4):
                total += tl.exp2(tl.load(again_ptr, mask=here, other=0.0).to(ACC) * LOG2E - highest)
                again_ptr += pixels
        denominator = highest + tl.log2(total)
        loss = tl.where(valid, weight * (denominator - of_label) * LN2, 0.0)
        tl.store(denominator_ptr + pixel, denominator * LN2, mask=here)
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial_ptr + 2 * program, tl.sum(loss, 0).to(tl.float64))
        tl.store(partial_ptr + 2 * program + 1, tl.sum(weight, 0).to(tl.float64))


@on_its_device
def launch(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    denominator: Tensor,
    upstream: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """Run the kernel forward, or with `upstream` backward.

    Args:
        logits, target, pixel_weight, class_weight, ignore_index: as in `cross_entropy`, with target
            (N,h,w).
        denominator: (N,h,w), filled with the log-sum-exp; going backward, what the forward pass
            left there.
        upstream: (), gradient of the loss.
        weight_sum: (), what the sum of weight · loss has been divided by, or None where it has not.

    Returns:
        Forward: what `launch_sum` adds up, (N,programs,2) float64. Backward: the gradient of the
        logits, in their type.
    """
    n, classes, h, w = logits.shape
    check_offsets(classes * h * w)
    dtype = accumulator(logits.dtype)
    logits, target, pixel_weight, class_weight = (
        x if x is None else x.contiguous() for x in (logits, target, pixel_weight, class_weight)
    )
    grid = (ceil_div(h * w, LANES), n)
    partial = logits.new_empty((n, grid[0], 2), dtype=torch.float64) if upstream is None else None
    gradient = None if upstream is None else torch.empty_like(logits)
    full_size_kernel[grid](
        logits, target, pixel_weight, class_weight, partial, denominator,
        upstream, weight_sum, gradient,
        h * w, C=classes, IGNORE=ignore_index, KEEP=classes <= KEPT_CLASSES, ACC=tl_type(dtype),
        LANES=LANES, num_warps=LANES // 32,
    )  # fmt: skip
    return partial if upstream is None else gradient


@torch.library.custom_op("semiseg::cross_entropy_full", mutates_args=())
def cross_entropy_full_op(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss and sum of weight, as `divide_by_weight` returns them; log-sum-exp of each pixel."""
    check_labels(target, logits.shape[1], ignore_index)
    dtype = accumulator(logits.dtype)
    denominator = logits.new_empty(target.shape, dtype=dtype)
    partial = launch(logits, target, pixel_weight, class_weight, ignore_index, denominator)
    return *launch_sum(partial, mean, dtype), denominator


@cross_entropy_full_op.register_fake
def _(logits, target, pixel_weight, class_weight, ignore_index, mean):
    return tuple(
        logits.new_empty(shape, dtype=accumulator(logits.dtype)) for shape in ((), (), target.shape)
    )


@torch.library.custom_op("semiseg::cross_entropy_full_backward", mutates_args=())
def cross_entropy_full_backward_op(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    weight_sum: Tensor,
    denominator: Tensor,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """-> gradient of the logits, in their type."""
    inputs = (logits, target, pixel_weight, class_weight, ignore_index, denominator)
    return launch(*inputs, upstream, weight_sum if mean else None)


@cross_entropy_full_backward_op.register_fake
def _(upstream, logits, *others):
    return logits.new_empty(logits.shape)


def save(ctx, inputs, output) -> None:
    """Keep the inputs and the log-sum-exp for the backward pass."""
    *tensors, ctx.ignore_index, ctx.mean = inputs
    _, weight_sum, denominator = output
    ctx.save_for_backward(*tensors, weight_sum, denominator)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(weight_sum, denominator)


def backward(ctx, upstream, _weight_sum, _denominator) -> tuple:
    """Make the gradient from the saved log-sum-exp."""
    if upstream is None:
        return (None,) * 6
    inputs = (upstream, *ctx.saved_tensors, ctx.ignore_index, ctx.mean)
    return cross_entropy_full_backward_op(*inputs), *[None] * 5


cross_entropy_full_op.register_autograd(backward, setup_context=save)
