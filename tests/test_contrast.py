"""The contrast with a memory bank, reference and kernel, against float64 PyTorch."""

import math

import pytest
import torch
from kernel_examples import contrast_example

from kernels import memory_contrast


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
