"""The consistency of two networks, reference and kernel, against float64 PyTorch."""

import math

import pytest
import torch
from conftest import MODULES
from kernel_examples import CASES, HALF, consistency_example, upsampled

from kernels import soft_consistency
from kernels.soft_consistency import MODES
from kernels.timing import peak_cpu


def exact_consistency(logits, targets, valid, mode, mask=None, second=None, align_corners=True):
    """In float64: the loss of each valid pixel, and the target's largest probability in each."""
    size = valid.shape[1:]
    t = upsampled(targets, size, align_corners)
    if second is not None:
        t = torch.where(mask[:, None], upsampled(second, size, align_corners), t)
    log_p, log_q = upsampled(logits, size, align_corners).log_softmax(1), t.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    each = {
        "squared": (p - q).square(),
        "cross_entropy": -q * log_p,
        "kl": q * (log_q - log_p),
    }[mode]
    return each.sum(1)[valid], q.amax(1)[valid]


# Every case plain or mixed, and every mode both ways in three of them: interpreted, a large one
# takes ten seconds.
CONSISTENCIES = [(*case, torch.float32, "squared", i % 2 == 1) for i, case in enumerate(CASES)]


CONSISTENCIES += [
    (*CASES[i], torch.float32, mode, mixed)
    for i in (0, 6, 11)
    for mode in MODES
    for mixed in (False, True)
]


CONSISTENCIES += [(*case, "squared", True) for case in HALF]


@pytest.mark.parametrize("shape, size, align_corners, dtype, mode, mixed", CONSISTENCIES)
def test_soft_consistency_and_gradient(shape, size, align_corners, dtype, mode, mixed, where):
    impl, device = where
    logits, targets, second, valid, mask = consistency_example(shape, size, device, dtype)
    options = {"mask": mask, "second": second} if mixed else {}
    options["align_corners"] = align_corners
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    each, confidence = exact_consistency(exact, targets, valid, mode, **options)
    (3 * each.sum()).backward()
    options |= {"mode": mode, "threshold": 0.7, "impl": impl}
    found = soft_consistency(logits, targets, valid, **options)
    (3 * found.loss).backward()
    assert found.loss.dtype == torch.float32 and logits.grad.dtype == dtype
    # The references interpolate with torch's float32 weights, which are at 4e-6 of the exact ones.
    # And the logarithms of probabilities have the absolute error of the logits, in every pixel.
    errors = {"rel": 1e-5 if impl == "torch" else 1e-6, "abs": 2e-7 * len(each)}
    assert found.loss.item() == pytest.approx(each.sum().item(), **errors)
    tolerance = 1e-2 if dtype != torch.float32 else 1e-5
    # Where the parts of a node's gradient cancel, the errors of its pixels do not.
    pixels = size[0] * size[1] / (shape[2] * shape[3])
    largest = max(exact.grad.abs().max().item(), 0.05 * pixels)
    assert (logits.grad.double() - exact.grad).abs().max() <= tolerance * largest
    assert found.count.dtype == found.confident.dtype == torch.int64
    assert found.count.item() == valid.sum().item()
    least, most = ((confidence >= 0.7 + shift).sum().item() for shift in (1e-5, -1e-5))
    assert least <= found.confident.item() <= most


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("mode", MODES)
def test_the_consistency_without_gradient_is_the_same(mode, mixed, where):
    impl, device = where
    inputs = consistency_example((2, 3, 5, 7), (17, 25), device)
    logits, targets, second, valid, mask = inputs
    options = {"mode": mode, "threshold": 0.7, "impl": impl}
    options |= {"mask": mask, "second": second} if mixed else {}
    alone = soft_consistency(logits, targets, valid, **options)
    logits.requires_grad_()
    found = soft_consistency(logits, targets, valid, **options)
    with torch.no_grad():
        silent = soft_consistency(logits, targets, valid, **options)
    assert found.loss.requires_grad and not (alone.loss.requires_grad or silent.loss.requires_grad)
    for each in (alone, silent):
        torch.testing.assert_close(each.loss, found.loss.detach(), rtol=1e-6, atol=0)
        assert torch.equal(each.count, found.count)
        assert torch.equal(each.confident, found.confident)


@pytest.mark.parametrize("align_corners", [True, False])
def test_narrow_programs_of_the_consistency(align_corners, monkeypatch, where):
    """The real width of 32 lanes, and a mask whose edges some programs cross and others do not."""
    impl, device = where
    for module in MODULES:
        monkeypatch.setattr(module, "CELL_LANES", 32)
    inputs = consistency_example((1, 2, 5, 81), (17, 321), device)
    logits, targets, second, valid, mask = inputs
    mask[:] = False
    mask[:, 3:11, 130:200] = True
    options = {"mask": mask, "second": second, "align_corners": align_corners}
    exact = logits.double().requires_grad_()
    exact_consistency(exact, targets, valid, "squared", **options)[0].sum().backward()
    logits.requires_grad_()
    soft_consistency(logits, targets, valid, **options, impl=impl).loss.backward()
    assert (logits.grad.double() - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


def test_soft_consistency_by_hand(where):
    impl, device = where
    logits = torch.tensor([[[[0.0, 0.0]], [[math.log(3), 0.0]]]], device=device)  # p: 3/4, 1/2
    targets = torch.tensor([[[[0.0, 0.0]], [[0.0, math.log(9)]]]], device=device)  # q: 1/2, 9/10
    valid = torch.tensor([[[True, True]]], device=device)

    def found(mode, mask):
        result = soft_consistency(logits, targets, mask, mode=mode, threshold=0.9, impl=impl)
        return [each.item() for each in result]

    first = valid.clone()
    first[..., 1] = False
    cross_entropy_1 = -(math.log(1 / 4) + math.log(3 / 4)) / 2
    assert found("squared", first) == pytest.approx([2 * 0.25**2, 1, 0])
    assert found("squared", valid) == pytest.approx([2 * 0.25**2 + 2 * 0.4**2, 2, 1])
    assert found("cross_entropy", first) == pytest.approx([cross_entropy_1, 1, 0])
    assert found("kl", first) == pytest.approx([cross_entropy_1 - math.log(2), 1, 0])


@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits_of_the_consistency_stay_finite(mode, where):
    impl, device = where
    logits, targets, second, valid, mask = consistency_example((1, 3, 5, 7), (17, 25), device)
    logits, targets, second = (x.sign() * 1e4 for x in (logits, targets, second))
    options = {"mode": mode, "mask": mask, "second": second}
    exact = logits.double().requires_grad_()
    expected = exact_consistency(exact, targets, valid, **options)[0].sum()
    expected.backward()
    loss = soft_consistency(logits.requires_grad_(), targets, valid, **options, impl=impl).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # Interpolated logits of 1e4 are known to 1e-3 in float32.
    assert (logits.grad.double() - exact.grad).abs().max() <= 1e-2


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("size", [(16, 16), (4, 4)])
def test_no_valid_pixel_is_zero_with_zero_gradient(size, mixed, where):
    impl, device = where
    logits, targets, second, valid, mask = consistency_example((1, 3, 4, 4), size, device)
    logits.requires_grad_()
    options = {"mask": mask, "second": second} if mixed else {}
    for mode in MODES:
        found = soft_consistency(logits, targets, valid & False, mode=mode, **options, impl=impl)
        (gradient,) = torch.autograd.grad(found.loss, logits)
        assert [each.item() for each in found] == [0, 0, 0] and gradient.abs().max() == 0


def test_the_targets_get_no_gradient(where):
    impl, device = where
    inputs = consistency_example((1, 3, 4, 4), (13, 13), device)
    logits, targets, second, valid, mask = inputs
    for each in (logits, targets, second):
        each.requires_grad_()
    found = soft_consistency(logits, targets, valid, mask=mask, second=second, impl=impl)
    found.loss.backward()
    assert logits.grad.abs().max() > 0 and targets.grad is None and second.grad is None
    equal = soft_consistency(logits, logits, valid, impl=impl)  # no distance, and no pull
    assert equal.loss.item() < 1e-10
    assert torch.autograd.grad(equal.loss, logits)[0].abs().max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_of_the_consistency_holds_two_full_resolution_tensors_at_most(mode):
    """Over the batch, too: what one image took is free before the next one needs it."""
    logits, targets, second, valid, mask = consistency_example((2, 21, 57, 57), (449, 449))
    full = 21 * 449 * 449 * 4  # of one image, of which a chunk has no more
    logits.requires_grad_()
    options = {"mode": mode, "mask": mask, "second": second, "impl": "torch"}
    peak = peak_cpu(lambda: soft_consistency(logits, targets, valid, **options).loss.backward())
    assert full < peak < 2.9 * full
