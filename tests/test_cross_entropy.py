"""Cross-entropy with its gradient, reference and kernels, against float64 PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import MODULES, run
from kernel_examples import CASES, HALF, example, upsampled

from kernels import cross_entropy
from kernels.cross_entropy_map import pixels_of


@pytest.mark.parametrize(
    "shape, size, align_corners, dtype", [(*case, torch.float32) for case in CASES] + HALF
)
def test_cross_entropy_and_gradient(shape, size, align_corners, dtype, where):
    impl, device = where
    logits, target = example(shape, size, device, dtype, ignored=size != (1, 1))
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(upsampled(exact, size, align_corners), target, ignore_index=255)
    (3 * expected).backward()
    loss = cross_entropy(logits, target.to(torch.uint8), align_corners=align_corners, impl=impl)
    (3 * loss).backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    # The references interpolate with torch's float32 weights, which are at 4e-6 of the exact ones.
    tolerance = 1e-2 if dtype != torch.float32 else 1e-5 if impl == "torch" else 2e-6
    assert (logits.grad.double() - exact.grad).abs().max() <= tolerance * exact.grad.abs().max()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("label_type", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("size", [(17, 25), (24, 32), (5, 7)])
def test_weights_and_reductions(size, label_type, reduction, where):
    impl, device = where
    logits, target = example((2, 4, 5, 7), size, device, torch.float32)
    logits.requires_grad_()
    pixel_weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)).to(device)
    class_weight = torch.tensor([0.5, 1, 2, 0], device=device)
    options = {"pixel_weight": pixel_weight, "class_weight": class_weight, "impl": impl}
    exact = logits.detach().double().requires_grad_()
    each = F.cross_entropy(upsampled(exact, size), target, ignore_index=255, reduction="none")
    weight = pixel_weight.double() * class_weight.double()[target.clamp(max=3)] * (target != 255)
    result = cross_entropy(logits, target.to(label_type), reduction=reduction, **options)
    if reduction == "none":
        torch.testing.assert_close(result.double(), weight * each.detach(), rtol=1e-5, atol=1e-5)
        assert not result.requires_grad
        return
    torch.testing.assert_close(result.double(), (weight * each).sum(), rtol=1e-6, atol=0)
    mean = cross_entropy(logits, target.to(label_type), **options)
    torch.testing.assert_close(
        mean.double(), (weight * each).sum() / weight.sum(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        cross_entropy(logits.detach(), target.to(label_type), **options), mean.detach()
    )
    mean.backward()
    ((weight * each).sum() / weight.sum()).backward()
    assert (logits.grad.double() - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


def test_narrow_programs_hand_parts_of_the_gradient_to_their_neighbours(monkeypatch, where):
    """The real width of 32 lanes: nodes whose left and right cells lie in different programs."""
    impl, device = where
    for module in MODULES:
        monkeypatch.setattr(module, "CELL_LANES", 32)
    for align_corners in (True, False):
        logits, target = example((1, 2, 5, 41), (17, 161), device, torch.float32)
        logits.requires_grad_()
        exact = logits.detach().double().requires_grad_()
        F.cross_entropy(
            upsampled(exact, (17, 161), align_corners), target, ignore_index=255
        ).backward()
        cross_entropy(logits, target, align_corners=align_corners, impl=impl).backward()
        assert (logits.grad.double() - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("size", [(17, 25), (5, 7)])
def test_extreme_logits_stay_exact(size, where):
    """Neighbouring nodes that are sure of different classes.

    With a bound over the corners the sum would underflow between them.
    """
    impl, device = where
    logits, target = example((1, 3, 5, 7), size, device, torch.float32)
    logits = (logits.sign() * 100).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(upsampled(exact, size), target, ignore_index=255)
    expected.backward()
    loss = cross_entropy(logits, target, impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (logits.grad.double() - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("size", [(17, 25), (5, 7)])
def test_an_ignored_label_that_the_type_of_the_labels_cannot_hold(size, where):
    """Found wrong once: lanes beyond the image read 156 and counted.

    That is what -100 is in 8 bits.
    """
    impl, device = where
    logits, target = example((1, 3, 5, 7), size, device, torch.float32, ignored=False)
    logits.requires_grad_()
    expected = F.cross_entropy(upsampled(logits, size), target)
    gradient = torch.autograd.grad(expected, logits)[0]
    loss = cross_entropy(logits, target.to(torch.uint8), ignore_index=-100, impl=impl)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (4, 4)])
@pytest.mark.parametrize("scale", [1, 65_536])  # as float16's loss scaler begins: NaN once
def test_all_ignored_is_zero_with_zero_gradient(size, scale, where):
    impl, device = where
    logits = torch.randn(1, 3, 4, 4, device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, *size), 255, device=device), impl=impl)
    (scale * loss).backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_a_label_outside_the_classes_does_not_count_where_nothing_refuses_it():
    """The reference on a GPU, where looking at the labels would wait for it."""
    logits = torch.randn(1, 3, 4, 4)
    target = torch.tensor([[[0, 3, -1, 255], *[[2] * 4] * 3]])
    some = slice(0, 1)
    found = pixels_of(logits, target, None, None, 255, True, some)
    expected = F.cross_entropy(
        logits, target.where(target.clamp(0, 2) == target, 255), ignore_index=255, reduction="none"
    )
    torch.testing.assert_close(found.loss, expected)
    assert found.weight.sum() == 13


@pytest.mark.parametrize("size", [(16, 16), (4, 4)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_reaches_the_weights(size, reduction, where):
    """With "none" the result asked for one, which no backward pass could give."""
    impl, device = where
    logits, target = example((1, 3, 4, 4), size, device, torch.float32)
    weights = {
        "pixel_weight": torch.ones(target.shape, device=device, requires_grad=True),
        "class_weight": torch.ones(3, device=device, requires_grad=True),
    }
    found = cross_entropy(logits, target, reduction=reduction, impl=impl, **weights)
    assert not found.requires_grad


def test_cross_entropy_by_hand(where):
    impl, device = where
    # p(class 1) = 3/4 and 1/2
    logits = torch.tensor([[[[0.0, 0.0]], [[math.log(3), 0.0]]]], device=device)
    target = torch.tensor([[[1, 0]]], device=device)
    each = cross_entropy(logits, target, reduction="none", impl=impl)
    assert each[0, 0].tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
    assert cross_entropy(logits, target, impl=impl).item() == pytest.approx(
        (math.log(4 / 3) + math.log(2)) / 2
    )


def test_gradient_scaled_twice_comes_from_the_same_saved_values(where):
    impl, device = where
    logits, target = example((1, 3, 5, 7), (17, 25), device, torch.float32)
    loss = cross_entropy(logits.requires_grad_(), target, impl=impl)
    first, second = (
        torch.autograd.grad(loss, logits, torch.tensor(s, device=device), retain_graph=True)[0]
        for s in (1.0, 5.0)
    )
    torch.testing.assert_close(5 * first, second)


def test_the_full_size_backward_pass_reads_all_classes_before_it_writes_one():
    """In the compiled code no load moves above a store.

    The pass had one load of two bytes in flight.
    """
    lines = (
        "import torch",
        "from kernels import aot",
        "logits, target = aot.inputs(torch.bfloat16, 1, 21, 65, 65)",
        "with aot.dry_run('sm_90') as launches:",
        "    aot.with_backward(aot.cross_entropy, logits, target)()",
        "print(launches[-1].kernel, launches[-1].compiled.asm['ptx'])",
    )
    text = run("-c", "\n".join(lines)).stdout
    assert text.startswith("full_size_kernel")
    before_the_first_store = text.split("st.global")[0]
    assert before_the_first_store.count("ld.global") >= 21
