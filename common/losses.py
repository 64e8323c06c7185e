"""Supervised losses on the head's low-resolution logits, averaged over the pixels of all processes."""

import math

import torch
from torch import Tensor

from common.augment import IGNORE
from common.runtime import Runtime
from kernels import cross_entropy


def mean_cross_entropy(logits: Tensor, target: Tensor, rt: Runtime, impl: str = "auto") -> Tensor:
    """Cross-entropy averaged over the pixels whose label is not 255, of all processes.

    Args:
        logits: (N,C,h,w) before softmax.
        target: (N,H,W) labels; the logits are interpolated to their size.
        rt: the process.
        impl: passed to the kernel.

    Returns:
        A scalar; 0 where every pixel is ignored.
    """
    return rt.mean(cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum", impl=impl), (target != IGNORE).sum())


def hard_pixels(logits: Tensor, target: Tensor, threshold: float, min_kept: int, impl: str = "auto") -> Tensor:
    """Online hard example mining: `target` with the easy pixels ignored.

    Kept are the pixels whose true class has a probability of at most `threshold`, and in any case
    the `min_kept` times N hardest. These are chosen among all images of this process, so two
    processes do not keep exactly what one does. If fewer pixels are valid, all stay.

    Source: Shrivastava et al., arXiv:1604.03540, in the pixel-wise form of the released CPS, whose
    processes have one image each (0.7; 50 000 pixels), and U2PL.

    Args:
        logits: (N,C,h,w).
        target: (N,H,W) labels.
        threshold: probability in (0,1).
        min_kept: pixels a picture.
        impl: passed to the kernel.

    Returns:
        (N,H,W), easy pixels 255.
    """
    loss = cross_entropy(logits, target, ignore_index=IGNORE, reduction="none", impl=impl)
    rank = min(min_kept * len(target), loss.numel())
    at_least = loss.flatten().topk(rank).values[-1]  # 0, the loss of ignored pixels, if too few are valid: all stay
    easy = loss < torch.clamp(at_least, max=-math.log(threshold))
    return target.masked_fill(easy, IGNORE)


def labelled_loss(logits: Tensor, target: Tensor, ohem: tuple[float, int] | None, rt: Runtime, impl: str = "auto") -> Tensor:
    """The loss on labelled pictures: plain cross-entropy, or with `ohem` = (threshold, min_kept) on the hard pixels only."""
    if ohem:
        target = hard_pixels(logits, target, *ohem, impl=impl)
    return mean_cross_entropy(logits, target, rt, impl)
