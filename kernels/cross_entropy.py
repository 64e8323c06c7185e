"""Pixel-wise cross-entropy of logits that are interpolated to the target's size.

    loss(n,y,x) = logsumexp_c z(n,c,y,x) - z(n,target(n,y,x),y,x),    z = bilinear(logits) at the target's resolution

The PyTorch reference is the only implementation so far: it interpolates to float32 N x C x H x W and lets autograd
differentiate the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Cross-entropy between upsampled logits and labels.

    Args:
        logits: (N,C,h,w) float16, bfloat16, float32 or float64, before softmax; C <= 254.
        target: (N,H,W) uint8, int32 or int64; H,W may equal h,w.
        ignore_index: pixels with this label add nothing.
        align_corners: how the bilinear interpolation places its corners.
        pixel_weight: (N,H,W) or None.
        class_weight: (C,) or None.
        reduction: "mean" = sum of w·loss / sum of w over valid pixels, w = pixel_weight · class_weight; "sum"; or "none".
        impl: "auto" or "torch"; "triton" has no kernel yet.

    Returns:
        A scalar with gradient, or (N,H,W) float32 without gradient for "none". float64 logits compute in float64, all others
        in float32. Where every pixel is ignored: 0 with zero gradient (PyTorch gives NaN).

    Raises:
        ValueError: shapes that do not fit, an unknown reduction or impl, or on CPU a label >= C that is not `ignore_index`.
    """
    check_impl(impl)
    if logits.ndim != 4 or target.ndim != 3 or logits.shape[0] != target.shape[0]:
        raise ValueError(f"logits (N,C,h,w) and target (N,H,W) are needed, not {tuple(logits.shape)} and {tuple(target.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r}: mean, sum or none")
    if not target.is_cuda and not torch.compiler.is_compiling():
        valid = target[target != ignore_index]
        if valid.numel() and int(valid.max()) >= logits.shape[1]:
            raise ValueError(
                f"label {int(valid.max())} in target, but there are {logits.shape[1]} classes (ignored: {ignore_index})"
            )
    return cross_entropy_reference(logits, target, ignore_index, align_corners, pixel_weight, class_weight, reduction)


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    align_corners: bool,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The operation in plain PyTorch; arguments as in `cross_entropy`."""
    if reduction == "none":
        logits = logits.detach()
    logits = upsample(logits, target.shape[1:], align_corners)
    target = target.long()
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    # The summing kernel of CUDA has no deterministic version; the one without reduction has.
    if reduction == "sum" and pixel_weight is None and not torch.are_deterministic_algorithms_enabled():
        return F.cross_entropy(logits, target, class_weight, ignore_index=ignore_index, reduction="sum")
    loss = F.cross_entropy(logits, target, class_weight, ignore_index=ignore_index, reduction="none")
    if pixel_weight is not None:
        loss = loss * pixel_weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    weight = (target != ignore_index).to(loss.dtype)
    if pixel_weight is not None:
        weight = weight * pixel_weight
    if class_weight is not None:
        weight = weight * class_weight[target.clamp(0, logits.shape[1] - 1)]
    total = weight.sum()
    return loss.sum() / torch.where(total > 0, total, 1)


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear interpolation in float32 (float64 stays), skipped where the size is right already."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` names an implementation that exists."""
    if impl == "triton":
        raise ValueError("impl='triton': there is no Triton kernel yet; use 'auto' or 'torch'")
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl {impl!r}: auto, triton or torch")
