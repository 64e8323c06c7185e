"""Pixel-wise cross-entropy of logits that are interpolated to the target's size, with its gradient.

    z(n,c,y,x) = bilinear(logits)                              at the target's resolution
    loss       = sum_{n,y,x} w · (log sum_c exp z(c) - z(t))   t = target
                                                               w = pixel_weight · class_weight[t]
    d loss / d z(c) = w · (softmax(z)(c) - [c = t])

and from z to the logits by the transposed interpolation.

Plain PyTorch (interpolate, cross_entropy, backward) reads or writes a tensor of N x C x H x W
floats eight times: 1.4 GB for 8 x 21 x 513 x 513, 1.54 GB with the labels and the rest. The
kernel reads the logits (at stride 4 a sixteenth of that) three times for the even and three times
for the odd rows of cells, the labels once, and writes two float32 parts of the gradient of the
logits: 30 MB if the caches hold what is read again, 58 MB if they hold nothing. Around it,
bfloat16 logits that come as channels_last, as the networks give them, are copied to planes
(11 MB), and the backward pass adds the two parts and scales them (28 MB): 69 to 97 MB in all. A
second launch adds up the programs' sums.

It is bound by instructions instead: two exponentials and about 22 instructions a pixel and class.
(`python -m kernels.aot`, sm_90: 96 registers for 129 -> 513, 112 for 128 -> 512, nothing spilled;
to issue the instructions for a batch of 8 takes an H200 at least 34 and 42 µs at 1.755 GHz.
Measured, with the launches around it, of which the last has changed since: 82 and 101 µs.)

Each lane owns a cell (see `interpolation.py`) and passes over the classes three times: for the
maximum, for the sum of exponentials, and for the gradient, which it collapses to the cell's four
corners. A GPU has powers of two alone: the logits are multiplied by log2(e) when they are loaded,
so that exp becomes exp2, and the loss by ln 2 at the end.

A node is a corner of four cells. The left and the right one are neighbouring lanes, which exchange
their sums; the last lane of a program only recomputes for its neighbour. Of the upper and the
lower one, one lies in an even row of cells and one in an odd row. Each of the two writes its part
of the node's gradient to a tensor of its own, so that every number has one writer: no atomics, no
program waits for another, the same bits from run to run. The backward pass adds the two parts.

Logits at the target's own size need no interpolation and have their own kernel, in
`cross_entropy_full.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy_full import cross_entropy_full_op
from kernels.cross_entropy_map import (
    check_labels,
    cross_entropy_map_op,
    divide_by_weight,
    launch_forward,
    launch_sum,
    pixels_of,
)
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
    in_full_precision,
    interpolate_row,
    jit,
    load_corners,
    log_sum_exp,
    on_its_device,
    plan,
    register_limit,
    tl,
    tl_type,
    use_triton,
)

# Registers of a lane, as the compiler may use them without spilling: for exact ratios, and for
# others. With at most 96, 20 programs share a multiprocessor of sm_90, with more 16: each of its
# four schedulers has 16,384 registers, for whole programs of 32 lanes. On an H200 96 are slower for
# the other ratios: 105 instead of 102 µs, in one run.
LIMITS = 96, 112
ADD_BLOCK = 1024  # numbers a program


@in_full_precision
def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation in plain PyTorch, a few images at a time and in place.

    One full-resolution tensor is alive at most.

    Args:
        logits, target, pixel_weight, class_weight, ignore_index, align_corners: as in
            `cross_entropy`.
        with_gradient: whether to compute the gradient.

    Returns:
        Sum of weight · loss, (); sum of weight, (); and the gradient of the first with respect to
        the logits, (N,C,h,w), or an empty tensor.
    """
    dtype, device = accumulator(logits.dtype), logits.device
    nodes, size = tuple(logits.shape[2:]), tuple(target.shape[1:])
    inputs = (logits, target, pixel_weight, class_weight, ignore_index, align_corners)
    loss_sum, weight_sum = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
    gradient = torch.empty(logits.shape if with_gradient else 0, dtype=dtype, device=device)
    if with_gradient and nodes != size:
        from_rows, from_columns = (
            interpolation_matrix(few, many, align_corners, dtype, device)
            for few, many in zip(nodes, size, strict=True)
        )  # (h,H), (w,W)

    for some in chunks(logits, size):
        label, weight, loss, z, total = pixels_of(*inputs, some)
        loss_sum += loss.sum(dtype=torch.float64)
        weight_sum += weight.sum(dtype=torch.float64)
        if with_gradient:
            # w · (softmax(z)(c) - [c = t])
            of_label = z.gather(1, label) / total - 1
            z *= weight[:, None] / total
            z.scatter_(1, label, weight[:, None] * of_label)
            gradient[some] = z if nodes == size else from_rows @ (z @ from_columns.T)
    return loss_sum.to(dtype), weight_sum.to(dtype), gradient


def interpolation_matrix(
    nodes: int, outputs: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(nodes,outputs): what each node gives to each output; what interpolates is its transpose.

    The transposed interpolation is then two matrix products: deterministic, and at least as fast
    as torch's own.
    """
    each = torch.eye(nodes, dtype=dtype, device=device)[None]
    return F.interpolate(each, size=outputs, mode="linear", align_corners=align_corners)[0]


@cell_jit
def cross_entropy_kernel(
    logits_ptr,  # (N,C,h,w)
    target_ptr,  # (N,H,W) integers
    pixel_weight_ptr,  # (N,H,W) or None
    class_weight_ptr,  # (C,) or None
    partial_ptr,  # (2,N,programs,2) float64: sums of weight · loss and of weight
    gradient_ptr,  # (2,N,C,h,w) in ACC: what even and what odd rows of cells give
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
    ROW_TILES: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
):
    """Loss and gradient of cells of an even or of an odd row.

    One lane has one cell, and takes ROWS x COLUMNS of its pixels at a time.
    """
    ON_NODE: tl.constexpr = RATIO > 0 and RATIO <= ROWS and RATIO <= COLUMNS
    WEIGHTED: tl.constexpr = pixel_weight_ptr is not None or class_weight_ptr is not None
    TILES: tl.constexpr = ROW_TILES * COLUMN_TILES
    image = tl.program_id(1).to(tl.int64)
    odd = tl.program_id(2)
    plane = h * w
    logits_ptr += image * C * plane
    gradient_ptr += (odd * tl.num_programs(1) + image) * C * plane
    target_ptr += image * H * W
    if pixel_weight_ptr is not None:
        pixel_weight_ptr += image * H * W
    lane = tl.arange(0, LANES)
    next_lane = tl.minimum(lane + 1, LANES - 1)
    cell = tl.program_id(0) * (LANES - 1) + lane
    row = cell // (w + 1) * 2 + odd
    column = cell % (w + 1)
    here = row <= h
    own = here & (lane < LANES - 1)
    # Whether the corners on the right are nodes, for this lane to write.
    has_top = own & (row > 0) & (column < w)
    has_bottom = own & (row < h) & (column < w)
    row = tl.minimum(row, h)
    corners = cell_corners(row, column, h, w)
    loss_sum = tl.zeros([LANES], ACC)
    weight_sum = tl.zeros([LANES], ACC)
    for tile in range(TILES):
        row_slot = tile // COLUMN_TILES * ROWS
        column_slot = tile % COLUMN_TILES * COLUMNS
        y, weight_y, exists_y = cell_axis(
            row, first_y_ptr, weight_y_ptr, row_slot, H, ROWS, RATIO, ACC
        )
        x, weight_x, exists_x = cell_axis(
            column, first_x_ptr, weight_x_ptr, column_slot, W, COLUMNS, RATIO, ACC
        )
        occupied = tl.max((here & exists_y[0] & exists_x[0]).to(tl.int32), 0)
        # Most cells have pixels in the first tile alone, so the others are skipped where they are
        # empty. The first never is: its store is what initialises the gradient.
        if (tile == 0) | (occupied > 0):
            label = ()
            weight = ()
            for r in tl.static_range(ROWS):
                for s in tl.static_range(COLUMNS):
                    pixel = y[r] * W + x[s]
                    exists = here & exists_y[r] & exists_x[s]
                    t = tl.load(target_ptr + pixel, mask=exists, other=0).to(tl.int32)
                    tl.device_assert(
                        ((t >= 0) & (t < C)) | (t == IGNORE), "label outside the classes"
                    )
                    valid = exists & (t != IGNORE) & (t >= 0) & (t < C)
                    # As a float: a comparison with the class counter below is then one instruction.
                    # -1 does not count.
                    label = label + (tl.where(valid, t, -1).to(tl.float32),)
                    v = tl.where(valid, 1.0, 0.0).to(ACC)
                    if pixel_weight_ptr is not None:
                        v *= tl.load(pixel_weight_ptr + pixel, mask=valid, other=0.0).to(ACC)
                    if class_weight_ptr is not None:
                        v *= tl.load(class_weight_ptr + t, mask=valid, other=0.0).to(ACC)
                    weight_sum += tl.where(own, v, 0.0)
                    if WEIGHTED:
                        weight = weight + (v,)

            log_sum = log_sum_exp(
                logits_ptr, corners, plane, weight_y, weight_x, C, ROWS, COLUMNS, ON_NODE, ACC
            )
            denominator = ()
            for k in tl.static_range(ROWS * COLUMNS):
                # So large where a pixel does not count that all its probabilities are 0.
                denominator = denominator + (tl.where(label[k] >= 0, log_sum[k], 1e30),)

            class_ptr = logits_ptr
            label_c = tl.zeros([LANES], tl.float32)
            for c in range(C):
                corner = load_corners(class_ptr, corners, ACC)
                class_ptr += plane
                # Sums of g times the pixels' weights: for both left corners, for both right ones,
                # and for the bottom ones. A row of pixels has the weights wy (bottom) and 1 - wy
                # (top), so that the top corners get what the bottom ones leave.
                left_sum = tl.zeros([LANES], ACC)
                right_sum = tl.zeros([LANES], ACC)
                bottom_left = tl.zeros([LANES], ACC)
                bottom_right = tl.zeros([LANES], ACC)
                for r in tl.static_range(ROWS):
                    z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
                    of_row = tl.zeros([LANES], ACC)
                    row_right = tl.zeros([LANES], ACC)
                    for s in tl.static_range(COLUMNS):
                        log_prob = z[s] - denominator[r * COLUMNS + s]
                        hit = tl.where(label[r * COLUMNS + s] == label_c, 1.0, 0.0).to(ACC)
                        g = tl.exp2(log_prob)
                        if WEIGHTED:
                            hit *= weight[r * COLUMNS + s]
                            g *= weight[r * COLUMNS + s]
                        loss_sum -= hit * log_prob
                        g -= hit
                        of_row += g
                        if not (ON_NODE and s == 0):
                            row_right += g * weight_x[s]
                    row_left = of_row - row_right
                    left_sum += row_left
                    right_sum += row_right
                    if not (ON_NODE and r == 0):
                        bottom_left += row_left * weight_y[r]
                        bottom_right += row_right * weight_y[r]
                label_c += 1.0
                # The node at this cell's right is the one at the next cell's left, in the next
                # lane.
                top_of_next = tl.gather(left_sum - bottom_left, next_lane, 0)
                top = right_sum - bottom_right + top_of_next
                bottom = bottom_right + tl.gather(bottom_left, next_lane, 0)
                at_top = gradient_ptr + c * plane + corners[1]
                at_bottom = gradient_ptr + c * plane + corners[3]
                if TILES > 1:
                    top += tl.load(at_top, mask=has_top & (tile > 0), other=0.0)
                    bottom += tl.load(at_bottom, mask=has_bottom & (tile > 0), other=0.0)
                tl.store(at_top, top, mask=has_top)
                tl.store(at_bottom, bottom, mask=has_bottom)
    program = (odd * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    loss_of_program = tl.sum(tl.where(own, loss_sum, 0.0), 0) * LN2
    tl.store(partial_ptr + 2 * program, loss_of_program.to(tl.float64))
    tl.store(partial_ptr + 2 * program + 1, tl.sum(weight_sum, 0).to(tl.float64))


@on_its_device
def launch(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernel. Arguments as in `cross_entropy_reference`.

    Returns:
        What `launch_sum` adds up, (2,N,programs,2) float64; the two parts of the gradient of the
        sum of weight · loss, (2,N,C,h,w).
    """
    n, classes, h, w = logits.shape
    size, dtype = tuple(target.shape[1:]), accumulator(logits.dtype)
    logits, target, pixel_weight, class_weight = (
        x if x is None else x.contiguous() for x in (logits, target, pixel_weight, class_weight)
    )
    weighted = pixel_weight is not None or class_weight is not None
    walk = plan(logits, size, align_corners, max_pixels=16 if weighted else 20)
    gradient = logits.new_empty((2, *logits.shape), dtype=dtype)
    limit = 128 if weighted else LIMITS[0 if walk.ratio else 1]
    grid = (ceil_div((h // 2 + 1) * (w + 1), CELL_LANES - 1), n, 2)
    partial = logits.new_empty((2, n, grid[0], 2), dtype=torch.float64)
    cross_entropy_kernel[grid](
        logits, target, pixel_weight, class_weight, partial, gradient, *walk.tables, h, w, *size,
        C=classes, IGNORE=ignore_index, RATIO=walk.ratio, ROWS=walk.rows, COLUMNS=walk.columns,
        ROW_TILES=walk.row_tiles, COLUMN_TILES=walk.column_tiles, ACC=tl_type(dtype),
        LANES=CELL_LANES, num_warps=1, **register_limit(limit),
    )  # fmt: skip
    return partial, gradient


@torch.library.custom_op("semiseg::cross_entropy", mutates_args=())
def cross_entropy_op(
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    mean: bool,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss and sum of weight, as `divide_by_weight` returns them; gradient of the undivided sum.

    The gradient is what `scaled` takes, or empty unless asked for.
    """
    check_labels(target, logits.shape[1], ignore_index)
    inputs = (logits, target, pixel_weight, class_weight, ignore_index, align_corners)
    dtype = accumulator(logits.dtype)
    if not use_triton(impl, logits.device):
        loss_sum, weight_sum, gradient = cross_entropy_reference(*inputs, with_gradient)
        return *divide_by_weight(loss_sum, weight_sum, mean), gradient
    if with_gradient:
        partial, gradient = launch(*inputs)
    else:
        partial, gradient = launch_forward(*inputs), logits.new_empty(0, dtype=dtype)
    return *launch_sum(partial, mean, dtype), gradient


@cross_entropy_op.register_fake
def _(logits, target, pixel_weight, class_weight, ignore, align_corners, mean, with_gradient, impl):
    dtype = accumulator(logits.dtype)
    shape = (0,)
    if with_gradient:
        shape = (2, *logits.shape) if use_triton(impl, logits.device) else logits.shape
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
    )


def keep_gradient(ctx, inputs, output) -> None:
    """Save the gradient that the kernel has already made."""
    _, weight_sum, gradient = output
    ctx.dtype, ctx.mean = inputs[0].dtype, inputs[6]
    ctx.save_for_backward(weight_sum, gradient)
    # Or autograd makes zeros for the outputs without gradient, one of them as large as the logits.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(weight_sum, gradient)


def backward(ctx, upstream, _weight_sum, _gradient) -> tuple:
    """Scale the saved gradient into a new tensor of the logits' type, in one pass."""
    if upstream is None:
        return (None,) * 9
    weight_sum, gradient = ctx.saved_tensors
    if ctx.mean:
        upstream = upstream / weight_sum
    return scaled(gradient, upstream, ctx.dtype), *[None] * 8


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """A saved gradient times a scalar, in a new tensor of another type, in one pass.

    Args:
        gradient: (N,C,h,w) of a reference, or its two parts (2,N,C,h,w) of a kernel.
        upstream: (), gradient of the loss.
        dtype: of the logits.

    Returns:
        (N,C,h,w).
    """
    if gradient.ndim == 5:
        return add_parts_op(gradient, upstream, dtype)
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))


@jit
def add_parts_kernel(
    parts_ptr,  # (2,count)
    factor_ptr,  # ()
    result_ptr,  # (count,)
    steps,  # count / STEP
    STEP: tl.constexpr,  # a power of two
    BLOCK: tl.constexpr,
):
    """Add two parts of a gradient, and multiply the sum by a factor."""
    # Triton now knows that STEP divides the count, and may load as many values at once.
    count = steps * STEP
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    even = tl.load(parts_ptr + at, mask=there, other=0.0)
    odd = tl.load(parts_ptr + count + at, mask=there, other=0.0)
    product = (even + odd) * tl.load(factor_ptr).to(even.dtype)
    tl.store(result_ptr + at, product.to(result_ptr.dtype.element_ty), mask=there)


@torch.library.custom_op("semiseg::add_parts", mutates_args=())
def add_parts_op(parts: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """-> (parts[0] + parts[1]) · factor, (N,C,h,w)."""
    return launch_add_parts(parts, factor, dtype)


@on_its_device
def launch_add_parts(parts: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the kernel."""
    result = parts.new_empty(parts.shape[1:], dtype=dtype)
    count = result.numel()
    step = math.gcd(count, 16)
    add_parts_kernel[(ceil_div(count, ADD_BLOCK),)](
        parts, factor, result, count // step, STEP=step, BLOCK=ADD_BLOCK
    )
    return result


@add_parts_op.register_fake
def _(parts, factor, dtype):
    return parts.new_empty(parts.shape[1:], dtype=dtype)


cross_entropy_op.register_autograd(backward, setup_context=keep_gradient)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = True,
    pixel_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy between interpolated logits and labels.

    Args:
        logits: (N,C,h,w) float16, bfloat16, float32 or float64, before softmax, finite; C <= 254.
        target: (N,H,W) uint8, int32 or int64; H,W may equal h,w.
        ignore_index: pixels with this label add nothing.
        align_corners: how the bilinear interpolation places its corners.
        pixel_weight: (N,H,W) or None; a constant, no gradient reaches it.
        class_weight: (C,) or None; a constant, too.
        reduction: "mean" = sum of w·loss / sum of w over valid pixels, w = pixel_weight ·
            class_weight; "sum"; or "none".
        impl: "auto", what `set_backend` chose; "triton"; or "torch".

    Returns:
        A scalar with gradient (of first order), or (N,H,W) without gradient for "none". float64
        logits compute in float64, all others in float32. Where every pixel is ignored: 0 with
        zero gradient (PyTorch gives NaN).

    Raises:
        ValueError: shapes that do not fit, an unknown reduction or impl, "triton" without a GPU, or
            on a CPU a label outside the classes that is not `ignore_index`. On a GPU such a label
            does not count, and TRITON_DEBUG=1 catches it; of int64 the lower 32 bits are looked at.
            With "triton" also 2^31 logits or more, or as many pixels of an image.
    """
    check_shapes(logits, target, pixel_weight, class_weight)
    pixel_weight, class_weight = (
        weight if weight is None else weight.detach() for weight in (pixel_weight, class_weight)
    )
    impl = implementation(impl, logits.device)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r}: mean, sum or none")
    if reduction == "none":
        return cross_entropy_map_op(
            logits.detach(), target, pixel_weight, class_weight, ignore_index, align_corners, impl
        )
    inputs, mean = (logits, target, pixel_weight, class_weight, ignore_index), reduction == "mean"
    if logits.shape[2:] == target.shape[1:] and impl == "triton":
        return cross_entropy_full_op(*inputs, mean)[0]
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    return cross_entropy_op(*inputs, align_corners, mean, with_gradient, impl)[0]


def check_shapes(
    logits: Tensor, target: Tensor, pixel_weight: Tensor | None, class_weight: Tensor | None
) -> None:
    """Raise ValueError unless the shapes fit each other."""
    shape = tuple(logits.shape)
    if logits.ndim != 4 or target.ndim != 3 or len(logits) != len(target) or shape[1] > 254:
        raise ValueError(
            f"logits (N,C,h,w) with C <= 254 and target (N,H,W) are needed, "
            f"not {shape} and {tuple(target.shape)}"
        )
    if pixel_weight is not None and pixel_weight.shape != target.shape:
        raise ValueError(
            f"pixel_weight {tuple(pixel_weight.shape)} does not have "
            f"the target's shape {tuple(target.shape)}"
        )
    if class_weight is not None and class_weight.shape != shape[1:2]:
        raise ValueError(
            f"class_weight {tuple(class_weight.shape)} does not have "
            f"one value for each of {shape[1]} classes"
        )
