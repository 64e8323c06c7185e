"""Supervised losses on the head's low-resolution logits.

They are averaged over the pixels of all processes.
"""

import math

from torch import Tensor

from common.augment import IGNORE
from common.distributed import global_mean
from kernels import cross_entropy


def mean_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy averaged over the pixels, of all processes, whose label is not 255.

    Args:
        logits: (N,C,h,w) before softmax.
        target: (N,H,W) labels; the logits are interpolated to their size.

    Returns:
        A scalar; 0 where every pixel is ignored.
    """
    total = cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return global_mean(total, (target != IGNORE).sum())


def hard_pixels(logits: Tensor, target: Tensor, threshold: float, min_kept: int) -> Tensor:
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
        min_kept: pixels an image.

    Returns:
        (N,H,W), easy pixels 255.
    """
    loss = cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    rank = min(min_kept * len(target), loss.numel())
    # The loss of the last pixel to keep. Ignored pixels have loss 0: if too few are valid, it is 0,
    # and all stay.
    at_least = loss.flatten().topk(rank).values[-1]
    easy = loss < at_least.clamp(max=-math.log(threshold))
    return target.masked_fill(easy, IGNORE)


def labelled_loss(logits: Tensor, target: Tensor, ohem: tuple[float, int] | None) -> Tensor:
    """The loss on labelled images: cross-entropy of all pixels, or of the hard ones.

    Args:
        logits: (N,C,h,w) before softmax.
        target: (N,H,W) labels.
        ohem: (threshold, min_kept) of `hard_pixels`, None to take all pixels.

    Returns:
        A scalar; 0 where every pixel is ignored.
    """
    if ohem:
        target = hard_pixels(logits, target, *ohem)
    return mean_cross_entropy(logits, target)
