"""The losses of CPS by hand, where gradients go, and what padding and ignored pixels do."""

import copy
import math

import pytest
import torch
from conftest import settings

import cps
from common import datasets
from common.augment import normalise
from common.losses import hard_pixels, labelled_loss, mean_cross_entropy
from kernels import cross_entropy


def logits_of(probs: list) -> torch.Tensor:
    """(1,2,2,2) logits of the given probabilities of class 1."""
    p = torch.tensor(probs, dtype=torch.float32).view(1, 1, 2, 2)
    return torch.cat([(1 - p).log(), p.log()], dim=1)


def test_cross_supervision_by_hand(rt):
    learner = logits_of([0.9, 0.2, 0.6, 0.5]).requires_grad_()
    labels = cps.targets_from(logits_of([0.8, 0.7, 0.4, 0.3]), (2, 2), soft=False)
    assert labels.tolist() == [[[1, 1], [0, 0]]]
    valid_mask = torch.tensor([[[True, True], [True, False]]])
    loss = cps.cross_supervision(learner, labels, valid_mask, rt)
    assert loss.item() == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.4)) / 3, rel=1e-6)
    loss.backward()
    assert learner.grad[0, :, 1, 1].abs().max() == 0  # the padded pixel
    assert learner.grad[0, 1, 0, 0].item() == pytest.approx((0.9 - 1) / 3, rel=1e-5)


def test_soft_cross_supervision_by_hand(rt):
    learner, teacher = logits_of([0.9, 0.2, 0.6, 0.5]).requires_grad_(), logits_of([0.8, 0.7, 0.4, 0.3]).requires_grad_()
    targets = cps.targets_from(teacher, (2, 2), soft=True)
    valid_mask = torch.tensor([[[True, True], [True, False]]])
    loss = cps.cross_supervision(learner, targets, valid_mask, rt)
    assert loss.item() == pytest.approx(2 * (0.1**2 + 0.5**2 + 0.2**2) / 3, rel=1e-5)
    loss.backward()
    assert teacher.grad is None and learner.grad.abs().max() > 0


def test_overlap_leaves_the_background_out():
    first, second = torch.tensor([[[0, 1], [2, 0]]]), torch.tensor([[[0, 1], [1, 2]]])
    valid_mask = torch.ones(1, 2, 2, dtype=torch.bool)
    assert cps.overlap(first, second, valid_mask, background=0).item() == pytest.approx(1 / 3)
    assert cps.overlap(first, second, valid_mask, background=None).item() == pytest.approx(1 / 2)
    valid_mask[0, 1] = False
    assert cps.overlap(first, second, valid_mask, background=0).item() == 1.0
    assert cps.overlap(first, second, ~valid_mask & False, background=0).item() == 0.0


def test_an_ignored_batch_is_finite_and_without_gradient(rt):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    ignored = torch.full((2, 16, 16), 255, dtype=torch.uint8)
    for ohem in (None, (0.7, 10)):
        loss = labelled_loss(logits, ignored, ohem, rt)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_hard_pixels_against_sorting():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 8, 8) * 3, torch.randint(0, 4, (2, 8, 8), dtype=torch.uint8)
    target[:, 0] = 255
    loss = cross_entropy(logits, target, reduction="none")
    for min_kept in (3, 50, 1000):
        kept = hard_pixels(logits, target, 0.7, min_kept) != 255
        hardest = loss.flatten().sort(descending=True).values[min(2 * min_kept, loss.numel()) - 1]
        expected = ((loss >= -math.log(0.7)) | (loss >= hardest)) & (target != 255)
        assert torch.equal(kept, expected)
    assert torch.equal(hard_pixels(logits, target, 0.7, 1000), target)  # fewer pixels than must be kept: all stay


class Recorder(torch.nn.Module):
    """A small network that notes the pictures of each forward pass and whether gradients were on."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 6, 1)
        self.seen: list[tuple[torch.Tensor, bool]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((images, torch.is_grad_enabled()))
        return self.conv(images[:, :, ::4, ::4])


def one_step(rt, *flags: str) -> tuple[dict, dict, list, object]:
    """A training step of two recorders on the built-in data."""
    args = cps.parse_args(["--crop-size", "32", "-b", "4", *flags])
    data = datasets.load(settings())
    batches = list(next(cps.load_batches(args, data, rt, 0, 1)))
    networks = {"model_1": Recorder(1), "model_2": Recorder(2)}
    optimizer = torch.optim.SGD([p for network in networks.values() for p in network.parameters()], lr=0.1)
    before = copy.deepcopy({name: network.state_dict() for name, network in networks.items()})
    measured = cps.train_step(networks, optimizer, batches, 0, args, data, rt)
    assert all(not torch.equal(before[name]["conv.weight"], networks[name].conv.weight) for name in networks)
    return networks, measured, batches, args


def test_a_cutmix_step_is_the_papers(rt):
    networks, measured, (batch_l, u0, u1), args = one_step(rt)
    fresh = [Recorder(1), Recorder(2)]
    mask = cps.xor_box_masks(4, 32, rt, args.seed, 0)
    images = [normalise(batch["image"], batch["valid_mask"]) for batch in (batch_l, u0, u1)]
    mixed = torch.where(mask[:, None], images[2], images[1])
    for network in networks.values():
        assert [on for _, on in network.seen] == [True, False, False, True]
        torch.testing.assert_close(network.seen[3][0], mixed)

    def upsampled(network: Recorder, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(network(pictures), (32, 32), mode="bilinear", align_corners=True)

    labels = [torch.where(mask, upsampled(f, images[2]).argmax(1), upsampled(f, images[1]).argmax(1)) for f in fresh]
    valid = torch.where(mask, u1["valid_mask"], u0["valid_mask"])
    ce = torch.nn.functional.cross_entropy
    supervised = sum(ce(upsampled(f, images[0]), batch_l["target"].long(), ignore_index=255) for f in fresh)
    crossed = sum(ce(upsampled(fresh[k], mixed), labels[1 - k].masked_fill(~valid, 255), ignore_index=255) for k in (0, 1))
    torch.testing.assert_close(measured["loss_sup"], supervised)
    torch.testing.assert_close(measured["loss_unsup"], crossed)
    torch.testing.assert_close(measured["loss"], supervised + 1.0 * crossed)


def test_without_cutmix_labelled_pictures_are_cross_supervised_too(rt):
    networks, measured, (batch_l, u0), args = one_step(rt, "--no-cutmix")
    assert args.cps_weight == 1.5
    assert all([on for _, on in network.seen] == [True, True] for network in networks.values())
    fresh = [Recorder(1), Recorder(2)]
    pictures = torch.cat([normalise(batch["image"], batch["valid_mask"]) for batch in (batch_l, u0)])
    valid = torch.cat([batch_l["valid_mask"], u0["valid_mask"]])
    full = [torch.nn.functional.interpolate(f(pictures), (32, 32), mode="bilinear", align_corners=True) for f in fresh]
    crossed = sum(
        torch.nn.functional.cross_entropy(full[k], full[1 - k].argmax(1).masked_fill(~valid, 255), ignore_index=255)
        for k in (0, 1)
    )
    torch.testing.assert_close(measured["loss_unsup"], crossed)


def test_the_two_networks_start_differently_and_the_unlabelled_batches_are_independent(rt):
    args = cps.parse_args([])
    data = datasets.load(settings())
    networks = cps.build_networks(args, data, rt)
    weights = [network.backbone.layer1[0].conv1.weight for network in networks.values()]
    assert not torch.equal(*weights)
    names = [(u0["name"], u1["name"]) for _, u0, u1 in cps.load_batches(args, data, rt, 0, 5)]
    assert all(first != second for first, second in names)


def test_mean_cross_entropy_counts_valid_pixels_only(rt):
    logits = logits_of([0.9, 0.2, 0.6, 0.5])
    target = torch.tensor([[[1, 255], [255, 0]]])
    assert mean_cross_entropy(logits, target, rt).item() == pytest.approx(-(math.log(0.9) + math.log(0.5)) / 2, rel=1e-6)


def test_every_parameter_learns_in_bfloat16(rt):
    """Autocast caches weights that it cast under no_grad without their graph; the step must not fall for it."""
    rt.amp = torch.bfloat16
    args = cps.parse_args(["--crop-size", "32", "-b", "4"])
    data = datasets.load(settings())
    networks = cps.build_networks(args, data, rt)
    optimizer = torch.optim.SGD([p for network in networks.values() for p in network.parameters()], lr=0.0)
    cps.train_step(networks, optimizer, list(next(cps.load_batches(args, data, rt, 0, 1))), 0, args, data, rt)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for network in networks.values() for p in network.parameters())
