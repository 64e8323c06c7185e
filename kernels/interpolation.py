"""Bilinear interpolation inside a kernel; and the choice between Triton and PyTorch.

Between two neighbouring rows and two neighbouring columns of the low-resolution logits lies a
*cell*: all output pixels in it are interpolated from the same four *nodes*, its corners.

        node (i-1,j-1) *---------------* node (i-1,j)       cell (i,j), i = 0..h, j = 0..w
                       |  o   o   o   o |                   o: its output pixels,
                       |  o   o   o   o |                      about (H/h) x (W/w) of them
                       |  o   o   o   o |
        node   (i,j-1) *---------------* node   (i,j)

The outermost cells lie half outside: their missing corners are those of the border. With
align_corners nothing lies in them, except the last row and column of pixels.

A lane owns a cell. It loads the four corners once a class and makes the values of all its pixels
in registers, one fused multiply-add each. A cell has a varying number of pixels where the ratio
is not an integer; `Axis` tells which.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    # Images come in many sizes: without this, each combination of sizes that 16 divides or not is
    # compiled anew.
    cell_jit = triton.jit(do_not_specialize=["h", "w", "H", "W"])
except ImportError:  # macOS and Windows have no Triton: the PyTorch references serve there
    triton = None

    def jit(function):
        """Leave a kernel as it is; it is never called."""
        return function

    cell_jit = jit

    class tl:
        """Enough of triton.language to define the kernels' signatures."""

        constexpr = staticmethod(lambda value: value)


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MOST_TILES = 65_535  # of a cell: CUDA starts no more programs along the third axis of a grid
CELL_LANES = 32  # cells of a program: one warp, so that neighbours exchange values by shuffles


BACKENDS = ("auto", "triton", "torch")
_backend = "auto"


def set_backend(name: str) -> None:
    """Choose what every operation with impl="auto", its default, runs on from now on.

    Args:
        name: "triton", "torch" (the references), or "auto": Triton on CUDA, and anywhere with
            TRITON_INTERPRET=1, else torch.

    Raises:
        ValueError: another name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: auto, triton or torch")
    _backend = name


def use_triton(impl: str, device: torch.device) -> bool:
    """Whether `impl` means the Triton kernel for tensors on `device`.

    "auto" is what `set_backend` chose.

    Raises:
        ValueError: an unknown name, or "triton" where no Triton kernel can run.
    """
    if impl not in BACKENDS:
        raise ValueError(f"impl {impl!r}: auto, triton or torch")
    if impl == "auto":
        impl = _backend
    possible = triton is not None and (
        device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    )
    if impl == "triton" and not possible:
        why = "Triton is not installed" if triton is None else f"tensors are on {device.type}"
        raise ValueError(
            f"impl='triton' needs a GPU, or TRITON_INTERPRET=1 to interpret the kernels slowly: "
            f"{why}; use 'torch'"
        )
    return possible and impl != "torch"


def implementation(impl: str, device: torch.device) -> str:
    """ "triton" or "torch", whichever `impl` means for tensors on `device`.

    The public functions choose before they call an operation: a graph of torch.compile keeps what
    the operation was called with, and its forward and backward pass must agree.

    Raises:
        ValueError: as `use_triton`.
    """
    return "triton" if use_triton(impl, device) else "torch"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tl_type(dtype: torch.dtype):
    """Triton's name of a type to compute in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def in_full_precision(function: Callable) -> Callable:
    """Run with autocast off on the first argument's device.

    The references compute in float32 whatever autocast surrounds them.
    """

    @functools.wraps(function)
    def run(first: Tensor, *args, **options):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **options)

    return run


def on_its_device(launch: Callable) -> Callable:
    """Make the GPU of the first argument, a tensor, the current one while kernels are launched.

    Triton takes that one.
    """

    @functools.wraps(launch)
    def guarded(tensor: Tensor, *arguments, **options):
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments, **options)

    return guarded


def register_limit(registers: int) -> dict[str, int]:
    """Launch option: the most registers a lane may take. Triton has it for NVIDIA's GPUs only."""
    return {} if torch.version.hip else {"maxnreg": registers}


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes several times as long when the host calls it."""
    return -(-a // b)


class Axis(NamedTuple):
    """Where the output positions of one axis lie between the nodes.

    Attributes:
        first: (nodes + 2,) int32; cell k holds the output positions first[k] to first[k+1] - 1.
        weight: (outputs,) weight of the cell's second node; the first one has the rest.
        slots: most positions of a cell.
        ratio: positions of each cell where they are the multiples of 1/ratio (align_corners,
            integer ratio), else 0.
    """

    first: Tensor
    weight: Tensor
    slots: int
    ratio: int


def check_offsets(numbers: int) -> None:
    """Raise ValueError where the kernels' offsets, of 32 bits, would overflow."""
    if numbers >= 2**31:
        raise ValueError(f"{numbers} numbers: the kernels take less than 2^31; use impl='torch'")


@functools.cache
def axis(
    nodes: int, outputs: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> Axis:
    """The cells of one axis, by exact integer arithmetic.

    They are kept, so that a training run builds and uploads them once, and for ever, since a CUDA
    graph reads them where they were. It cannot upload: call an operation once before you capture
    it.
    """
    output = torch.arange(outputs)
    if align_corners:
        numerator, denominator = output * (nodes - 1), max(outputs - 1, 1)
    else:
        numerator, denominator = (2 * output + 1) * nodes - outputs, 2 * outputs
    cell = torch.div(numerator, denominator, rounding_mode="floor") + 1
    weight = (numerator - (cell - 1) * denominator).double() / denominator
    # The outermost cells have the same node on both sides: give it all to the one inside.
    weight[cell == 0] = 1.0
    weight[cell == nodes] = 0.0
    first = torch.searchsorted(cell, torch.arange(nodes + 2))
    integer = align_corners and nodes > 1 and (outputs - 1) % (nodes - 1) == 0
    return Axis(
        first.to(device, torch.int32),
        weight.to(device, dtype),
        int(first.diff().max()),
        (outputs - 1) // (nodes - 1) if integer else 0,
    )


class Plan(NamedTuple):
    """How a kernel walks over the cells: `rows` x `columns` pixels of a cell at a time, a *tile*.

    Larger cells take several tiles, `row_tiles` x `column_tiles`: a lane has not the registers for
    all of their pixels at once.

    Attributes:
        tables: first and weight of the axis y, then those of the axis x; see `Axis`.
        ratio: of both axes where it is one and the same integer, else 0.
    """

    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    ratio: int
    rows: int
    columns: int
    row_tiles: int
    column_tiles: int


def plan(logits: Tensor, size: tuple[int, int], align_corners: bool, max_pixels: int) -> Plan:
    """The plan for logits (N,C,h,w) that are interpolated to `size` = (H,W).

    A lane handles at most `max_pixels` at a time.

    Raises:
        ValueError: 2^31 logits or more, or as many pixels of an image; or cells of too many pixels.
    """
    check_offsets(max(logits.numel(), size[0] * size[1]))
    nodes, dtype = tuple(logits.shape[2:]), accumulator(logits.dtype)
    return plan_of(nodes, tuple(size), align_corners, max_pixels, dtype, logits.device)


@functools.lru_cache(maxsize=256)
def plan_of(
    nodes: tuple[int, int],
    size: tuple[int, int],
    align_corners: bool,
    max_pixels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """As `plan`; kept, because a training step asks for the same one again and again."""
    y, x = (axis(n, m, align_corners, dtype, device) for n, m in zip(nodes, size, strict=True))
    column_tiles = ceil_div(x.slots, 6)
    columns = ceil_div(x.slots, column_tiles)
    rows = min(y.slots, max(max_pixels // columns, 1))
    if y.ratio:  # all cells are alike: tiles of one size
        rows = ceil_div(y.slots, ceil_div(y.slots, rows))

    row_tiles = ceil_div(y.slots, rows)
    if row_tiles * column_tiles > MOST_TILES:
        raise ValueError(f"{nodes} to {size}: too many pixels in a cell; enlarge in two steps")
    tables = (y.first, y.weight, x.first, x.weight)
    ratio = y.ratio if y.ratio == x.ratio else 0
    return Plan(tables, ratio, rows, columns, row_tiles, column_tiles)


@jit
def cell_axis(
    cell,
    first_ptr,
    weight_ptr,
    start,
    outputs,
    SLOTS: tl.constexpr,
    RATIO: tl.constexpr,
    ACC: tl.constexpr,
):
    """Where each of SLOTS positions of a cell is, its weight, and whether it exists.

    The first of them is the cell's position `start`.
    """
    where = ()
    weight = ()
    exists = ()
    if RATIO > 0:
        begin = (cell - 1) * RATIO + start
        end = tl.where(cell > 0, tl.minimum(cell * RATIO, outputs), -RATIO)
    else:
        begin = tl.load(first_ptr + cell) + start
        end = tl.load(first_ptr + cell + 1)
    for s in tl.static_range(SLOTS):
        position = begin + s
        there = position < end
        if RATIO > SLOTS:
            w = tl.zeros(cell.shape, ACC) + (start + s).to(ACC) * (1.0 / RATIO)
        elif RATIO > 0:
            w = tl.full(cell.shape, s / RATIO, ACC)
        else:
            w = tl.load(weight_ptr + position, mask=there, other=0.0)
        where = where + (position,)
        weight = weight + (w,)
        exists = exists + (there,)
    return where, weight, exists


@jit
def cell_corners(row, column, h, w):
    """Offsets of a cell's four corners in a class plane of h x w nodes.

    Corners outside are those of the border.
    """
    top = tl.maximum(row - 1, 0) * w
    bottom = tl.minimum(row, h - 1) * w
    left = tl.maximum(column - 1, 0)
    right = tl.minimum(column, w - 1)
    return top + left, top + right, bottom + left, bottom + right


@jit
def load_corners(ptr, corners, ACC: tl.constexpr):
    """The four corners' logits, times log2(e).

    All that follows uses powers of two, the GPU's own.
    """
    a = tl.load(ptr + corners[0]).to(ACC) * LOG2E
    b = tl.load(ptr + corners[1]).to(ACC) * LOG2E
    c = tl.load(ptr + corners[2]).to(ACC) * LOG2E
    d = tl.load(ptr + corners[3]).to(ACC) * LOG2E
    return a, b, c, d


@jit
def interpolate_row(
    corner, r: tl.constexpr, weight_y, weight_x, COLUMNS: tl.constexpr, ON_NODE: tl.constexpr
):
    """Values of the COLUMNS pixels in a cell's row r.

    ON_NODE: the first row and column have weight 0.
    """
    if ON_NODE and r == 0:
        left = corner[0]
        rise = corner[1] - corner[0]
    else:
        left = corner[0] + (corner[2] - corner[0]) * weight_y[r]
        rise = corner[1] + (corner[3] - corner[1]) * weight_y[r] - left
    value = ()
    for s in tl.static_range(COLUMNS):
        if ON_NODE and s == 0:
            value = value + (left,)
        else:
            value = value + (left + rise * weight_x[s],)
    return value


@jit
def log_sum_exp(
    logits_ptr, corners, plane, weight_y, weight_x,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ON_NODE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """log2 sum_c 2^z(c) of a cell's ROWS x COLUMNS pixels.

    There are two passes over the classes: one for the maximum, one for the sum.

    One pass with a running maximum of the corners is cheaper, but the sum underflows where
    neighbouring nodes are sure of different classes.
    """
    highest = ()
    for k in tl.static_range(ROWS * COLUMNS):
        highest = highest + (tl.full(corners[0].shape, float("-inf"), ACC),)
    class_ptr = logits_ptr
    for _ in range(C):
        corner = load_corners(class_ptr, corners, ACC)
        class_ptr += plane
        higher = ()
        for r in tl.static_range(ROWS):
            z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
            for s in tl.static_range(COLUMNS):
                higher = higher + (tl.maximum(highest[r * COLUMNS + s], z[s]),)
        highest = higher

    total = ()
    for k in tl.static_range(ROWS * COLUMNS):
        total = total + (tl.zeros(corners[0].shape, ACC),)
    class_ptr = logits_ptr
    for _ in range(C):
        corner = load_corners(class_ptr, corners, ACC)
        class_ptr += plane
        more = ()
        for r in tl.static_range(ROWS):
            z = interpolate_row(corner, r, weight_y, weight_x, COLUMNS, ON_NODE)
            for s in tl.static_range(COLUMNS):
                more = more + (total[r * COLUMNS + s] + tl.exp2(z[s] - highest[r * COLUMNS + s]),)
        total = more

    result = ()
    for k in tl.static_range(ROWS * COLUMNS):
        result = result + (highest[k] + tl.log2(total[k]),)
    return result


def chunks(logits: Tensor, size: tuple[int, int]) -> list[slice]:
    """Slices of the batch of about 32 MB of full-resolution float32 logits each.

    A slice has at least one image.
    """
    count = max(2**23 // (logits.shape[1] * size[0] * size[1]), 1)
    return [slice(start, start + count) for start in range(0, len(logits), count)]


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear interpolation in plain PyTorch, in float32 (float64 stays).

    It is skipped where the size is right already.
    """
    logits = logits.to(accumulator(logits.dtype))
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)
