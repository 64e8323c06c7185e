"""The operations on low-resolution logits against torch at full resolution, and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy, pseudo_label


def example(dtype=torch.float64, classes: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 5, 7, generator=generator, dtype=dtype).mul(3)
    target = torch.randint(0, classes, (2, 17, 25), generator=generator)
    target[0, :3] = 255
    return logits, target


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_cross_entropy_is_that_of_the_upsampled_logits(align_corners: bool, dtype: torch.dtype):
    logits, target = example()
    logits.requires_grad_()
    full = F.interpolate(logits, (17, 25), mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(full, target, ignore_index=255)
    (gradient,) = torch.autograd.grad(expected, logits)
    loss = cross_entropy(logits, target.to(dtype), align_corners=align_corners)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, logits)[0], 3 * gradient)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[[0.0, 0.0]], [[math.log(3), 0.0]]]])  # (1,2,1,2): p(class 1) = 3/4 and 1/2
    target = torch.tensor([[[1, 0]]])
    assert cross_entropy(logits, target, reduction="none")[0, 0].tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
    assert cross_entropy(logits, target).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_weights_and_reductions():
    logits, target = example()
    pixel_weight, class_weight = torch.rand(2, 17, 25, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    each = cross_entropy(logits, target, reduction="none")
    weight = pixel_weight * class_weight[target.clamp(max=4)] * (target != 255)
    weights = {"pixel_weight": pixel_weight, "class_weight": class_weight}
    torch.testing.assert_close(cross_entropy(logits, target, reduction="sum", **weights), (weight * each).sum())
    torch.testing.assert_close(cross_entropy(logits, target, **weights), (weight * each).sum() / weight.sum())
    torch.testing.assert_close(cross_entropy(logits, target, reduction="sum"), each.sum())


def test_all_ignored_is_zero_with_zero_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 16, 16), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_cross_entropy_refuses_what_it_cannot_do():
    logits, target = example()
    with pytest.raises(ValueError, match="label 7"):
        cross_entropy(logits, torch.full_like(target, 7))
    with pytest.raises(ValueError, match="Triton"):
        cross_entropy(logits, target, impl="triton")
    with pytest.raises(ValueError, match="impl"):
        pseudo_label(logits, impl="cuda")


def test_half_precision_logits_compute_in_float32():
    logits, target = example(torch.bfloat16)
    torch.testing.assert_close(cross_entropy(logits, target), cross_entropy(logits.float(), target))
    assert cross_entropy(logits, target).dtype == torch.float32


@pytest.mark.parametrize("align_corners", [True, False])
def test_pseudo_label_confidence_and_entropy(align_corners: bool):
    logits, _ = example(torch.float32)
    before = logits.clone()
    result = pseudo_label(logits, (17, 25), align_corners=align_corners, with_confidence=True, with_entropy=True)
    probs = F.interpolate(logits.double(), (17, 25), mode="bilinear", align_corners=align_corners).softmax(1)
    assert result.label.dtype == torch.uint8 and torch.equal(result.label.long(), probs.argmax(1))
    torch.testing.assert_close(result.confidence, probs.amax(1).float())
    torch.testing.assert_close(result.entropy, -(probs * probs.log()).sum(1).float())
    assert torch.equal(logits, before)


def test_pseudo_label_of_ties_and_certainty():
    tied = torch.zeros(1, 4, 2, 2)
    result = pseudo_label(tied, with_entropy=True)
    assert result.label.max() == 0 and result.confidence is None
    torch.testing.assert_close(result.entropy, torch.full((1, 2, 2), math.log(4)))
    certain = torch.tensor([-100.0, 100.0]).view(1, 2, 1, 1)
    assert pseudo_label(certain, with_entropy=True).entropy.item() == 0
