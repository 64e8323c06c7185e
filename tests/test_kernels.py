"""The fused operations, references and kernels, against float64 PyTorch at full resolution.

Without a GPU Triton's interpreter runs the kernels; `pytest -m gpu` runs the same tests compiled,
on a GPU.
"""

import argparse
import ast
import copy
import csv
import functools
import itertools
import math
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NATIVE, never_waiting, run, settings

import cps
import kernels
import mean_teacher
import psmt
import u2pl
import unimatch
from common import adaptive, datasets, losses, step
from common.data import train_loader
from common.deeplabv3plus import DeepLabV3Plus
from common.run import to_device
from kernels import (
    PseudoLabel,
    benchmark,
    cross_entropy,
    drop_unreliable,
    masked_percentile,
    memory_contrast,
    pseudo_label,
    set_backend,
    soft_consistency,
)
from kernels.cross_entropy_full import launch as launch_full
from kernels.cross_entropy_map import pixels_of
from kernels.interpolation import axis, plan
from kernels.percentile import launch_percentile
from kernels.soft_consistency import MODES
from kernels.timing import Timing, peak_cpu

MODULES = [
    sys.modules[f"kernels.{name}"]
    for name in ("cross_entropy", "cross_entropy_map", "pseudo_label", "soft_consistency")
]
IMPLEMENTATIONS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(
        ("triton", "cpu"),
        id="interpreted",
        marks=pytest.mark.skipif(NATIVE, reason="kernels are compiled here"),
    ),
    pytest.param(
        ("triton", "cuda"),
        id="gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not NATIVE, reason="no CUDA device")],
    ),
    pytest.param(
        ("torch", "cuda"),
        id="torch-gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not NATIVE, reason="no CUDA device")],
    ),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def where(request, monkeypatch) -> tuple[str, str]:
    """(impl, device).

    Interpreted kernels get wide programs, since the interpreter's time goes by their number.
    """
    impl, device = request.param
    if (impl, device) == ("triton", "cpu"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        for module in MODULES:
            monkeypatch.setattr(module, "CELL_LANES", 256)
    return impl, device


def example(shape, size, device="cpu", dtype=torch.float64, scale=3.0, ignored=True):
    """Logits, and labels of which the upper rows are ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    if ignored:
        target[:, : size[0] // 5] = 255
    return logits.to(device), target.to(device)


def upsampled(logits, size, align_corners=True):
    """Full-resolution logits in float64."""
    logits = logits.double()
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


CASES = [
    # logits, target, align_corners: classes 2, 19, 21, 150; ratios 4 and 8 exact, 1, above 4 and 5,
    # and below 1
    ((2, 2, 5, 7), (17, 25), True),
    ((1, 19, 5, 6), (17, 21), True),
    ((1, 21, 2, 129), (5, 513), True),  # a band of 129 -> 513
    ((1, 150, 2, 3), (5, 9), True),
    ((1, 3, 12, 12), (51, 51), True),
    ((1, 2, 16, 16), (64, 64), True),
    ((2, 2, 16, 16), (64, 64), False),
    ((1, 3, 5, 9), (33, 65), True),
    ((1, 4, 11, 11), (5, 5), True),
    ((1, 4, 11, 11), (5, 5), False),
    ((1, 3, 1, 1), (1, 1), True),
    ((1, 3, 1, 1), (6, 9), False),
    ((1, 2, 3, 4), (50, 61), False),
    ((2, 21, 9, 10), (9, 10), True),
    ((1, 150, 6, 7), (6, 7), True),
]


HALF = [(*CASES[i], dtype) for i in (0, 4, 13) for dtype in (torch.bfloat16, torch.float16)]


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


def test_labels_of_nan_are_not_sure(where):
    """The GPU's maximum drops NaN: the entropy of such a pixel was 0 once."""
    impl, device = where
    logits = torch.zeros(1, 3, 4, 4, device=device)
    logits[:, 1, 0, 0] = math.nan
    found = pseudo_label(logits, (7, 7), with_confidence=True, with_entropy=True, impl=impl)
    assert found.entropy[0, 0, 0].isnan() and found.confidence[0, 0, 0].isnan()
    assert found.entropy[0, -1, -1].item() == pytest.approx(math.log(3))


def test_entropies_and_thresholds_are_compared_in_float32(where):
    """In bfloat16 0.5005 is 0.5."""
    impl, device = where
    entropy = torch.tensor([[[0.5, 0.25, 0.75]]], dtype=torch.bfloat16, device=device)
    label = torch.zeros(1, 1, 3, dtype=torch.uint8, device=device)
    found, kept = drop_unreliable(label, entropy, 0.5005, impl=impl)
    assert found.tolist() == [[[0, 0, 255]]] and kept.item() == 2


def test_too_many_pixels_in_a_cell_are_refused():
    """More than CUDA starts programs along the third axis of a grid."""
    with pytest.raises(ValueError, match=r"\(1, 1\) to \(2048, 2048\): too many pixels in a cell"):
        plan(torch.zeros(1, 2, 1, 1), (2048, 2048), True, 20)


def test_what_overflows_offsets_of_32_bits_is_refused():
    """They were computed all the same once, and memory outside the tensors was written."""

    def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")  # takes no memory

    with pytest.raises(ValueError, match="less than 2\\^31"):
        plan(nothing(1, 150, 3800, 3800), (4000, 4000), True, 20)
    with pytest.raises(ValueError, match="less than 2\\^31"):
        plan(nothing(1, 2, 9000, 9000), (46341, 46341), True, 20)
    with pytest.raises(ValueError, match="less than 2\\^31"):
        launch_full(
            nothing(1, 21, 10_400, 10_400), nothing(1, 10_400, 10_400), None, None, 255, None
        )
    values = nothing(2**31)
    with pytest.raises(ValueError, match="less than 2\\^31"):
        launch_percentile(values, nothing(2**31, dtype=torch.bool), nothing(1))


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


@pytest.mark.parametrize("size", [(17, 25), (5, 7)])
def test_bitwise_repeatable_and_inputs_untouched(size, where):
    impl, device = where
    logits, target = example((2, 3, 5, 7), size, device, torch.float32)
    results = []
    for _ in range(2):
        before = logits.clone()
        variable = logits.requires_grad_()
        loss = cross_entropy(variable, target, impl=impl)
        (gradient,) = torch.autograd.grad(loss, variable)
        maps = {"with_confidence": True, "with_entropy": True, "threshold": 0.5}
        labels = pseudo_label(variable, size, **maps, impl=impl)
        results.append([loss.detach(), gradient, *labels])
        found = soft_consistency(variable, before.flip(1), target != 255, impl=impl)
        (gradient,) = torch.autograd.grad(found.loss, variable)
        results[-1] += [found.loss.detach(), found.count, found.confident, gradient]
        assert torch.equal(variable, before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_scaled_twice_comes_from_the_same_saved_values(where):
    impl, device = where
    logits, target = example((1, 3, 5, 7), (17, 25), device, torch.float32)
    loss = cross_entropy(logits.requires_grad_(), target, impl=impl)
    first, second = (
        torch.autograd.grad(loss, logits, torch.tensor(s, device=device), retain_graph=True)[0]
        for s in (1.0, 5.0)
    )
    torch.testing.assert_close(5 * first, second)


def test_autocast_around_an_operation_does_not_lower_its_precision(where):
    impl, device = where
    logits, target = example((1, 5, 5, 7), (17, 25), device, torch.float32)
    inputs, _, _ = contrast_example(2, 3, 8, 4, torch.float32, device)

    def all_of_them():
        variable = logits.detach().clone().requires_grad_()
        cross_entropy(variable, target, impl=impl).backward()
        (each,) = torch.autograd.grad(
            soft_consistency(variable, logits.flip(1), target != 255, impl=impl).loss, variable
        )
        return variable.grad, each, memory_contrast(*inputs, impl=impl)

    plain = all_of_them()
    with torch.autocast(device, torch.bfloat16):
        inside = all_of_them()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_non_contiguous_inputs(where):
    impl, device = where
    logits, target = example((2, 3, 5, 7), (17, 25), device, torch.float32)
    turned = logits.to(memory_format=torch.channels_last)
    assert torch.equal(
        cross_entropy(turned, target, impl=impl), cross_entropy(logits, target, impl=impl)
    )
    flipped = target.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        cross_entropy(logits, flipped, impl=impl), cross_entropy(logits, target, impl=impl)
    )
    assert torch.equal(
        pseudo_label(turned, (17, 25), impl=impl).label,
        pseudo_label(logits, (17, 25), impl=impl).label,
    )
    valid, other = target != 255, logits.flip(1)
    mask = target > 0
    flipped = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (valid, mask)]
    turned_other = other.to(memory_format=torch.channels_last)
    expected = soft_consistency(logits, other, valid, mask=mask, second=logits, impl=impl)
    found = soft_consistency(
        turned, turned_other, flipped[0], mask=flipped[1], second=turned, impl=impl
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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


# ------------------------------------------------------------------- consistency of probabilities


def consistency_example(shape, size, device="cpu", dtype=torch.float32, scale=3.0):
    """Logits, targets, other targets, a mask of the valid pixels, and one that mixes the targets.

    The second mask has a box, as CutMix draws it, and single pixels.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((3, *shape), generator=generator, dtype=torch.float64).mul(scale)
    valid = torch.rand((shape[0], *size), generator=generator) > 0.2
    valid[:, 0, 0] = True
    mask = torch.rand((shape[0], *size), generator=generator) > 0.9
    mask[:, size[0] // 3 :, size[1] // 3 : size[1] // 3 * 2 + 1] = True
    return (*values.to(device, dtype).unbind(0), valid.to(device), mask.to(device))


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


@pytest.mark.parametrize("kind", ["normal", "ties", "tiny", "constant", "wide"])
@pytest.mark.parametrize("count", [1, 2, 3, 1000, 5000])
def test_percentile_is_numpys_in_float64(count, kind, where):
    impl, device = where
    generator = torch.Generator().manual_seed(count)
    normal = torch.randn(count, generator=generator)
    values = {
        "normal": normal, "ties": normal.round(), "tiny": normal.abs() * 1e-40,
        "constant": torch.full((count,), -2.5),
        "wide": normal * 10 ** torch.randint(-30, 30, (count,), generator=generator).float(),
    }[kind]  # fmt: skip
    valid = torch.rand(count, generator=generator) > 0.3
    valid[0] = True
    queries = [0, 5.0, 37.5, 37.5, 80, 99.99, 100]
    result = masked_percentile(values.to(device), valid.to(device), queries, impl=impl)
    expected = [np.percentile(values[valid].double().numpy(), q) for q in queries]
    torch.testing.assert_close(result.cpu(), torch.tensor(expected).float(), rtol=2e-7, atol=0)


def test_percentile_of_nothing_of_one_number_and_of_a_tensor(where):
    impl, device = where
    values = torch.arange(6.0, device=device).view(2, 3)
    valid = values > 0
    assert masked_percentile(values, valid & False, [20, 80], impl=impl).isnan().all()
    assert masked_percentile(values[:0], valid[:0], [20, 80], impl=impl).isnan().all()
    assert masked_percentile(values, valid, 50, impl=impl).tolist() == [3]
    queries = torch.tensor([75.0, 25.0], device=device)
    assert masked_percentile(values, valid, queries, impl=impl).tolist() == [4, 2]
    with pytest.raises(ValueError, match="100"):
        masked_percentile(values, valid, 100.5, impl=impl)
    with pytest.raises(ValueError, match="bool mask"):
        masked_percentile(values, values, 50, impl=impl)
    for nothing in ([], torch.empty(0), torch.empty(0, device=device)):
        with pytest.raises(ValueError, match="no percentiles"):
            masked_percentile(values, valid, nothing, impl=impl)


def test_drop_unreliable(where):
    impl, device = where
    label = torch.tensor([[[0, 1, 255, 2, 3]]], dtype=torch.uint8, device=device)
    entropy = torch.tensor([[[0.1, 0.5, 0.0, 0.7, float("inf")]]], device=device)
    before = label.clone()
    kept, count = drop_unreliable(label, entropy, torch.tensor(0.5, device=device), impl=impl)
    assert (
        kept.tolist() == [[[0, 255, 255, 255, 255]]]
        and count.item() == 1
        and torch.equal(label, before)
    )
    all_kept, count = drop_unreliable(label, entropy, float("nan"), impl=impl)
    assert torch.equal(all_kept, label) and count.item() == 4
    for other in (-1, 300):
        with pytest.raises(ValueError, match=f"uint8 labels cannot be {other}"):
            drop_unreliable(label, entropy, 0.5, ignore_index=other, impl=impl)


def contrast_example(k, a, d, m, dtype, device="cpu", capacity=40):
    """Inputs of `memory_contrast`, and the loss in float64 by torch.

    The classes are out of order, and the bank has an empty row.
    """
    generator = torch.Generator().manual_seed(0)
    anchors, positives, bank = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((k, a, d), (k, d), (k + 2, capacity, d))
    )
    anchors[0, 0] *= 100
    positives[0] *= 0.01
    bank[:, 3] = 0
    anchors, positives, bank = anchors.to(dtype), positives.to(dtype), bank.to(dtype)
    indices = torch.randint(0, capacity, (k, a, m), generator=generator, dtype=torch.int32)
    indices[0, 0, 0] = 3
    classes = torch.arange(k + 1, 1, -1, dtype=torch.int32)
    exact = anchors.double().requires_grad_()
    similarity = torch.cat([
        F.cosine_similarity(exact, positives.double()[:, None], dim=2)[..., None],
        F.cosine_similarity(
            exact[:, :, None], bank.double()[classes.long()[:, None, None], indices.long()], dim=3
        ),
    ], 2)  # fmt: skip
    expected = -(similarity / 0.5).log_softmax(2)[..., 0]
    inputs = [each.to(device) for each in (anchors, positives, bank, indices, classes)]
    inputs[0].requires_grad_()
    return inputs, exact, expected


@pytest.mark.parametrize(
    "k, a, d, m, dtype",
    [
        (3, 5, 20, 7, torch.float32),
        (1, 1, 1, 1, torch.float32),
        (2, 4, 256, 50, torch.float32),
        (2, 3, 64, 50, torch.bfloat16),
        (2, 3, 41, 9, torch.float16),
        (2, 3, 41, 9, torch.float64),
    ],
)
def test_memory_contrast_and_gradient(k, a, d, m, dtype, where):
    impl, device = where
    inputs, exact, expected = contrast_example(k, a, d, m, dtype, device)
    upstream = torch.rand(k, a, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, exact, upstream)
    before = [each.detach().clone() for each in inputs]
    loss = memory_contrast(*inputs, impl=impl)
    (gradient,) = torch.autograd.grad(loss, inputs[0], upstream.to(device, loss.dtype))
    assert (
        loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        and gradient.dtype == dtype
    )
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=2e-6, atol=1e-6)
    tolerance = 1e-2 if dtype.itemsize == 2 else 1e-5
    for row in range(k):  # lengths of anchors, and so gradients, differ a hundredfold
        for column in range(a):
            error = (gradient[row, column].double().cpu() - wanted[row, column]).abs().max()
            assert error <= tolerance * wanted[row, column].abs().max() + 1e-9
    assert all(torch.equal(now, then) for now, then in zip(inputs, before))
    again = memory_contrast(*inputs, impl=impl)
    (repeated,) = torch.autograd.grad(again, inputs[0], upstream.to(device, loss.dtype))
    assert torch.equal(again, loss) and torch.equal(repeated, gradient)


def test_memory_contrast_of_equal_vectors_and_of_opposite_ones(where):
    """By hand: all similarities 1, so log(1 + M).

    Negatives opposite to anchor and positive: log(1 + M e^(-2/T)).
    """
    impl, device = where
    anchors, bank = torch.ones(1, 2, 4, device=device), torch.ones(1, 5, 4, device=device)
    indices, classes = (
        torch.zeros(1, 2, 3, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    loss = memory_contrast(anchors, 7 * anchors[:, 0], bank, indices, classes, impl=impl)
    assert loss.flatten().tolist() == pytest.approx([math.log(4)] * 2)
    loss = memory_contrast(
        anchors, anchors[:, 0], -bank, indices, classes, temperature=0.25, impl=impl
    )
    assert loss.flatten().tolist() == pytest.approx([math.log(1 + 3 * math.exp(-8))] * 2, abs=1e-6)
    none = (
        0 * anchors
    ).requires_grad_()  # no direction: similarity 0, and no gradient instead of one of 1e12
    loss = memory_contrast(none, anchors[:, 0], bank, indices, classes, impl=impl)
    assert loss.flatten().tolist() == pytest.approx([math.log(4)] * 2)
    assert torch.autograd.grad(loss.sum(), none)[0].abs().max() == 0
    for changes, message in (
        ({"positives": torch.ones(2, 4)}, "do not fit"),
        ({"indices": indices.long()}, "int32"),
        ({"bank": torch.ones(1, 4, 5).transpose(1, 2)}, "contiguous"),
        ({"temperature": 0.01}, "at least 0.05"),
    ):
        options = {
            "anchors": anchors,
            "positives": anchors[:, 0],
            "bank": bank,
            "indices": indices,
            "classes": classes,
        }
        with pytest.raises(ValueError, match=message):
            memory_contrast(**{**options, **changes}, impl=impl)


@pytest.mark.parametrize("size", [(5, 7), (2, 3)])
def test_gradcheck(size, where):
    """Interpreted along random directions: every element by itself would take two minutes."""
    impl, device = where
    gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=impl == "triton")
    logits, target = example((1, 3, 2, 3), size, device, ignored=False)
    target[:, 0, :2] = 255
    weight = torch.rand(target.shape, dtype=torch.float64, device=device)
    assert gradcheck(lambda x: cross_entropy(x, target, impl=impl), logits.requires_grad_())
    assert gradcheck(lambda x: cross_entropy(x, target, pixel_weight=weight, impl=impl), logits)
    targets, second, mask = logits.detach().flip(1), logits.detach().roll(1, 1), target == 1
    for mode in MODES:
        assert gradcheck(
            lambda x, mode=mode: (
                soft_consistency(
                    x, targets, target != 255, mode=mode, mask=mask, second=second, impl=impl
                ).loss
            ),
            logits,
        )
    (anchors, *others), _, _ = contrast_example(2, 2, 3, 4, torch.float64, device)
    assert gradcheck(lambda x: memory_contrast(x, *others, impl=impl), anchors)


# On a CPU opcheck's compiled part runs the op itself, interpreted, and so takes seconds each.
def test_opcheck(where):
    impl, device = where
    ops = torch.ops.semiseg
    logits, target = example((1, 3, 3, 5), (9, 17), device, torch.float32)
    small, small_target = example((1, 3, 3, 5), (3, 5), device, torch.float32)
    weight = torch.rand(target.shape, device=device)
    entropy = torch.rand(target.shape, device=device)
    numbers = torch.tensor([20.0, 80.0], dtype=torch.float64, device=device)
    variable = logits.detach().clone().requires_grad_()
    inputs = (variable, target, weight, None, 255, True, True, True, impl)
    torch.library.opcheck(ops.cross_entropy.default, inputs)
    torch.library.opcheck(
        ops.cross_entropy_map.default, (logits, target, None, None, 255, True, impl)
    )
    valid = target != 255
    for maps in ((True, False, None, None), (False, False, 0.5, valid)):
        torch.library.opcheck(ops.pseudo_label.default, (logits, 9, 17, True, *maps, impl))
    targets = logits.flip(1)
    for mixed in ((None, None), (valid, targets)):
        inputs = (variable, targets, valid, *mixed, "squared", 0.5, True, True, impl)
        torch.library.opcheck(ops.soft_consistency.default, inputs)
    torch.library.opcheck(ops.masked_percentile.default, (entropy, entropy > 0.2, numbers, impl))
    torch.library.opcheck(
        ops.drop_unreliable.default, (target, entropy, torch.tensor(0.5, device=device), 255, impl)
    )
    inputs, _, _ = contrast_example(2, 3, 8, 4, torch.float32, device)
    torch.library.opcheck(ops.memory_contrast.default, (*inputs, 0.5, impl))
    if impl == "triton":
        inputs = (small.requires_grad_(), small_target, None, None, 255, True)
        torch.library.opcheck(ops.cross_entropy_full.default, inputs)


def test_a_compiled_step_follows_the_chosen_backend(where):
    """A graph that was compiled for kernels failed once the references were chosen.

    Its forward pass took the reference, which makes one gradient, and its backward pass added two
    parts of one.
    """
    impl, device = where
    if impl == "torch":
        pytest.skip("kernels and references take turns")

    def step(logits, target):
        loss = cross_entropy(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0]

    logits, target = example((3, 3, 3, 3), (5, 5), device, torch.float32)
    logits.requires_grad_()
    compiled = torch.compile(step, backend="aot_eager")
    try:
        for backend in ("triton", "torch", "triton"):
            set_backend(backend)
            for found, expected in zip(compiled(logits, target), step(logits, target)):
                torch.testing.assert_close(found, expected)
    finally:
        set_backend("auto")


def test_compiles_without_a_graph_break(where):
    impl, device = where
    logits, target = example((1, 3, 3, 5), (9, 17), device, torch.float32)
    inputs, _, _ = contrast_example(2, 3, 8, 4, torch.float32, device)
    others = [each.detach() for each in inputs[1:]]

    def step(logits, target):
        anchors = logits.flatten()[:24].view(2, 3, 4).repeat(1, 1, 2)
        contrast = memory_contrast(anchors, *others, impl=impl).mean()
        found = pseudo_label(logits, target.shape[1:], with_entropy=True, impl=impl)
        threshold = masked_percentile(found.entropy, target != 255, 80.0, impl=impl)
        label, count = drop_unreliable(found.label, found.entropy, threshold, impl=impl)
        sure = pseudo_label(logits, (9, 17), threshold=0.4, valid_mask=target != 255, impl=impl)
        soft = soft_consistency(logits, logits.flip(1), sure.label != 255, impl=impl)
        contrast = contrast + soft.loss / soft.count
        count = count + sure.kept + soft.confident
        full = cross_entropy(logits, target[:, :3, :5], impl=impl)
        return cross_entropy(logits, target, impl=impl) + cross_entropy(
            logits, label, impl=impl
        ) + full + contrast, count

    eager, count = step(logits.requires_grad_(), target)
    (expected,) = torch.autograd.grad(eager, logits)
    loss, compiled_count = torch.compile(step, fullgraph=True, backend="aot_eager")(logits, target)
    torch.testing.assert_close(loss, eager)
    assert torch.equal(count, compiled_count)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_no_operation_waits_for_the_gpu(impl):
    logits, target = example((2, 5, 9, 9), (33, 33), "cuda", torch.float32)
    target = target.to(torch.uint8)

    def step():
        found = pseudo_label(logits, (33, 33), with_entropy=True, impl=impl)
        thresholds = masked_percentile(found.entropy, target != 255, [20.0, 80.0], impl=impl)
        label, _ = drop_unreliable(found.label, found.entropy, thresholds[1], impl=impl)
        (
            cross_entropy(logits, label, impl=impl) + cross_entropy(logits, target, impl=impl)
        ).backward()
        sure = pseudo_label(logits, (33, 33), threshold=0.4, valid_mask=target != 255, impl=impl)
        options = {"mask": sure.label == 0, "second": logits.roll(1, 1), "impl": impl}
        soft_consistency(logits, logits.flip(1), target != 255, **options).loss.backward()

    logits.requires_grad_()
    step()  # compiles, and uploads the tables
    with never_waiting():
        step()


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
def test_peak_memory_is_a_fraction_of_full_resolution_logits():
    logits, target = example((4, 21, 65, 65), (257, 257), "cuda", torch.bfloat16)
    target, logits = target.to(torch.uint8), logits.requires_grad_()
    full = 4 * 21 * 257 * 257 * 4
    for _ in range(2):
        logits.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        label = pseudo_label(logits, (257, 257)).label
        cross_entropy(logits, target).backward()
        peak = torch.cuda.max_memory_allocated() - before
    assert label.shape == target.shape and peak < 2 * full / 8  # kept: the labels and the gradient


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    "nodes, outputs", [(129, 513), (128, 512), (1, 7), (7, 1), (5, 5), (11, 5), (3, 50), (65, 513)]
)
def test_axis_interpolates_as_torch_does(nodes, outputs, align_corners):
    values = torch.randn(nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(
        values[None, None], outputs, mode="linear", align_corners=align_corners
    )[0, 0]
    found = axis(nodes, outputs, align_corners, torch.float64, torch.device("cpu"))
    cell = torch.repeat_interleave(torch.arange(nodes + 1), found.first.diff())
    low, high = values[(cell - 1).clamp(min=0)], values[cell.clamp(max=nodes - 1)]
    torch.testing.assert_close(low + (high - low) * found.weight, expected)
    assert found.slots == found.first.diff().max()


def test_what_the_operations_refuse(monkeypatch):
    logits, target = example((2, 5, 5, 7), (17, 25))
    with pytest.raises(ValueError, match="label 7"):
        cross_entropy(logits, torch.full_like(target, 7), impl="torch")
    with pytest.raises(ValueError, match="label -1"):
        cross_entropy(logits, torch.full_like(target, -1), impl="torch")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU"):
        cross_entropy(logits, target, impl="triton")
    with pytest.raises(ValueError, match="impl"):
        pseudo_label(logits, impl="cuda")
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(logits, target, reduction="average")
    with pytest.raises(ValueError, match="pixel_weight"):
        cross_entropy(logits, target, pixel_weight=torch.ones(2, 5, 7))
    with pytest.raises(ValueError, match="class_weight"):
        cross_entropy(logits, target, class_weight=torch.ones(4))
    with pytest.raises(ValueError, match="254"):
        pseudo_label(torch.zeros(1, 255, 2, 2))
    with pytest.raises(ValueError, match="size"):
        pseudo_label(logits, (0, 9))
    valid = target != 255
    for options, message in (
        ({"threshold": 1.5}, "in \\[0,1\\]"),
        ({"valid_mask": valid}, "needs a threshold"),
        ({"threshold": 0.5, "valid_mask": valid[:1]}, "valid_mask must be"),
        ({"threshold": 0.5, "valid_mask": target}, "valid_mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pseudo_label(logits, (17, 25), **options)
    for changes, message in (
        ({"mode": "squares"}, "mode"),
        ({"threshold": -0.1}, "in \\[0,1\\]"),
        ({"logits": logits[0]}, "254"),
        ({"targets": logits[:, :2]}, "targets"),
        ({"valid_mask": valid[:1]}, "valid_mask"),
        ({"valid_mask": target}, "valid_mask"),
        ({"mask": valid}, "go together"),
        ({"second": logits}, "go together"),
        ({"mask": valid, "second": logits[:1]}, "second"),
        ({"mask": valid, "second": logits.float()}, "second"),
        ({"mask": valid[:, :5], "second": logits}, "mask"),
        ({"mask": target, "second": logits}, "mask"),
    ):
        inputs = {"logits": logits, "targets": logits, "valid_mask": valid}
        with pytest.raises(ValueError, match=message):
            soft_consistency(**{**inputs, **changes})
    inputs, _, _ = contrast_example(2, 3, 8, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="do not fit"):
        memory_contrast(*inputs[:3], inputs[3][..., 0], inputs[4])
    # Without negatives there is nothing to tell apart.
    assert memory_contrast(*inputs[:3], inputs[3][..., :0], inputs[4]).eq(0).all()


def test_the_reference_holds_one_full_resolution_tensor_at_most():
    """Largest live allocation of one call, in full-resolution float32 logits of its one image."""
    logits, target = example((1, 21, 65, 65), (257, 257), dtype=torch.float32)
    full = 21 * 257 * 257 * 4
    logits.requires_grad_()

    naive = peak_cpu(
        lambda: F.cross_entropy(
            upsampled(logits.float(), (257, 257)).float(), target, ignore_index=255
        ).backward()
    )
    assert naive > 2 * full  # the measurement sees what it should
    assert peak_cpu(lambda: cross_entropy(logits, target, impl="torch").backward()) < 1.9 * full
    assert (
        peak_cpu(lambda: pseudo_label(logits, (257, 257), with_entropy=True, impl="torch"))
        < 1.9 * full
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_of_the_consistency_holds_two_full_resolution_tensors_at_most(mode):
    """Over the batch, too: what one image took is free before the next one needs it."""
    logits, targets, second, valid, mask = consistency_example((2, 21, 57, 57), (449, 449))
    full = 21 * 449 * 449 * 4  # of one image, of which a chunk has no more
    logits.requires_grad_()
    options = {"mode": mode, "mask": mask, "second": second, "impl": "torch"}
    peak = peak_cpu(lambda: soft_consistency(logits, targets, valid, **options).loss.backward())
    assert full < peak < 2.9 * full


OTHER_TARGETS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "gfx942")]


@pytest.mark.parametrize("target", ["sm_90", *OTHER_TARGETS])
def test_compiled_ahead_of_time_within_the_ceilings(target):
    """At most 128 registers, nothing spilled, no stack, for all launches at the presets' shapes.

    And that every kernel compiles, which the interpreter does not show. With at most 96 registers
    20 instead of 16 programs of the cross-entropy share a multiprocessor.
    """
    lines = run("-m", "kernels.aot", "--target", target).stdout.splitlines()
    if target == "gfx942":
        assert len(lines) > 20 and all(line.endswith("compiles") for line in lines[1:])
        return
    stored = (Path(kernels.__file__).parent / "results" / "bounds-sm_90.txt").read_text()
    if target == "sm_90" and lines[0] == stored.splitlines()[0]:  # of this version of Triton
        assert stored.splitlines() == lines  # kernels/README.md shows a part of it
    costs = {line[:54].strip(): list(map(int, line[54:].split()[:4])) for line in lines[2:]}
    assert len(costs) > 50
    for name, (registers, spilled, stack, shared) in costs.items():
        assert registers <= 128 and spilled == 0 and stack == 0 and shared <= 16384, name
    for shape in ("129->513", "128->512", "193->769", "200->800", "81->321"):
        for call in (
            "cross_entropy", "  map of losses", "pseudo_label", "  and entropy", "soft_consistency",
        ):  # fmt: skip
            start = f"{call} {shape}".strip()
            assert any(name.startswith(start) for name in costs), start
        for name, (registers, *_) in costs.items():
            if name.startswith(f"cross_entropy {shape}"):
                assert registers <= (112 if shape in ("128->512", "200->800") else 96), name
            if "soft_consistency" in name:
                assert registers <= 112, name
    if target == "sm_90":
        # Loads of several values at once, also where 16 does not divide their number.
        each = {line[:54].strip(): float(line.split()[-3]) for line in lines if "add_parts" in line}
        assert len(each) >= 3 and max(each.values()) < 9, each


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


def test_nothing_in_kernels_imports_what_lies_above():
    folder = Path(kernels.__file__).parent
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    above = {path.stem for path in folder.parent.iterdir()} - {"kernels"}
    assert "common" in above and "cps" in above
    assert not imported & above


def printed(values):
    """Lines of numbers as kernels/README.md has them."""
    return "\n".join("".join(f"{value:8.3f}" for value in row) for row in values)


def test_the_worked_example_of_the_lesson_is_what_the_operations_compute(where):
    """kernels/README.md: four numbers in, 25 out, one gradient collapsed to four."""
    impl, device = where
    lesson = (Path(kernels.__file__).parent / "README.md").read_text()
    nodes = torch.tensor([[0.0, 4.0], [8.0, 4.0]], device=device)
    logits = torch.stack([torch.zeros_like(nodes), nodes])[None].requires_grad_()
    target = torch.tensor([0, 0, 1, 1, 1], dtype=torch.uint8, device=device).expand(1, 5, 5)

    z = upsampled(logits.detach(), (5, 5))[0, 1]
    for row in z.tolist():
        assert "".join(f"{value:6.1f}" for value in row).strip() in lesson
    of_pixels = torch.sigmoid(z) - target[0]  # of class 1
    assert printed(of_pixels.tolist()) in lesson

    loss = cross_entropy(logits, target, reduction="sum", impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert f"summed over the 25 pixels, is {loss:.3f}." in lesson
    first, second = (printed([row]).strip() for row in gradient[0, 1].tolist())
    assert re.search(rf"gradient of the nodes +{first}\n +{second}\n", lesson)

    weight = [0, 0.25, 0.5, 0.75, 0]  # of a position's second node
    for i, j in ((1, 1), (1, 2), (2, 1), (2, 2)):
        corners = torch.zeros(2, 2, dtype=torch.float64)
        for y, x in itertools.product(range(5), range(5)):
            if (y // 4 + 1, x // 4 + 1) == (i, j):
                down = torch.tensor([1 - weight[y], weight[y]], dtype=torch.float64)
                right = torch.tensor([1 - weight[x], weight[x]], dtype=torch.float64)
                corners += of_pixels[y, x].cpu() * torch.outer(down, right)
        numbers = " +".join(f"{value:.3f}" for value in corners.flatten().tolist())
        assert re.search(rf"cell \({i},{j}\) +{numbers}\n", lesson), numbers


def test_the_bytes_that_the_lesson_counts_add_up():
    lesson = (Path(kernels.__file__).parent / "README.md").read_text()
    low, pixels = 8 * 21 * 129 * 129, 8 * 513 * 513
    full, labels, chosen = 4 * 21 * pixels, 8 * pixels, 4 * pixels
    moved = [
        ("x = logits.float()", 2 * low, 4 * low),
        ("z = F.interpolate", 4 * low, full),
        ("t = target.long()", pixels, labels),
        ("log_p = z.log_softmax", full, full),
        ("loss = F.nll_loss", labels + chosen, 0),
        ("backward of nll_loss", labels, full + chosen),
        ("backward of log_softmax", 2 * full, full),
        ("backward of interpolate", full, 4 * low),
        ("backward of float", 4 * low, 2 * low),
    ]
    for line, reads, writes in moved:
        numbers = rf"{reads / 1e6:.1f} +{writes / 1e6:.1f}"
        assert re.search(rf"^{re.escape(line)}.* {numbers}", lesson, re.MULTILINE), line
    reads, writes = (sum(column) for column in list(zip(*moved))[1:])
    total = f"together {(reads + writes) / 1e9:.2f} GB"
    assert re.search(rf"{reads / 1e6:.1f} +{writes / 1e6:.1f} +{total}", lesson)
    copies = 4 * low + 10 * low  # to planes; the sum of two parts, scaled
    least, most = 2 * low + pixels + 8 * low, 6 * 2 * low + pixels + 8 * low
    found = f"moves {(copies + least) / 1e6:.0f} to {(copies + most) / 1e6:.0f} MB"
    assert found in lesson.replace("\n", " ")


def test_the_benchmark_checks_and_times_every_operation(tmp_path):
    command = ("-m", "kernels.benchmark", "--device", "cpu")
    run(
        *command,
        "--shape",
        "1x3x9x9:33x33",
        "--csv",
        tmp_path / "rows.csv",
        "--plot",
        tmp_path / "bars.png",
    )
    rows = list(csv.DictReader(open(tmp_path / "rows.csv")))
    assert {(row["op"], row["provider"]) for row in rows} == {
        (op, provider)
        for op in (
            "cross_entropy",
            "pseudo_label",
            "label alone",
            "thresholded label",
            "soft_consistency",
            "mixed consistency",
            "percentile",
            "drop_unreliable",
            "memory_contrast",
        )
        for provider in ("eager", "torch")
    }
    assert all(float(row["median_us"]) > 0 and row["gate"] == "" for row in rows)
    again = ("--rows", tmp_path / "rows.csv", "--plot", tmp_path / "again.png")
    assert run(*command, *again).stdout == ""
    bars = [(tmp_path / name).read_bytes() for name in ("bars.png", "again.png")]
    assert len(bars[0]) > 5000 and bars[0] == bars[1]
    assert "nothing to compare" in run(*command, "--op", "cross_entropy_full", expect=2).stderr
    assert "NxCxhxw:HxW" in run(*command, "--shape", "3x9", expect=2).stderr
    small = ("--shape", "1x3x9x9:33x33", "--op", "label alone")
    assert "label alone: eager, torch agree" in run(*command, *small, "--check").stdout
    assert (
        "--provider triton: of eager,autocast,torch"
        in run(*command, "--provider", "triton", expect=2).stderr
    )
    if not NATIVE:
        assert "no CUDA device" in run("-m", "kernels.benchmark").stdout


def test_a_speed_up_compares_times_of_one_kind():
    """Found wrong once: without a graph of the one, it was divided by the other's with a graph."""
    kernel = Timing(8.0, 8.0, 8.0, graph=6.0)
    with_graph, without = Timing(16.0, 16.0, 16.0, graph=3.0), Timing(80.0, 80.0, 80.0)
    assert benchmark.verdict("sum", None, kernel, with_graph)["speedup"] == "0.50"
    assert benchmark.verdict("sum", None, kernel, without)["speedup"] == "10.00"
    assert benchmark.verdict("sum", 7e6, kernel, None)["gate"] == "met"


def test_the_benchmark_names_what_disagrees_and_times_the_rest(capsys):
    providers = {"eager": lambda: torch.ones(3), "wrong": lambda: 2 * torch.ones(3)}
    providers |= {"right": lambda: torch.ones(3), "nan": lambda: torch.ones(3) / 0 * 0}
    op = benchmark.Op(providers, least_bytes=1, exponentials=0, gate_us=None, tolerance=1e-3)
    assert list(benchmark.agreeing("sum", op, [])) == ["eager", "right"]
    printed = capsys.readouterr().out
    assert "sum: wrong: result 0 is off by 1.00e+00" in printed and "sum: nan: " in printed
    assert list(benchmark.agreeing("sum", op, ["right"])) == ["right"]


@pytest.mark.parametrize("method", step.WAYS)
def test_whole_steps_run_both_ways(method, monkeypatch, capsys):
    """Both ways do the same work: no term of the loss is missing in one of them.

    Their losses differ by dropout and by what the contrast draws.
    """
    found = []

    def call_once(call, _):
        found.append(call().item())
        return Timing(1.0, 1.0, 1.0)

    monkeypatch.setattr(step, "time_cpu", call_once)
    monkeypatch.setattr(step, "peak_cpu", lambda _: 10)
    monkeypatch.setattr("u2pl.CAPACITY", 100)
    step.compare_steps(method, argparse.Namespace(device="cpu", amp=None, compile=False))
    assert len(found) == 4 and max(found) < 1.2 * min(found)
    assert "usual / kernels: time 1.00" in capsys.readouterr().out


@pytest.mark.parametrize("method", step.WAYS)
def test_the_usual_step_calls_no_kernel(method, monkeypatch):
    """Else a comparison would time the same thing twice."""
    called = []
    monkeypatch.setattr(step, "peak_cpu", lambda _: 10)
    monkeypatch.setattr("u2pl.CAPACITY", 100)
    for module in (adaptive, cps, mean_teacher, psmt, u2pl, unimatch, losses):
        for name in kernels.__all__:
            if callable(getattr(module, name, None)):
                noted = functools.partial(note_call, called, getattr(kernels, name))
                monkeypatch.setattr(module, name, noted)

    def call_once(call, _):
        called.clear()
        call()
        calls.append(len(called))
        return Timing(1.0, 1.0, 1.0)

    calls = []
    monkeypatch.setattr(step, "time_cpu", call_once)
    step.compare_steps(method, argparse.Namespace(device="cpu", amp=None, compile=False))
    usual, with_kernels = calls[0::2], calls[1::2]
    least = {"supervised": 1, "mean_teacher": 2, "cutmix_seg": 2, "psmt": 3}.get(method, 4)
    assert usual == [0, 0] and min(with_kernels) >= least


def note_call(called, function, *args, **options):
    """Call a function after its name has been noted."""
    called.append(function.__name__)
    return function(*args, **options)


def test_training_with_kernels_follows_training_without(where):
    """Three steps of CPS: losses and updates agree with those of plain PyTorch at full resolution.

    Each step starts from the same weights: left alone, training from scratch would amplify the last
    bits within a few steps.
    """
    impl, device = where
    args = cps.parse_args(["--crop-size", "32", "-b", "2", "--device", "cpu"])
    data = datasets.load(settings())
    torch.manual_seed(0)
    networks = [
        DeepLabV3Plus.from_settings(args, data.num_classes).to(device).train() for _ in range(2)
    ]
    plain = copy.deepcopy(networks)
    optimizers = [torch.optim.SGD(parameters_of(each), lr=0.001) for each in (networks, plain)]
    loaders = [
        train_loader(data, items, stream, args, 0, 3)
        for items, stream in ((data.labelled, 0), (data.unlabelled, 1), (data.unlabelled, 2))
    ]

    def step_of(networks, optimizer, iteration, batches):
        """Loss, and the change of all parameters in one vector."""
        before = [p.detach().clone() for p in parameters_of(networks)]
        torch.manual_seed(iteration)  # dropout
        batch_l, *batches_u = batches
        loss = cps.train_step(*networks, batch_l, batches_u, iteration, args, data.background)[
            "loss"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        changes = [p.detach() - old for p, old in zip(parameters_of(networks), before)]
        return loss, torch.cat([change.flatten() for change in changes])

    set_backend(impl)
    try:
        for iteration, batches in enumerate(zip(*loaders)):
            batches = [to_device(batch, torch.device(device)) for batch in batches]
            for network, copied in zip(networks, plain):
                copied.load_state_dict(network.state_dict())
            found, change = step_of(networks, optimizers[0], iteration, batches)
            with plain_operations():
                expected, wanted = step_of(plain, optimizers[1], iteration, batches)
            # A label that falls to the other side of a tie changes the mean over 2 x 32 x 32 pixels
            # by up to 1 in 1000.
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
            assert (change - wanted).norm() < 0.02 * wanted.norm()
        assert iteration == 2
    finally:
        set_backend("auto")


def parameters_of(networks):
    """The parameters of several networks."""
    return [parameter for network in networks for parameter in network.parameters()]


@contextmanager
def plain_operations():
    """The two operations of CPS by torch at full resolution."""

    def naive_cross_entropy(logits, target, ignore_index, reduction):
        logits = upsampled(logits, target.shape[1:]).float()
        options = {"ignore_index": ignore_index, "reduction": reduction}
        return F.cross_entropy(logits, target.long(), **options)

    def naive_pseudo_label(logits, size):
        return PseudoLabel(upsampled(logits, size).argmax(1).to(torch.uint8), None, None)

    with (
        mock.patch.object(cps, "pseudo_label", naive_pseudo_label),
        mock.patch.object(losses, "cross_entropy", naive_cross_entropy),
    ):
        yield
