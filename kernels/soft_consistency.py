"""Consistency of two networks' probabilities, both interpolated, with the gradient of one of them.

    z, t   = bilinear(logits), bilinear(targets)               at the resolution of the masks
    p, q   = softmax_c(z), softmax_c(t);   d = p - q
    loss   = sum over the valid pixels of
             sum_c d(c)²                             "squared"
             -sum_c q(c) · log p(c)                  "cross_entropy"
             sum_c q(c) · (log q(c) - log p(c))      "kl"
    d loss / d z(c) = 2 · p(c) · (d(c) - sum_k d(k) p(k))      "squared"
                      p(c) - q(c)                              the other two

and from z to the logits by the transposed interpolation. No gradient reaches the targets. With a
second tensor of targets and a mask each pixel reads its t from one of the two, as CutMix mixes the
predictions of two images: the mask picks whole pixels, and softmax comes after.

Plain PyTorch (interpolate and softmax twice, difference, square, sum, largest probability,
backward) reads or writes a tensor of N x C x H x W floats 19 times: 3.4 GB for 8 x 21 x 513 x 513,
4.4 GB with a second tensor of targets. The kernel reads both tensors of logits (at stride 4 a
sixteenth of that) four times for the even and four times for the odd rows of cells, the valid mask
once, and writes two float32 parts of the gradient: 36 MB if the caches hold what is read again,
114 MB if they hold nothing. Around it, bfloat16 logits that come as channels_last are copied to
planes (22 MB), and the backward pass adds the two parts and scales them (28 MB): 86 to 164 MB in
all. A second launch adds up the programs' sums.

It is bound by instructions instead: "squared" takes six exponentials and about 50 instructions a
pixel and class, the other two four and about 36. (`python -m kernels.aot`, sm_90: 112 registers,
nothing spilled; to issue the instructions for a batch of 8 takes an H200 at least 76 µs for
129 -> 513 and 96 µs for 128 -> 512 at 1.755 GHz, and for the other two modes 55 and 69 µs.
Measured, "squared" with the launches around it: 169 and 223 µs.)

Lanes, cells and parts of the gradient are those of `cross_entropy.py`. A lane passes over the
classes of the target for its maximum and the sum of its exponentials, over those of the student
likewise, and over both for sum_k d(k) p(k) ("squared" alone) and for loss and gradient. The
corners' offsets are counted in 32 bits, the same for all tensors; a 64-bit pointer for each would
take 16 registers. With two tensors of targets a program goes over its cells once for each that its
pixels read, so that the edge of a box doubles the work of the programs that it crosses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cross_entropy import interpolation_matrix, scaled
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
    on_its_device,
    plan,
    register_limit,
    tl,
    tl_type,
    upsample,
    use_triton,
)

MODES = ("squared", "cross_entropy", "kl")
SUM_BLOCK = 4096  # partial sums that `consistency_sum_kernel` adds at a time


class SoftConsistency(NamedTuple):
    """What `soft_consistency` returns: three scalars.

    Attributes:
        loss: summed over the valid pixels, float32 (float64 for float64 logits), with gradient.
        count: int64, the number of valid pixels.
        confident: int64, how many of them have max_c q >= threshold.
    """

    loss: Tensor
    count: Tensor
    confident: Tensor


@in_full_precision
def soft_consistency_reference(
    logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    mask: Tensor | None,
    second: Tensor | None,
    mode: str,
    threshold: float,
    align_corners: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation in plain PyTorch, a few images at a time, class by class and in place.

    Two full-resolution tensors are alive at most.

    Args:
        logits, targets, valid_mask, mask, second, mode, threshold, align_corners: as in
            `soft_consistency`.
        with_gradient: whether to compute the gradient.

    Returns:
        Loss, count and confident as in `SoftConsistency`; and the gradient of the loss with
        respect to the logits, (N,C,h,w), or an empty tensor.
    """
    dtype, device = accumulator(logits.dtype), logits.device
    nodes, size = tuple(logits.shape[2:]), tuple(valid_mask.shape[1:])
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confident = torch.zeros((), dtype=torch.int64, device=device)
    gradient = torch.empty(logits.shape if with_gradient else 0, dtype=dtype, device=device)
    if with_gradient and nodes != size:
        from_rows, from_columns = (
            interpolation_matrix(few, many, align_corners, dtype, device)
            for few, many in zip(nodes, size, strict=True)
        )  # (h,H), (w,W)

    for some in chunks(logits, size):
        mixed = (None, None) if second is None else (mask[some], second[some])
        inputs = (logits[some], targets[some], valid_mask[some], *mixed)
        of_pixels, sure, g = some_images(*inputs, mode, threshold, align_corners, with_gradient)
        loss += of_pixels.sum(dtype=torch.float64)
        confident += sure.sum()
        if with_gradient:
            gradient[some] = g if nodes == size else from_rows @ (g @ from_columns.T)
        del g  # before the next images need as much
    return loss.to(dtype), valid_mask.sum(), confident, gradient


def some_images(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor,
    mask: Tensor | None,
    second: Tensor | None,
    mode: str,
    threshold: float,
    align_corners: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, whether it is confident, and gradient of each pixel of some images.

    Arguments as in `soft_consistency_reference`.

    Returns:
        (n,H,W), 0 where a pixel is not valid; (n,H,W) bool, likewise; and (n,C,H,W), the gradient
        with respect to the interpolated logits, of any value if it is not asked for.
    """
    size, dtype = tuple(valid.shape[1:]), accumulator(logits.dtype)
    q = full_resolution(targets, size, align_corners, dtype)
    if second is not None:
        inside = full_resolution(second, size, align_corners, dtype)
        torch.where(mask[:, None], inside, q, out=q)
        del inside
    total_q, mean_log = exponentials(q, mode == "kl")
    sure = ((1 / total_q).float() >= threshold) & valid
    z = full_resolution(logits, size, align_corners, dtype)
    compute = squared_pixels if mode == "squared" else entropy_pixels
    loss = compute(z, q, valid, total_q, with_gradient)
    if mode == "kl":  # minus the entropy of q: sum_c q(c) log q(c)
        loss += (mean_log / total_q - total_q.log()).where(valid, 0)
    return loss, sure, q


def full_resolution(
    logits: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """`upsample` to a tensor of its own, for in-place operations, in the type to compute in."""
    logits = logits.to(dtype)
    full = upsample(logits, size, align_corners)
    return full.clone() if full is logits else full


def exponentials(t: Tensor, with_mean_log: bool) -> tuple[Tensor, Tensor]:
    """Make exp(t - max_c t) of t (n,C,H,W) in place.

    Returns:
        The sum over the classes, (n,H,W); and sum_c (t - max_c t) · exp(t - max_c t), (n,H,W),
        or zeros if it is not asked for.
    """
    highest = t.amax(1)
    total, mean_log = torch.zeros_like(highest), torch.zeros_like(highest)
    # Class by class: a plane is still in the cache when it is read again.
    for plane in t.unbind(1):
        plane -= highest
        if with_mean_log:
            mean_log.addcmul_(plane, plane.exp())
        total += plane.exp_()
    return total, mean_log


def squared_pixels(
    z: Tensor, q: Tensor, valid: Tensor, total_q: Tensor, with_gradient: bool
) -> Tensor:
    """sum_c (p - q)² of each valid pixel, (n,H,W), 0 for the others.

    Args:
        z: (n,C,H,W) logits of the student; overwritten.
        q: (n,C,H,W) exponentials of the target; overwritten, by the gradient with respect to z.
        valid: (n,H,W) bool.
        total_q: (n,H,W), the sum of q over the classes.
        with_gradient: whether to make the gradient.
    """
    total, _ = exponentials(z, False)
    # Where a pixel does not count, both are 0, and so are the loss and the gradient.
    scale, scale_q = ((1 / each).where(valid, 0) for each in (total, total_q))
    squares, d_times_p = torch.zeros_like(total), torch.zeros_like(total)
    for p, d in zip(z.unbind(1), q.unbind(1), strict=True):
        p *= scale
        torch.addcmul(p, d, scale_q, value=-1, out=d)  # p - q
        squares.addcmul_(d, d)
        if with_gradient:
            d_times_p.addcmul_(d, p)
    if with_gradient:
        for p, d in zip(z.unbind(1), q.unbind(1), strict=True):
            d.sub_(d_times_p).mul_(p).mul_(2)
    return squares


def entropy_pixels(
    z: Tensor, q: Tensor, valid: Tensor, total_q: Tensor, with_gradient: bool
) -> Tensor:
    """-sum_c q log p of each valid pixel, (n,H,W), 0 for the others; arguments as above."""
    highest = z.amax(1)
    total, product = torch.zeros_like(highest), torch.zeros_like(highest)
    scale_q = (1 / total_q).where(valid, 0)
    for plane, target in zip(z.unbind(1), q.unbind(1), strict=True):
        plane -= highest
        target *= scale_q
        product.addcmul_(target, plane)
        total += plane.exp_()
    if with_gradient:
        scale = (1 / total).where(valid, 0)
        for p, target in zip(z.unbind(1), q.unbind(1), strict=True):
            torch.addcmul(target.neg_(), p, scale, out=target)  # p - q
    # -sum_c q (z - max_c z - log sum_c exp(z - max_c z)), since q adds up to 1
    return total.log().where(valid, 0) - product


@jit
def next_class(at, plane):
    """Offsets of a cell's corners in the plane of the next class."""
    return at[0] + plane, at[1] + plane, at[2] + plane, at[3] + plane


@jit
def max_and_sum(
    logits_ptr, corners, plane, weight_y, weight_x,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ON_NODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """max_c z and sum_c 2^(z - max_c z) of a cell's ROWS x COLUMNS pixels."""
    highest = ()
    total = ()
    for k in tl.static_range(ROWS * COLUMNS):
        highest = highest + (tl.full(corners[0].shape, float("-inf"), ACC),)
        total = total + (tl.zeros(corners[0].shape, ACC),)
    at = corners
    for _ in range(C):
        corner = load_corners(logits_ptr, at, ACC)
        at = next_class(at, plane)
        higher = ()
        for r in tl.static_range(ROWS):
            z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
            for s in tl.static_range(COLUMNS):
                higher = higher + (tl.maximum(highest[r * COLUMNS + s], z[s]),)
        highest = higher

    at = corners
    for _ in range(C):
        corner = load_corners(logits_ptr, at, ACC)
        at = next_class(at, plane)
        more = ()
        for r in tl.static_range(ROWS):
            z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
            for s in tl.static_range(COLUMNS):
                more = more + (total[r * COLUMNS + s] + tl.exp2(z[s] - highest[r * COLUMNS + s]),)
        total = more
    return highest, total


@jit
def mean_difference(
    logits_ptr, targets_ptr, corners, plane, log_sum_z, log_sum_t, weight_y, weight_x,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ON_NODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum_c d(c) p(c) of a cell's pixels, with d = p - q."""
    mean = ()
    for k in tl.static_range(ROWS * COLUMNS):
        mean = mean + (tl.zeros(corners[0].shape, ACC),)
    at = corners
    for _ in range(C):
        corner = load_corners(logits_ptr, at, ACC)
        target = load_corners(targets_ptr, at, ACC)
        at = next_class(at, plane)
        more = ()
        for r in tl.static_range(ROWS):
            z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
            t = interpolate_row(target, r, weight_y, weight_x, COLUMNS, ON_NODE)
            for s in tl.static_range(COLUMNS):
                p = tl.exp2(z[s] - log_sum_z[r * COLUMNS + s])
                q = tl.exp2(t[s] - log_sum_t[r * COLUMNS + s])
                more = more + (mean[r * COLUMNS + s] + (p - q) * p,)
        mean = more
    return mean


@cell_jit
def soft_consistency_kernel(
    logits_ptr,  # (N,C,h,w)
    targets_ptr,  # (N,C,h,w), or two of them, (2,N,C,h,w), with `mask_ptr`
    mask_ptr,  # (N,H,W) bool: where to read the second of them, or None
    valid_ptr,  # (N,H,W) bool
    partial_ptr,  # (2,N,programs,3) float64: sums of loss, valid and confident pixels
    gradient_ptr,  # (2,N,C,h,w) in ACC: what even and what odd rows of cells give; or None
    first_y_ptr,  # (h+2,)
    weight_y_ptr,  # (H,)
    first_x_ptr,  # (w+2,)
    weight_x_ptr,  # (W,)
    threshold,  # of the probability of a confident pixel, float32
    h,
    w,
    H,
    W,
    C: tl.constexpr,
    SQUARED: tl.constexpr,  # the mode: "squared",
    KL: tl.constexpr,  # "kl", or, if neither, "cross_entropy"
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
    SOURCES: tl.constexpr = 1 if mask_ptr is None else 2
    TILES: tl.constexpr = ROW_TILES * COLUMN_TILES
    GRADIENT: tl.constexpr = gradient_ptr is not None
    image = tl.program_id(1).to(tl.int64)
    odd = tl.program_id(2)
    plane = h * w
    logits_ptr += image * C * plane
    targets_ptr += image * C * plane
    valid_ptr += image * H * W
    if SOURCES > 1:
        of_second = tl.num_programs(1).to(tl.int64) * C * plane
        mask_ptr += image * H * W
    if GRADIENT:
        gradient_ptr += (odd * tl.num_programs(1) + image) * C * plane
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
    valid_sum = tl.zeros([LANES], tl.int32)
    confident_sum = tl.zeros([LANES], tl.int32)
    for tile in range(TILES):
        row_slot = tile // COLUMN_TILES * ROWS
        column_slot = tile % COLUMN_TILES * COLUMNS
        y, weight_y, exists_y = cell_axis(
            row, first_y_ptr, weight_y_ptr, row_slot, H, ROWS, RATIO, ACC
        )
        x, weight_x, exists_x = cell_axis(
            column, first_x_ptr, weight_x_ptr, column_slot, W, COLUMNS, RATIO, ACC
        )
        valid = tl.zeros([LANES], tl.int32)  # a bit for each pixel of the tile
        inside = tl.zeros([LANES], tl.int32)
        for r in tl.static_range(ROWS):
            for s in tl.static_range(COLUMNS):
                pixel = y[r] * W + x[s]
                exists = here & exists_y[r] & exists_x[s]
                v = tl.load(valid_ptr + pixel, mask=exists, other=0) != 0
                valid |= tl.where(v, 1 << (r * COLUMNS + s), 0)
                if SOURCES > 1:
                    m = tl.load(mask_ptr + pixel, mask=exists, other=0) != 0
                    inside |= tl.where(m, 1 << (r * COLUMNS + s), 0)
        # A program whose pixels read both tensors of targets goes over them once for each: so
        # nothing is chosen inside the loops over the classes.
        for source in range(SOURCES):
            counted = valid
            source_ptr = targets_ptr
            if SOURCES > 1:
                counted = valid & tl.where(source == 1, inside, ~inside)
                source_ptr += source * of_second
            later = (tile > 0) | (source > 0)
            # Most later turns have no pixel that counts. The first one also writes the zeros of the
            # cells that have none.
            if (tile + source == 0) | (tl.max(counted, 0) > 0):
                highest, total = max_and_sum(
                    source_ptr, corners, plane, weight_y, weight_x, C, ROWS, COLUMNS, ON_NODE, ACC
                )
                log_sum_t = ()
                for k in tl.static_range(ROWS * COLUMNS):
                    counts = (counted & (1 << k)) != 0
                    sure = (1.0 / total[k]).to(tl.float32) >= threshold
                    valid_sum += (own & counts).to(tl.int32)
                    confident_sum += (own & counts & sure).to(tl.int32)
                    log_sum = highest[k] + tl.log2(total[k])
                    # So large where a pixel does not count that all its probabilities are 0.
                    log_sum_t = log_sum_t + (tl.where(counts, log_sum, 1e30),)
                highest, total = max_and_sum(
                    logits_ptr, corners, plane, weight_y, weight_x, C, ROWS, COLUMNS, ON_NODE, ACC
                )
                log_sum_z = ()
                for k in tl.static_range(ROWS * COLUMNS):
                    counts = (counted & (1 << k)) != 0
                    log_sum = highest[k] + tl.log2(total[k])
                    log_sum_z = log_sum_z + (tl.where(counts, log_sum, 1e30),)
                mean = ()
                if SQUARED and GRADIENT:
                    mean = mean_difference(
                        logits_ptr, source_ptr, corners, plane, log_sum_z, log_sum_t,
                        weight_y, weight_x, C, ROWS, COLUMNS, ON_NODE, ACC,
                    )  # fmt: skip

                at = corners
                for _ in range(C):
                    corner = load_corners(logits_ptr, at, ACC)
                    target = load_corners(source_ptr, at, ACC)
                    # Sums of g times the pixels' weights: for both left corners, for both right
                    # ones, and for the bottom ones. A row of pixels has the weights wy (bottom) and
                    # 1 - wy (top), so that the top corners get what the bottom ones leave.
                    left_sum = tl.zeros([LANES], ACC)
                    right_sum = tl.zeros([LANES], ACC)
                    bottom_left = tl.zeros([LANES], ACC)
                    bottom_right = tl.zeros([LANES], ACC)
                    for r in tl.static_range(ROWS):
                        z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
                        t = interpolate_row(target, r, weight_y, weight_x, COLUMNS, ON_NODE)
                        of_row = tl.zeros([LANES], ACC)
                        row_right = tl.zeros([LANES], ACC)
                        for s in tl.static_range(COLUMNS):
                            log_p = z[s] - log_sum_z[r * COLUMNS + s]
                            log_q = t[s] - log_sum_t[r * COLUMNS + s]
                            q = tl.exp2(log_q)
                            if SQUARED:
                                p = tl.exp2(log_p)
                                d = p - q
                                loss_sum += d * d
                            elif KL:
                                loss_sum += q * (log_q - log_p)
                            else:
                                loss_sum -= q * log_p
                            if GRADIENT:
                                if SQUARED:
                                    g = p * (d - mean[r * COLUMNS + s])
                                else:
                                    g = tl.exp2(log_p) - q
                                of_row += g
                                if not (ON_NODE and s == 0):
                                    row_right += g * weight_x[s]
                        row_left = of_row - row_right
                        left_sum += row_left
                        right_sum += row_right
                        if not (ON_NODE and r == 0):
                            bottom_left += row_left * weight_y[r]
                            bottom_right += row_right * weight_y[r]
                    if GRADIENT:
                        # The node at this cell's right is the one at the next cell's left, in the
                        # next lane.
                        top_of_next = tl.gather(left_sum - bottom_left, next_lane, 0)
                        top = right_sum - bottom_right + top_of_next
                        bottom = bottom_right + tl.gather(bottom_left, next_lane, 0)
                        if SQUARED:
                            top *= 2.0
                            bottom *= 2.0
                        if TILES * SOURCES > 1:
                            again = has_top & later
                            top += tl.load(gradient_ptr + at[1], mask=again, other=0.0)
                            again = has_bottom & later
                            bottom += tl.load(gradient_ptr + at[3], mask=again, other=0.0)
                        tl.store(gradient_ptr + at[1], top, mask=has_top)
                        tl.store(gradient_ptr + at[3], bottom, mask=has_bottom)
                    at = next_class(at, plane)
    program = (odd * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    loss = tl.sum(tl.where(own, loss_sum, 0.0), 0)
    if not SQUARED:
        loss *= LN2
    tl.store(partial_ptr + 3 * program, loss.to(tl.float64))
    tl.store(partial_ptr + 3 * program + 1, tl.sum(valid_sum, 0).to(tl.float64))
    tl.store(partial_ptr + 3 * program + 2, tl.sum(confident_sum, 0).to(tl.float64))


@jit
def consistency_sum_kernel(
    partial_ptr,  # (count,3) float64: sums of loss, valid and confident pixels
    loss_ptr,  # ()
    valid_ptr,  # () int64
    confident_ptr,  # () int64
    count,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,  # count / BLOCK, rounded up
):
    """Add up what the programs have left, in one program and a fixed order."""
    losses = tl.zeros([BLOCK], tl.float64)
    valids = tl.zeros([BLOCK], tl.float64)
    confidents = tl.zeros([BLOCK], tl.float64)
    for turn in range(TURNS):
        at = turn * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        losses += tl.load(partial_ptr + 3 * at, mask=there, other=0.0)
        valids += tl.load(partial_ptr + 3 * at + 1, mask=there, other=0.0)
        confidents += tl.load(partial_ptr + 3 * at + 2, mask=there, other=0.0)
    tl.store(loss_ptr, tl.sum(losses, 0).to(loss_ptr.dtype.element_ty))
    tl.store(valid_ptr, tl.sum(valids, 0).to(tl.int64))
    tl.store(confident_ptr, tl.sum(confidents, 0).to(tl.int64))


@on_its_device
def launch(
    logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    mask: Tensor | None,
    second: Tensor | None,
    mode: str,
    threshold: float,
    align_corners: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel, and add up the programs' sums.

    Arguments and results as those of `soft_consistency_reference`, but for the gradient: its two
    parts, (2,N,C,h,w).
    """
    n, classes, h, w = logits.shape
    size, dtype = tuple(valid_mask.shape[1:]), accumulator(logits.dtype)
    if second is not None:
        both = targets.new_empty((2, *targets.shape))
        both[0].copy_(targets)
        both[1].copy_(second)
        targets = both
    logits, targets, valid_mask, mask = (
        x if x is None else x.contiguous() for x in (logits, targets, valid_mask, mask)
    )
    walk = plan(logits, size, align_corners, max_pixels=20)
    grid = (ceil_div((h // 2 + 1) * (w + 1), CELL_LANES - 1), n, 2)
    partial = logits.new_empty((2, n, grid[0], 3), dtype=torch.float64)
    loss, count, confident, gradient = empty_results(logits, with_gradient, parts=True)
    soft_consistency_kernel[grid](
        logits, targets, mask, valid_mask, partial, gradient if with_gradient else None,
        *walk.tables, threshold, h, w, *size,
        C=classes, SQUARED=mode == "squared", KL=mode == "kl", RATIO=walk.ratio,
        ROWS=walk.rows, COLUMNS=walk.columns, ROW_TILES=walk.row_tiles,
        COLUMN_TILES=walk.column_tiles, ACC=tl_type(dtype), LANES=CELL_LANES, num_warps=1,
        **register_limit(112),  # instead of up to 128, and without a spill
    )  # fmt: skip
    sums = partial.numel() // 3
    consistency_sum_kernel[(1,)](
        partial, loss, count, confident, sums, BLOCK=SUM_BLOCK, TURNS=ceil_div(sums, SUM_BLOCK),
        num_warps=16,
    )  # fmt: skip
    return loss, count, confident, gradient


def empty_results(
    logits: Tensor, with_gradient: bool, parts: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors for loss, count, confident and the gradient, which is empty if not asked for.

    With `parts` for the gradient's two parts.
    """
    dtype = accumulator(logits.dtype)
    shape = (2, *logits.shape) if parts else logits.shape
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((), dtype=torch.int64),
        logits.new_empty((), dtype=torch.int64),
        logits.new_empty(shape if with_gradient else 0, dtype=dtype),
    )


@torch.library.custom_op("semiseg::soft_consistency", mutates_args=())
def soft_consistency_op(
    logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    mask: Tensor | None,
    second: Tensor | None,
    mode: str,
    threshold: float,
    align_corners: bool,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss, count, confident; the gradient, which is empty unless asked for."""
    compute = launch if use_triton(impl, logits.device) else soft_consistency_reference
    masks = (valid_mask, mask, second)
    return compute(logits, targets, *masks, mode, threshold, align_corners, with_gradient)


@soft_consistency_op.register_fake
def _(logits, targets, valid, mask, second, mode, threshold, align_corners, with_gradient, impl):
    return empty_results(logits, with_gradient, use_triton(impl, logits.device))


def keep_gradient(ctx, inputs, output) -> None:
    """Save the gradient that has been made already."""
    _, count, confident, gradient = output
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(gradient)
    # Or autograd makes zeros for the outputs without gradient, one of them as large as the logits.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(count, confident, gradient)


def backward(ctx, upstream, *_) -> tuple:
    """Scale the saved gradient into a new tensor of the logits' type, in one pass."""
    if upstream is None:
        return (None,) * 10
    (gradient,) = ctx.saved_tensors
    return scaled(gradient, upstream, ctx.dtype), *[None] * 9


soft_consistency_op.register_autograd(backward, setup_context=keep_gradient)


def soft_consistency(
    logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    *,
    mode: str = "squared",
    mask: Tensor | None = None,
    second: Tensor | None = None,
    threshold: float = 0.0,
    align_corners: bool = True,
    impl: str = "auto",
) -> SoftConsistency:
    """Distance between the probabilities of a student and those of fixed targets.

    Args:
        logits: (N,C,h,w) float16, bfloat16, float32 or float64, the student's before softmax,
            finite; C <= 254.
        targets: (N,C,h,w) logits of the target before softmax; a constant, no gradient reaches it.
        valid_mask: (N,H,W) bool; only pixels where it is True count. H,W may equal h,w.
        mode: "squared", "cross_entropy" or "kl": see the top of this file.
        mask: (N,H,W) bool; where it is True, a pixel reads its target from `second`.
        second: (N,C,h,w) logits of other targets, of the first's type; with `mask` or not at all.
        threshold: in [0,1]; a pixel is confident where the target's largest probability reaches it.
        align_corners: how the bilinear interpolation places its corners.
        impl: "auto", what `set_backend` chose; "triton"; or "torch".

    Returns:
        `SoftConsistency`. The loss has a gradient (of first order) with respect to `logits`.
        float64 logits compute in float64, all others in float32. Where no pixel is valid: 0 with
        zero gradient.

    Raises:
        ValueError: shapes or types that do not fit, one of `mask` and `second` without the other,
            an unknown mode or impl, a threshold outside [0,1], or "triton" without a GPU, or with
            2^31 logits or more, or as many pixels of an image.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: squared, cross_entropy or kl")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold}: a probability in [0,1]")
    check_inputs(logits, targets, valid_mask, mask, second)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    masks = (valid_mask, mask, None if second is None else second.detach())
    impl = implementation(impl, logits.device)
    options = (mode, float(threshold), align_corners, with_gradient, impl)
    loss, count, confident, _ = soft_consistency_op(logits, targets.detach(), *masks, *options)
    return SoftConsistency(loss, count, confident)


def check_inputs(
    logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    mask: Tensor | None,
    second: Tensor | None,
) -> None:
    """Raise ValueError unless shapes and types fit each other."""
    shape = tuple(logits.shape)
    if logits.ndim != 4 or shape[1] > 254:
        raise ValueError(f"logits (N,C,h,w) with C <= 254 are needed, not {shape}")
    if (mask is None) != (second is None):
        raise ValueError("mask and second go together: give both or neither")
    for name, each in (("targets", targets), ("second", second)):
        if each is not None and each.shape != logits.shape:
            raise ValueError(f"{name} {tuple(each.shape)} does not have the logits' shape {shape}")
    if second is not None and second.dtype != targets.dtype:
        raise ValueError(f"second {second.dtype} and targets {targets.dtype} must have one type")
    if valid_mask.ndim != 3 or len(valid_mask) != shape[0] or valid_mask.dtype != torch.bool:
        raise ValueError(
            f"valid_mask (N,H,W) bool for {shape[0]} images is needed, "
            f"not {tuple(valid_mask.shape)} {valid_mask.dtype}"
        )
    if mask is not None and (mask.shape != valid_mask.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask {tuple(mask.shape)} {mask.dtype} is not bool or does not have "
            f"the shape of valid_mask {tuple(valid_mask.shape)}"
        )
