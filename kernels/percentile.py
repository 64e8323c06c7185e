"""Percentiles of the valid pixels of a map; and the mask that U2PL makes of one.

They are exact, and nothing leaves the device. The q-th percentile of n values lies at rank
r = (n-1) · q/100 of the sorted values: with k = floor(r) and g = r - k,

    percentile = v[k] + g · (v[k+1] - v[k])            in float64, which is numpy's "linear" rule

The usual way copies the map to the host for `numpy.percentile`, or sorts it: n is two million for
8 x 513 x 513, and `torch.quantile` refuses 16 million. Only two of the values are wanted.

The kernels find v[k] by radix selection: a float's bits, with the sign handled, are an unsigned
key of the same order. Four passes each count one byte of the keys that share the bytes found so
far, in 256 bins, and descend into the bin that holds rank k. v[k+1] is v[k] again if more values
equal it, else the smallest value above, found in a fifth pass. Counts and minima are integers:
the result is the same from run to run.

Several percentiles share the passes; in ascending order, those that agree in their first bytes also
share the counting.

sm_90: 47 registers in the first pass, 96 or 108 in the middle ones, 38 in the last; nothing
spilled. Six percentiles of 8 x 513 x 513 values take an H200 137 µs, of which 96 are the four
counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.interpolation import (
    ceil_div,
    check_offsets,
    implementation,
    jit,
    on_its_device,
    tl,
    use_triton,
)

BLOCK = 1024  # values of a program
BINS = tl.constexpr(256)
FEW = tl.constexpr(64)  # values of a block that are counted one by one


def masked_percentile_reference(values: Tensor, valid_mask: Tensor, q: Tensor) -> Tensor:
    """The operation in NumPy on a CPU, where selection beats sorting, and by sorting elsewhere.

    The latter does not synchronise.
    """
    if values.device.type == "cpu":
        data = values.float()[valid_mask].numpy()
        if not len(data):
            return torch.full(q.shape, float("nan"))
        rank = (len(data) - 1) * (q.double() / 100)
        low = rank.floor().long()
        high = (low + 1).clamp(max=len(data) - 1)
        data.partition(torch.cat([low, high]).unique().numpy())
        data = torch.from_numpy(data)
    elif values.numel() == 0:
        return torch.full(q.shape, float("nan"), device=values.device)
    else:
        count = valid_mask.sum()
        data = values.float().masked_fill(~valid_mask, float("inf")).flatten().sort().values
        rank = ((count - 1) * (q.double() / 100)).clamp_min(0)
        low = rank.floor().long()
        high = torch.minimum(low + 1, (count - 1).clamp_min(0))
        data[0] = torch.where(count > 0, data[0], float("nan"))
    low, high = (data.gather(0, index).double() for index in (low, high))
    return linear(low, high, rank - rank.floor()).float()


def linear(low: Tensor, high: Tensor, part: Tensor) -> Tensor:
    """low + part · (high - low), from the nearer end, as numpy does."""
    return torch.where(part < 0.5, low + (high - low) * part, high - (high - low) * (1 - part))


@jit
def ordered_key(value):
    """uint32 that orders as the float32 values do."""
    bits = value.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@jit
def wanted_rank(counts_ptr, q_ptr, i):
    """Number of values, rank k of the i-th percentile, and the part g beyond it."""
    # The first pass counts every valid value.
    n = tl.sum(tl.load(counts_ptr + tl.arange(0, BINS)), 0)
    rank = tl.maximum((n - 1).to(tl.float64) * (tl.load(q_ptr + i) / 100.0), 0.0)
    k = rank.to(tl.int32)
    return n, k, rank - k.to(tl.float64)


@jit
def count_kernel(
    values_ptr,  # (n,) float32
    valid_ptr,  # (n,) uint8
    counts_ptr,  # (4,Q,BINS) int32, zero at first
    state_ptr,  # (Q,4) int32: the bytes found so far; not read in the first pass
    n,
    Q: tl.constexpr,
    PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the PASS-th highest byte of the keys that agree in the bytes above.

    The first pass counts once for all queries.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(valid_ptr + at, mask=at < n, other=0) != 0
    key = ordered_key(tl.load(values_ptr + at, mask=at < n, other=0.0))
    byte = ((key >> (24 - 8 * PASS)) & 255).to(tl.int32)
    bins = tl.arange(0, BINS)
    if PASS == 0:
        counts = tl.histogram(byte, BINS, mask=valid)
        tl.atomic_add(counts_ptr + bins, counts, mask=counts > 0, sem="relaxed")
    else:
        before = tl.zeros([], tl.uint32)
        counts = tl.zeros([BINS], tl.int32)
        # Unrolled: in a loop the compiler keeps what the histograms share, in 197 registers for
        # 108.
        for i in tl.static_range(Q):
            found = tl.load(state_ptr + 4 * i).to(tl.uint32, bitcast=True)
            slot = counts_ptr + (PASS * Q + i) * BINS
            counted = valid & ((key >> (32 - 8 * PASS)) == found)
            # A histogram takes some 80 instructions a value: worth it only for many, and once for
            # queries that agree so far.
            if tl.sum(counted.to(tl.int32), 0) > FEW:
                if (i == 0) | (found != before):
                    counts = tl.histogram(byte, BINS, mask=counted)
                tl.atomic_add(slot + bins, counts, mask=counts > 0, sem="relaxed")
            else:
                tl.atomic_add(slot + byte, 1, mask=counted, sem="relaxed")
            before = found


@jit
def descend_kernel(
    q_ptr,  # (Q,) float64
    counts_ptr,  # (4,Q,BINS) int32
    state_ptr,  # (Q,4) int32: bytes found so far; rank among the keys that share them; how many
    Q: tl.constexpr,
    PASS: tl.constexpr,
):
    """Find the byte of the bin that holds the wanted rank; one program a query.

    The last column of the state is for `successor_kernel`: its minimum starts from the largest
    int32.
    """
    i = tl.program_id(0)
    state_ptr += 4 * i
    bins = tl.arange(0, BINS)
    if PASS == 0:
        counts = tl.load(counts_ptr + bins)
        found = 0
        _, k, _ = wanted_rank(counts_ptr, q_ptr, i)
    else:
        counts = tl.load(counts_ptr + (PASS * Q + i) * BINS + bins)
        found = tl.load(state_ptr)
        k = tl.load(state_ptr + 1)
    byte = tl.sum((tl.cumsum(counts, 0) <= k).to(tl.int32), 0)
    tl.store(state_ptr, (found << 8) | byte)
    tl.store(state_ptr + 1, k - tl.sum(tl.where(bins < byte, counts, 0), 0))
    tl.store(state_ptr + 2, tl.sum(tl.where(bins == byte, counts, 0), 0))
    tl.store(state_ptr + 3, 0x7FFFFFFF)


@jit
def successor_kernel(
    values_ptr,  # (n,) float32
    valid_ptr,  # (n,) uint8
    state_ptr,  # (Q,4) int32: the key of rank k; see below for the last column
    n,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the smallest value above v[k].

    The last column of the state holds its key, less 2^31.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(valid_ptr + at, mask=at < n, other=0) != 0
    key = ordered_key(tl.load(values_ptr + at, mask=at < n, other=0.0))
    signed = (key ^ tl.full([BLOCK], 0x80000000, tl.uint32)).to(tl.int32, bitcast=True)
    for i in tl.static_range(Q):
        found = tl.load(state_ptr + 4 * i).to(tl.uint32, bitcast=True)
        least = tl.min(tl.where(valid & (key > found), signed, 0x7FFFFFFF), 0)
        tl.atomic_min(state_ptr + 4 * i + 3, least, sem="relaxed")


@jit
def finish_kernel(
    q_ptr,  # (Q,) float64
    counts_ptr,  # (4,Q,BINS) int32
    state_ptr,  # (Q,4) int32
    result_ptr,  # (Q,) float32
):
    """Interpolate between v[k] and v[k+1]; one program a query."""
    i = tl.program_id(0)
    n, k, part = wanted_rank(counts_ptr, q_ptr, i)
    state_ptr += 4 * i
    key = tl.load(state_ptr).to(tl.uint32, bitcast=True)
    above = tl.load(state_ptr + 3).to(tl.uint32, bitcast=True) ^ tl.full([], 0x80000000, tl.uint32)
    equal = tl.load(state_ptr + 1) + 1 < tl.load(state_ptr + 2)
    above = tl.where(equal | (k + 1 >= n), key, above)
    low = key_value(key).to(tl.float64)
    high = key_value(above).to(tl.float64)
    value = tl.where(part < 0.5, low + (high - low) * part, high - (high - low) * (1.0 - part))
    tl.store(result_ptr + i, tl.where(n > 0, value, float("nan")).to(tl.float32))


@jit
def key_value(key):
    """The float32 of an ordered key."""
    bits = key ^ tl.where(key >> 31 != 0, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@on_its_device
def launch_percentile(values: Tensor, valid_mask: Tensor, q: Tensor) -> Tensor:
    """Run the kernels: four times count and descend, then the value above, then interpolate."""
    check_offsets(values.numel())  # counts have 32 bits, too
    values, valid = values.float().contiguous(), valid_mask.contiguous().view(torch.uint8)
    n, queries, passes, bins = values.numel(), len(q), 4, 256
    counts = torch.zeros((passes, queries, bins), dtype=torch.int32, device=values.device)
    state = torch.empty((queries, 4), dtype=torch.int32, device=values.device)
    result = torch.empty(queries, dtype=torch.float32, device=values.device)
    grid = (ceil_div(n, BLOCK),)
    for number in range(passes):
        count_kernel[grid](values, valid, counts, state, n, Q=queries, PASS=number, BLOCK=BLOCK)
        descend_kernel[(queries,)](q, counts, state, Q=queries, PASS=number)
    successor_kernel[grid](values, valid, state, n, Q=queries, BLOCK=BLOCK)
    finish_kernel[(queries,)](q, counts, state, result)
    return result


@torch.library.custom_op("semiseg::masked_percentile", mutates_args=())
def masked_percentile_op(values: Tensor, valid_mask: Tensor, q: Tensor, impl: str) -> Tensor:
    """-> (Q,) float32."""
    compute = launch_percentile if use_triton(impl, values.device) else masked_percentile_reference
    return compute(values, valid_mask, q)


@masked_percentile_op.register_fake
def _(values, valid_mask, q, impl):
    return q.new_empty(q.shape, dtype=torch.float32)


def on_device(numbers: list[float], device: torch.device) -> Tensor:
    """(Q,) float64, without a copy from the host, which would have to wait for the GPU.

    The numbers travel as arguments of a kernel, all of them in one launch.
    """
    result = torch.zeros(len(numbers), dtype=torch.float64, device=device)
    torch._foreach_add_(result.unbind(), numbers)
    return result


@torch.no_grad()
def masked_percentile(
    values: Tensor, valid_mask: Tensor, q: float | Sequence[float] | Tensor, *, impl: str = "auto"
) -> Tensor:
    """Percentiles of `values` where `valid_mask` is set, by numpy's linear rule.

    On CUDA the host does not wait.

    Args:
        values: any shape, finite floats; taken in float32.
        valid_mask: bool, the same shape.
        q: percentiles in [0,100]: one, several, or a tensor (Q,) or ().
        impl: "auto", what `set_backend` chose; "triton"; or "torch".

    Returns:
        (Q,) float32, without gradient; NaN if no value is valid.

    Raises:
        ValueError: shapes that differ, a mask that is not bool, no numbers or some outside
            [0,100], an unknown impl, or "triton" without a GPU, or with 2^31 values or more. The
            numbers of a tensor on a GPU are not looked at; one on the host is copied, which waits
            for the GPU.
    """
    if values.shape != valid_mask.shape or valid_mask.dtype != torch.bool:
        raise ValueError(
            f"values {tuple(values.shape)} need a bool mask of their shape, "
            f"not {tuple(valid_mask.shape)} {valid_mask.dtype}"
        )
    if isinstance(q, Tensor):
        numbers = q.reshape(-1).tolist() if q.device.type == "cpu" else []
        asked = q.numel()
    else:
        numbers = [float(number) for number in (q if isinstance(q, Sequence) else [q])]
        asked = len(numbers)
    if not asked:
        raise ValueError("no percentiles are asked for")
    if not all(0 <= number <= 100 for number in numbers):
        raise ValueError(f"percentiles {numbers} must lie in [0,100]")
    if isinstance(q, Tensor):
        q = q.to(values.device, torch.float64).reshape(-1)
    else:
        q = on_device(numbers, values.device)
    return masked_percentile_op(values, valid_mask, q, implementation(impl, values.device))


def drop_unreliable_reference(
    label: Tensor, entropy: Tensor, threshold: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The operation in plain PyTorch."""
    unreliable = entropy.float() >= threshold.float()  # as the kernel compares, whatever the types
    label = label.contiguous().masked_fill(unreliable, ignore_index)
    return label, torch.count_nonzero(label != ignore_index)


@jit
def drop_unreliable_kernel(
    label_ptr,  # (n,)
    entropy_ptr,  # (n,)
    threshold_ptr,  # ()
    result_ptr,  # (n,)
    kept_ptr,  # (programs,) int64
    n,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ignore the pixels at or above the threshold; count the rest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(label_ptr + at, mask=at < n, other=0).to(tl.int32)
    entropy = tl.load(entropy_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    label = tl.where(entropy >= tl.load(threshold_ptr).to(tl.float32), IGNORE, label)
    tl.store(result_ptr + at, label.to(result_ptr.dtype.element_ty), mask=at < n)
    kept = tl.sum(((at < n) & (label != IGNORE)).to(tl.int32), 0)
    tl.store(kept_ptr + tl.program_id(0), kept.to(tl.int64))


@on_its_device
def launch_drop(
    label: Tensor, entropy: Tensor, threshold: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Run the kernel."""
    label, entropy = label.contiguous(), entropy.contiguous()
    n = label.numel()
    grid = (ceil_div(n, BLOCK),)
    result = torch.empty_like(label)
    # Of the sum's type: nothing to convert.
    kept = torch.empty(grid, dtype=torch.int64, device=label.device)
    drop_unreliable_kernel[grid](
        label, entropy, threshold, result, kept, n, IGNORE=ignore_index, BLOCK=BLOCK
    )
    return result, kept.sum()


@torch.library.custom_op("semiseg::drop_unreliable", mutates_args=())
def drop_unreliable_op(
    label: Tensor, entropy: Tensor, threshold: Tensor, ignore_index: int, impl: str
) -> tuple[Tensor, Tensor]:
    """-> label, number kept."""
    compute = launch_drop if use_triton(impl, label.device) else drop_unreliable_reference
    return compute(label, entropy, threshold, ignore_index)


@drop_unreliable_op.register_fake
def _(label, entropy, threshold, ignore_index, impl):
    return label.new_empty(label.shape), label.new_empty((), dtype=torch.int64)


@torch.no_grad()
def drop_unreliable(
    label: Tensor,
    entropy: Tensor,
    threshold: Tensor | float,
    *,
    ignore_index: int = 255,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Ignore the pixels whose entropy is at or above a threshold.

    Args:
        label: (N,H,W) uint8, int32 or int64, of which the lower 32 bits are kept on a GPU; pixels
            that are `ignore_index` already stay so.
        entropy: (N,H,W), same unit as the threshold.
        threshold: a number, or a tensor with one number on the same device; NaN keeps all.
        ignore_index: what the unreliable pixels become.
        impl: "auto", what `set_backend` chose; "triton"; or "torch".

    Returns:
        The new labels, and the number of pixels that are not ignored, int64 () on the device.

    Raises:
        ValueError: shapes that differ, an `ignore_index` that the labels' type cannot hold, an
            unknown impl, or "triton" without a GPU.

    Source: the reliable pixels of Sec. 3.2 in Wang et al., arXiv:2203.03884.
    """
    if label.shape != entropy.shape:
        raise ValueError(
            f"label {tuple(label.shape)} and entropy {tuple(entropy.shape)} must have one shape"
        )
    limits = torch.iinfo(label.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(f"{label.dtype} labels cannot be {ignore_index}, the ignore_index")
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, dtype=torch.float32, device=label.device)
    if threshold.numel() != 1:
        raise ValueError(f"threshold must be one number, not {tuple(threshold.shape)}")
    impl = implementation(impl, label.device)
    return drop_unreliable_op(label, entropy, threshold.reshape(()), ignore_index, impl)
