"""The small change of features that changes predictions most: virtual adversarial training.

Miyato et al., Virtual Adversarial Training, arXiv:1704.03976; on features, with the predictions of
two teachers, PS-MT (Liu et al., arXiv:2111.12903).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_length(vectors: Tensor) -> Tensor:
    """Each sample (N,...) divided by its length; 0 where the length is 0 or not finite."""
    length = vectors.flatten(1).norm(dim=1).view(-1, *[1] * (vectors.ndim - 1))
    usable = (length > 0) & length.isfinite()
    return torch.where(usable, vectors / length.where(usable, torch.ones_like(length)), 0)


def direction(of: Callable[[Tensor], Tensor], at: Tensor, xi: float, epsilon: float) -> Tensor:
    """The step r of length ε that moves predictions away most, by one step of power iteration.

        p = softmax(of(at)),   d random, of unit length
        g = ∇_d KL(p ‖ softmax(of(at + ξ·d))),   r = ε · g / ‖g‖        [arXiv:1704.03976]

    At d = 0 the divergence has its minimum, so g is of the order of ξ² times its curvature. In
    float32 a ξ of 1e-6 moves `at` by less than the last digit of many of its values: g is then
    rounding, and the direction is random. 0.1 is large enough to be felt and small enough to be
    local.

    Args:
        of: gives logits (N,C,h,w) of features (N,F,h,w). Its parameters must not require
            gradients, and its BatchNorm must be in eval mode.
        at: (N,F,h,w) the features; nothing flows back to them.
        xi: ξ, the length of the step at which the gradient is taken.
        epsilon: ε, the length of r for each image.

    Returns:
        (N,F,h,w) of the type of `at`, without gradient; 0 for images where g is 0.
    """
    at = at.detach()
    with torch.autocast(at.device.type, enabled=False), torch.enable_grad():
        features = at.float()
        with torch.no_grad():
            target = of(features).softmax(1)
        d = unit_length(torch.rand_like(features) - 0.5).requires_grad_()
        moved = of(features + xi * d).log_softmax(1)
        divergence = F.kl_div(moved, target, reduction="sum")
        gradient = torch.autograd.grad(divergence, d)[0]
    return (epsilon * unit_length(gradient)).to(at.dtype)
