"""Inputs that the tests of several operations share, and the logits they are compared with."""

import torch
import torch.nn.functional as F


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
