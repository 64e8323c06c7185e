"""The operations the usual way, at full resolution in PyTorch and NumPy.

This is what the kernels are compared with. Their arguments are those of the public functions, as
far as the scripts use them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import PseudoLabel, SoftConsistency


def usual_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Interpolate to full resolution, unless there already, then call torch's cross-entropy.

    That wants int64 labels, and takes no weights of pixels: those are multiplied with its map, of
    which there is no mean.
    """
    if pixel_weight is not None and reduction == "mean":
        raise ValueError("with pixel_weight the reduction is sum or none")
    full = logits.float()
    if logits.shape[2:] != target.shape[1:]:
        full = F.interpolate(full, target.shape[1:], mode="bilinear", align_corners=True)
    target = target.long()
    if pixel_weight is None:
        return F.cross_entropy(full, target, ignore_index=ignore_index, reduction=reduction)
    each = pixel_weight * F.cross_entropy(full, target, ignore_index=ignore_index, reduction="none")
    return each.sum() if reduction == "sum" else each


def autocast_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """`usual_cross_entropy` as under autocast: only torch's cross-entropy computes in float32."""
    full = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(full.float(), target.long(), ignore_index=255)


def usual_pseudo_label(
    logits: Tensor,
    size: tuple[int, int],
    *,
    with_confidence: bool = False,
    with_entropy: bool = False,
    threshold: float | None = None,
    valid_mask: Tensor | None = None,
) -> PseudoLabel:
    """Interpolate to full resolution, then softmax, max, threshold and entropy."""
    full = F.interpolate(logits.detach().float(), size, mode="bilinear", align_corners=True)
    if not with_confidence and not with_entropy and threshold is None:
        return PseudoLabel(full.argmax(1).to(torch.uint8), None, None)
    probs = full.softmax(1)
    confidence, label = probs.max(1)
    label, kept = label.to(torch.uint8), None
    if threshold is not None:
        keep = confidence >= threshold
        if valid_mask is not None:
            keep = keep & valid_mask
        label, kept = label.masked_fill(~keep, 255), keep.sum()
    entropy = None
    if with_entropy:
        entropy = -(probs * probs.clamp_min(1e-12).log()).sum(1)
    return PseudoLabel(label, confidence if with_confidence else None, entropy, kept)


def usual_soft_consistency(
    logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    *,
    mode: str = "squared",
    mask: Tensor | None = None,
    second: Tensor | None = None,
    threshold: float = 0.0,
) -> SoftConsistency:
    """Interpolate to full resolution, softmax, mix the targets, then torch's own losses."""

    def full(x: Tensor) -> Tensor:
        size = valid_mask.shape[1:]
        return F.interpolate(x.float(), size, mode="bilinear", align_corners=True)

    with torch.no_grad():
        probs = full(targets).softmax(1)
        if second is not None:
            probs = torch.where(mask[:, None], full(second).softmax(1), probs)
    if mode == "squared":
        each = (full(logits).softmax(1) - probs).square().sum(1)
    else:
        each = -(probs * full(logits).log_softmax(1)).sum(1)
        if mode == "kl":
            each = each - torch.special.entr(probs).sum(1)
    confident = (probs.amax(1) >= threshold) & valid_mask
    return SoftConsistency((each * valid_mask).sum(), valid_mask.sum(), confident.sum())


def usual_contrast(
    anchors: Tensor,
    positives: Tensor,
    bank: Tensor,
    indices: Tensor,
    classes: Tensor,
    *,
    temperature: float = 0.5,
) -> Tensor:
    """Gather the negatives, then torch's cosine similarity and cross-entropy."""
    negatives = bank[classes[:, None, None], indices].float()  # (K,A,M,D)
    candidates = torch.cat(
        [positives[:, None, None].expand(-1, anchors.shape[1], 1, -1), negatives], 2
    )
    similarity = F.cosine_similarity(anchors.float()[:, :, None], candidates, dim=3) / temperature
    target = torch.zeros(anchors.shape[:2], dtype=torch.long, device=anchors.device)
    return F.cross_entropy(similarity.transpose(1, 2), target, reduction="none")


def usual_percentile(values: Tensor, valid_mask: Tensor, q: list[float]) -> Tensor:
    """Copy the values to the host for numpy, as the released code of U2PL does."""
    found = np.percentile(values[valid_mask].cpu().numpy(), q)
    return torch.from_numpy(found).float().to(values.device)


def usual_drop(
    label: Tensor, entropy: Tensor, threshold: Tensor, *, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Mask the unreliable pixels and count the others."""
    label = label.masked_fill(entropy >= threshold, ignore_index)
    return label, (label != ignore_index).sum()
