"""Labels, confidences and entropies, reference and kernel, against float64 PyTorch."""

import math

import pytest
import torch
from kernel_examples import CASES, example, upsampled

from kernels import pseudo_label


def test_labels_of_nan_are_not_sure(where):
    """The GPU's maximum drops NaN: the entropy of such a pixel was 0 once."""
    impl, device = where
    logits = torch.zeros(1, 3, 4, 4, device=device)
    logits[:, 1, 0, 0] = math.nan
    found = pseudo_label(logits, (7, 7), with_confidence=True, with_entropy=True, impl=impl)
    assert found.entropy[0, 0, 0].isnan() and found.confidence[0, 0, 0].isnan()
    assert found.entropy[0, -1, -1].item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("shape, size, align_corners", CASES)
def test_pseudo_label_confidence_and_entropy(shape, size, align_corners, where):
    impl, device = where
    logits, _ = example(shape, size, device, torch.float32)
    result = pseudo_label(
        logits,
        size,
        align_corners=align_corners,
        with_confidence=True,
        with_entropy=True,
        impl=impl,
    )
    full = upsampled(logits, size, align_corners)
    probs = full.softmax(1)
    best = full.topk(min(2, shape[1]), 1).values
    certain = (best[:, 0] - best[:, 1]) > 1e-5
    assert result.label.dtype == torch.uint8 and torch.equal(
        result.label.long()[certain], full.argmax(1)[certain]
    )
    # torch's float32 weights again
    tolerance = {"atol": 1e-4 if impl == "torch" else 3e-6, "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(result.confidence, probs.amax(1), **tolerance)
    torch.testing.assert_close(result.entropy, torch.special.entr(probs).sum(1), **tolerance)


def test_pseudo_label_of_ties_and_certainty(where):
    impl, device = where
    tied = torch.zeros(1, 4, 2, 2, device=device)
    result = pseudo_label(tied, (5, 5), with_entropy=True, impl=impl)
    assert result.label.max() == 0 and result.confidence is None
    torch.testing.assert_close(result.entropy, torch.full((1, 5, 5), math.log(4), device=device))
    certain = torch.tensor([-100.0, 100.0], device=device).view(1, 2, 1, 1)
    alone = pseudo_label(certain, with_entropy=True, impl=impl)
    assert alone.entropy.item() == 0 and alone.label.item() == 1
    assert pseudo_label(certain, impl=impl).entropy is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape, size, align_corners", [CASES[i] for i in (0, 1, 6, 12, 13)])
def test_labels_below_a_threshold_are_dropped(shape, size, align_corners, dtype, where):
    """Exactly those whose confidence, as another call returns it, is below."""
    impl, device = where
    logits, target = example(shape, size, device, dtype)
    options = {"align_corners": align_corners, "impl": impl}
    plain = pseudo_label(logits, size, with_confidence=True, **options)
    valid = target != 255
    # A number that some pixel has: it stays.
    threshold = plain.confidence.flatten().sort().values[plain.confidence.numel() // 2].item()
    for mask in (None, valid):
        found = pseudo_label(logits, size, threshold=threshold, valid_mask=mask, **options)
        keep = plain.confidence >= threshold
        if mask is not None:
            keep &= mask
        assert torch.equal(found.label, plain.label.masked_fill(~keep, 255))
        assert found.kept.dtype == torch.int64 and found.kept.item() == keep.sum().item() > 0
        assert found.confidence is None and found.entropy is None
    everything = pseudo_label(logits, size, threshold=0, valid_mask=valid, **options)
    assert torch.equal(everything.label, plain.label.masked_fill(~valid, 255))
    assert everything.kept.item() == valid.sum().item() and plain.kept is None


def test_a_threshold_that_float32_rounds(where):
    """0.7 and 0.3 are not float32 numbers: the threshold is rounded as the confidence is."""
    impl, device = where
    logits = torch.tensor([0.7, 0.3], device=device).log().view(1, 2, 1, 1)
    plain = pseudo_label(logits, with_confidence=True, impl=impl)
    for threshold in (0.7, 0.69999999, 0.70000001, plain.confidence.item(), 0.7000002):
        found = pseudo_label(logits, threshold=threshold, impl=impl)
        dropped = (plain.confidence < threshold).item()
        assert (found.label.item() == 255) == dropped and found.kept.item() == 1 - dropped
