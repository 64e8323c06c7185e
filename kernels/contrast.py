"""Contrast of anchors with a memory bank, without gathering the negatives.

The InfoNCE loss and its gradient come from one pass. With unit vectors a (anchor), p (the class's
positive) and y_1..y_M (negatives drawn from the class's bank), and s = cos similarity,

    loss = -log( e^(s(a,p)/T) / (e^(s(a,p)/T) + sum_m e^(s(a,y_m)/T)) )

[arXiv:2203.03884, section 3.1]. With the softmax weights w_0 (positive) and w_m (negatives), and an
anchor x = |x| a that is not yet of unit length,

    dloss/dx = ( v - (v·a) a ) / (T |x|),   v = sum_m w_m y_m + (w_0 - 1) p

The usual way gathers K x A x M vectors (21 classes, 256 anchors, 50 negatives, 256 floats: 275
MB), normalises a copy and keeps both for the backward pass, which writes gradients of the
negatives that nobody wants. Here each negative is read once, in the bank's own type (138 MB in
float16), and only the anchors get a gradient.

Since |s| <= 1, 1/T serves as the softmax's shift: no maximum has to be found first, and v can be
summed on the way. One warp has one (class, anchor), and takes a few negatives at a time. The
indices are an input, 0.8 % of the bytes, so that the draw can be tested.

sm_90: 64 registers, nothing spilled. An H200 takes 71 to 72 µs for 19 classes, 256 anchors each,
50 negatives, 256 features; for 21 classes it takes 73 µs.
"""

import torch
from torch import Tensor

from kernels.interpolation import (
    accumulator,
    implementation,
    in_full_precision,
    jit,
    on_its_device,
    tl,
    tl_type,
    triton,
    use_triton,
)

EPS = tl.constexpr(1e-12)  # shortest length to divide by, as in torch.nn.functional.normalize
TOGETHER = 4  # negatives that a warp handles at a time
CHUNK = 2**23  # floats that the reference gathers at a time


@in_full_precision
def memory_contrast_reference(
    anchors: Tensor,
    positives: Tensor,
    bank: Tensor,
    indices: Tensor,
    classes: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The operation in plain PyTorch, some anchors at a time.

    Arguments as in `memory_contrast`.

    Returns:
        Loss (K,A) and dloss/danchors (K,A,D).
    """
    dtype = accumulator(anchors.dtype)
    eps = 1e-12
    length = anchors.to(dtype).norm(dim=2, keepdim=True).clamp_min(eps)  # (K,A,1)
    unit = anchors.to(dtype) / length
    positive = torch.nn.functional.normalize(positives.to(dtype), dim=1, eps=eps)
    positive = positive[:, None]  # (K,1,D)
    losses, gradients = [], []
    count = max(CHUNK // max(indices.shape[0] * indices.shape[2] * anchors.shape[2], 1), 1)
    for a, i in zip(unit.split(count, 1), indices.split(count, 1)):  # (K,part,D), (K,part,M)
        negatives = bank[classes[:, None, None], i].to(dtype)  # (K,part,M,D)
        scale = 1 / negatives.norm(dim=3).clamp_min(eps)  # (K,part,M)
        to_positive = (a * positive).sum(2, keepdim=True)
        to_negatives = (negatives @ a[..., None])[..., 0] * scale
        similarity = torch.cat([to_positive, to_negatives], 2)  # (K,part,1+M)
        log_weight = (similarity / temperature).log_softmax(2)  # (K,part,1+M)
        weight = log_weight.exp()
        # v = sum_m w_m y_m + (w_0 - 1) p
        of_negatives = ((weight[:, :, 1:] * scale)[:, :, None] @ negatives)[:, :, 0]
        pull = of_negatives + (weight[:, :, :1] - 1) * positive
        losses.append(-log_weight[:, :, 0])
        gradients.append(pull - (pull * a).sum(2, keepdim=True) * a)
    gradient = torch.cat(gradients, 1) / (temperature * length)
    # A vector of length 0 has no direction to turn to.
    return torch.cat(losses, 1), torch.where(length > eps, gradient, 0.0)


@jit
def unit_vector(ptr, d, D: tl.constexpr, ACC: tl.constexpr):
    """A vector of D numbers, scaled to unit length, and the length it had; lanes beyond D are 0."""
    x = tl.load(ptr + d, mask=d < D, other=0.0).to(ACC)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), EPS)
    return x / length, length


@jit
def memory_contrast_kernel(
    anchors_ptr,  # (K,A,D)
    positives_ptr,  # (K,D)
    bank_ptr,  # (classes,capacity,D)
    indices_ptr,  # (K,A,M) int32
    classes_ptr,  # (K,) int32
    loss_ptr,  # (K,A)
    gradient_ptr,  # (K,A,D): dloss/danchors
    capacity,
    inverse_temperature,
    A,
    M: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two that holds D
    TOGETHER: tl.constexpr,
    ACC: tl.constexpr,
):
    """One (class, anchor) a program."""
    k = tl.program_id(1)
    row = (k * A + tl.program_id(0)).to(tl.int64)
    d = tl.arange(0, WIDTH)
    a, length = unit_vector(anchors_ptr + row * D, d, D, ACC)  # (WIDTH,)
    p, _ = unit_vector(positives_ptr + k * D, d, D, ACC)
    bank_ptr += tl.load(classes_ptr + k).to(tl.int64) * capacity * D
    positive = tl.sum(a * p, 0)
    total = tl.exp((positive - 1.0) * inverse_temperature)  # sum of e^((s-1)/T)
    pull = total * p  # sum of e^((s-1)/T) times the unit vectors
    weighted_sum = total * positive  # sum of e^((s-1)/T) · s, for v·a
    for start in range(0, M, TOGETHER):
        m = start + tl.arange(0, TOGETHER)
        there = m < M
        index = tl.load(indices_ptr + row * M + m, mask=there, other=0).to(tl.int64)
        mask = there[:, None] & (d < D)[None, :]
        y = tl.load(bank_ptr + index[:, None] * D + d[None, :], mask=mask, other=0.0)
        y = y.to(ACC)  # (TOGETHER,WIDTH)
        scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), EPS)
        s = tl.sum(y * a[None, :], 1) * scale
        e = tl.where(there, tl.exp((s - 1.0) * inverse_temperature), 0.0)
        total += tl.sum(e, 0)
        weighted_sum += tl.sum(e * s, 0)
        pull += tl.sum(y * (e * scale)[:, None], 0)
    tl.store(loss_ptr + row, tl.log(total) - (positive - 1.0) * inverse_temperature)
    turn = tl.where(length > EPS, inverse_temperature / length, 0.0)
    gradient = (pull / total - p - (weighted_sum / total - positive) * a) * turn
    tl.store(gradient_ptr + row * D + d, gradient, mask=d < D)


@on_its_device
def launch_memory_contrast(
    anchors: Tensor,
    positives: Tensor,
    bank: Tensor,
    indices: Tensor,
    classes: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Run the kernel."""
    k, a, d = anchors.shape
    anchors, positives, indices, classes = (
        x.contiguous() for x in (anchors, positives, indices, classes)
    )
    dtype = accumulator(anchors.dtype)
    loss = torch.empty((k, a), dtype=dtype, device=anchors.device)
    gradient = torch.empty((k, a, d), dtype=dtype, device=anchors.device)
    memory_contrast_kernel[(a, k)](
        anchors, positives, bank, indices, classes, loss, gradient, bank.shape[1],
        1 / temperature, a, M=indices.shape[2], D=d, WIDTH=triton.next_power_of_2(d),
        TOGETHER=TOGETHER, ACC=tl_type(dtype), num_warps=1,
    )  # fmt: skip
    return loss, gradient


@torch.library.custom_op("semiseg::memory_contrast", mutates_args=())
def memory_contrast_op(
    anchors: Tensor,
    positives: Tensor,
    bank: Tensor,
    indices: Tensor,
    classes: Tensor,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """-> loss (K,A), dloss/danchors (K,A,D); float32, or float64 for float64 anchors."""
    fused = use_triton(impl, anchors.device)
    compute = launch_memory_contrast if fused else memory_contrast_reference
    return compute(anchors, positives, bank, indices, classes, temperature)


@memory_contrast_op.register_fake
def _(anchors, positives, bank, indices, classes, temperature, impl):
    dtype = accumulator(anchors.dtype)
    loss = anchors.new_empty(anchors.shape[:2], dtype=dtype)
    return loss, anchors.new_empty(anchors.shape, dtype=dtype)


def save_gradient(ctx, inputs, output):
    """Keep the gradient that the forward pass made."""
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)  # or autograd makes zeros for the output without gradient
    ctx.mark_non_differentiable(output[1])


def scale_gradient(ctx, upstream, _):
    """Apply the chain rule: one number an anchor; the other inputs get nothing.

    The gradient is read once and written once, in the anchors' type.
    """
    if upstream is None:
        return (None,) * 7
    (gradient,) = ctx.saved_tensors
    result = torch.empty_like(gradient, dtype=ctx.dtype)
    return torch.mul(upstream[..., None], gradient, out=result), *[None] * 6


memory_contrast_op.register_autograd(scale_gradient, setup_context=save_gradient)


def memory_contrast(
    anchors: Tensor,
    positives: Tensor,
    bank: Tensor,
    indices: Tensor,
    classes: Tensor,
    *,
    temperature: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """InfoNCE of each anchor against its class's positive and negatives.

    The negatives are drawn from the class's bank.

    Args:
        anchors: (K,A,D) floats of any length; the only input that gets a gradient.
        positives: (K,D) floats of any length.
        bank: (num_classes,capacity,D) floats of any length, float16 for instance; contiguous.
        indices: (K,A,M) int32, the rows of the bank that are an anchor's negatives. On a GPU they
            are not checked.
        classes: (K,) int32, the class in the bank of each of the K.
        temperature: T, at least 0.05; the kernel rounds 1/T to float32.
        impl: "auto", what `set_backend` chose; "triton"; or "torch".

    Returns:
        (K,A) float32 (float64 for float64 anchors), the loss of each anchor, with gradient (of
        first order).

    Raises:
        ValueError: shapes or types that do not fit, an unknown impl, or "triton" without a GPU.

    Source: section 3.1, arXiv:2203.03884.
    """
    check_tensors(anchors, positives, bank, indices, classes)
    if not temperature >= 0.05:
        raise ValueError(
            f"temperature {temperature}: at least 0.05, or e^(2/T) leaves the range of float32"
        )
    impl = implementation(impl, anchors.device)
    inputs = (anchors, positives.detach(), bank.detach(), indices, classes, temperature, impl)
    return memory_contrast_op(*inputs)[0]


def check_tensors(
    anchors: Tensor, positives: Tensor, bank: Tensor, indices: Tensor, classes: Tensor
) -> None:
    """Raise ValueError unless shapes and types fit each other."""
    k, _, d = anchors.shape
    if (
        positives.shape != (k, d)
        or bank.shape[2:] != (d,)
        or indices.shape[:-1] != anchors.shape[:2]
        or classes.shape != (k,)
    ):
        raise ValueError(
            f"anchors {tuple(anchors.shape)} (K,A,D) do not fit "
            f"positives {tuple(positives.shape)} (K,D), "
            f"bank {tuple(bank.shape)} (classes,capacity,D), "
            f"indices {tuple(indices.shape)} (K,A,M), classes {tuple(classes.shape)}"
        )
    if indices.dtype != torch.int32 or classes.dtype != torch.int32:
        raise ValueError(
            f"indices and classes must be int32, not {indices.dtype} and {classes.dtype}"
        )
    if not bank.is_contiguous():
        raise ValueError(
            f"the bank must be contiguous (a copy of it would be as large), "
            f"not of strides {bank.stride()}"
        )
