"""The losses of CPS by hand, where gradients go, and what padding and ignored pixels do."""

import math

import pytest
import torch
from conftest import settings

import cps
from common import datasets
from common.augment import IGNORE, normalise
from common.data import train_loader
from common.deeplabv3plus import DeepLabV3Plus
from common.losses import hard_pixels, labelled_loss, mean_cross_entropy
from common.run import Run, sgd
from kernels import cross_entropy

CPU = torch.device("cpu")


def logits_of(probs: list) -> torch.Tensor:
    """(1,2,2,2) logits of the given probabilities of class 1."""
    p = torch.tensor(probs, dtype=torch.float32).view(1, 1, 2, 2)
    return torch.cat([(1 - p).log(), p.log()], dim=1)


def test_cross_supervision_by_hand():
    learner = logits_of([0.9, 0.2, 0.6, 0.5]).requires_grad_()
    pseudo = cps.pseudo_of(logits_of([0.8, 0.7, 0.4, 0.3]), (2, 2), soft=True)
    assert pseudo.label.tolist() == [[[1, 1], [0, 0]]]
    valid_mask = torch.tensor([[[True, True], [True, False]]])
    loss = cps.cps_loss(learner, pseudo, valid_mask)
    expected = -(math.log(0.9) + math.log(0.2) + math.log(0.4)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert learner.grad[0, :, 1, 1].abs().max() == 0  # the padded pixel
    assert learner.grad[0, 1, 0, 0].item() == pytest.approx((0.9 - 1) / 3, rel=1e-5)


def test_soft_cross_supervision_by_hand():
    learner = logits_of([0.9, 0.2, 0.6, 0.5]).requires_grad_()
    pseudo = cps.pseudo_of(logits_of([0.8, 0.7, 0.4, 0.3]), (2, 2), soft=True)
    valid_mask = torch.tensor([[[True, True], [True, False]]])
    loss = cps.cpc_loss(learner, pseudo, valid_mask)
    assert loss.item() == pytest.approx(2 * (0.1**2 + 0.5**2 + 0.2**2) / 3, rel=1e-5)
    loss.backward()
    assert learner.grad[0, :, 1, 1].abs().max() == 0  # the padded pixel
    # d/dz of 2 (p - p2)² is 4 (p - p2) p (1 - p).
    assert learner.grad[0, 1, 0, 0].item() == pytest.approx(4 * 0.1 * 0.9 * 0.1 / 3, rel=1e-4)


def test_overlap_leaves_the_background_out():
    first, second = torch.tensor([[[0, 1], [2, 0]]]), torch.tensor([[[0, 1], [1, 2]]])
    valid_mask = torch.ones(1, 2, 2, dtype=torch.bool)
    assert cps.overlap(first, second, valid_mask, background=0).item() == pytest.approx(1 / 3)
    assert cps.overlap(first, second, valid_mask, background=None).item() == pytest.approx(1 / 2)
    valid_mask[0, 1] = False
    assert cps.overlap(first, second, valid_mask, background=0).item() == 1.0
    assert cps.overlap(first, second, ~valid_mask & False, background=0).item() == 0.0


def test_an_ignored_batch_is_finite_and_without_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    ignored = torch.full((2, 16, 16), IGNORE, dtype=torch.uint8)
    for ohem in (None, (0.7, 10)):
        loss = labelled_loss(logits, ignored, ohem)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_hard_pixels_against_sorting():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 8, 8) * 3
    target = torch.randint(0, 4, (2, 8, 8), dtype=torch.uint8)
    target[:, 0] = IGNORE
    loss = cross_entropy(logits, target, reduction="none")
    for min_kept in (3, 50, 1000):
        kept = hard_pixels(logits, target, 0.7, min_kept) != IGNORE
        rank = min(2 * min_kept, loss.numel())
        hardest = loss.flatten().sort(descending=True).values[rank - 1]
        expected = ((loss >= -math.log(0.7)) | (loss >= hardest)) & (target != IGNORE)
        assert torch.equal(kept, expected)
    # Fewer pixels than must be kept: all stay.
    assert torch.equal(hard_pixels(logits, target, 0.7, 1000), target)


# --------------------------------------------------------------------------------- a training step


class Recorder(torch.nn.Module):
    """A small network that notes the images of each forward pass and whether gradients were on."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 12, 1)
        self.seen: list[tuple[torch.Tensor, bool]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((images, torch.is_grad_enabled()))
        return self.conv(images[:, :, ::4, ::4])


def first_batches(args, data) -> tuple[dict, list[dict]]:
    """The labelled batch and the unlabelled ones of the first iteration."""
    streams = (1, 2) if args.cutmix else (1,)
    loaders = [train_loader(data, data.labelled, 0, args, 0, 1)]
    loaders += [train_loader(data, data.unlabelled, stream, args, 0, 1) for stream in streams]
    batch_l, *batches_u = (next(iter(loader)) for loader in loaders)
    return batch_l, batches_u


def one_step(*flags: str):
    """The losses of two recorders on the built-in data.

    Returns:
        The recorders with their gradients, the measures, the labelled batch, the unlabelled ones,
        and the settings.
    """
    args = cps.parse_args(["--crop-size", "32", "-b", "4", *flags])
    data = datasets.load(settings())
    batch_l, batches_u = first_batches(args, data)
    f1, f2 = Recorder(1), Recorder(2)
    measured = cps.train_step(f1, f2, batch_l, batches_u, 0, args, data.background)
    measured["loss"].backward()
    assert all(f.conv.weight.grad.abs().max() > 0 for f in (f1, f2))
    return (f1, f2), measured, batch_l, batches_u, args


def upsampled(network: Recorder, images: torch.Tensor) -> torch.Tensor:
    """Its logits at the images' size."""
    return torch.nn.functional.interpolate(
        network(images), (32, 32), mode="bilinear", align_corners=True
    )


def ce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PyTorch's cross-entropy over the pixels that are not ignored."""
    return torch.nn.functional.cross_entropy(logits, target.long(), ignore_index=IGNORE)


def test_a_cutmix_step_is_the_papers():
    networks, measured, batch_l, (u0, u1), args = one_step()
    fresh = [Recorder(1), Recorder(2)]
    mask = cps.xor_box_masks(4, 32, args.seed, 0, CPU)
    images = [normalise(batch["image"], batch["valid_mask"]) for batch in (batch_l, u0, u1)]
    mixed = torch.where(mask[:, None], images[2], images[1])
    for network in networks:
        assert [on for _, on in network.seen] == [True, False, False, True]
        torch.testing.assert_close(network.seen[3][0], mixed)

    inside, outside = ([upsampled(f, images[index]).argmax(1) for f in fresh] for index in (2, 1))
    labels = [torch.where(mask, inside[k], outside[k]) for k in (0, 1)]
    valid = torch.where(mask, u1["valid_mask"], u0["valid_mask"])
    targets = [label.masked_fill(~valid, IGNORE) for label in labels]
    supervised = sum(ce(upsampled(f, images[0]), batch_l["target"]) for f in fresh)
    crossed = sum(ce(upsampled(fresh[k], mixed), targets[1 - k]) for k in (0, 1))
    torch.testing.assert_close(measured["loss_sup"], supervised)
    torch.testing.assert_close(measured["loss_unsup"], crossed)
    torch.testing.assert_close(measured["loss"], supervised + args.cps_weight * crossed)


def test_without_cutmix_labelled_images_are_cross_supervised_too():
    networks, measured, batch_l, (u0,), args = one_step("--no-cutmix")
    assert args.cps_weight == 1.5
    assert all([on for _, on in network.seen] == [True, True] for network in networks)
    fresh = [Recorder(1), Recorder(2)]
    images = [normalise(batch["image"], batch["valid_mask"]) for batch in (batch_l, u0)]
    valid = torch.cat([batch_l["valid_mask"], u0["valid_mask"]])
    full = [upsampled(f, torch.cat(images)) for f in fresh]
    targets = [logits.argmax(1).masked_fill(~valid, IGNORE) for logits in full]
    crossed = sum(ce(full[k], targets[1 - k]) for k in (0, 1))
    torch.testing.assert_close(measured["loss_unsup"], crossed)


@pytest.mark.parametrize("flags", [(), ("--no-cutmix",)])
def test_in_cpc_each_network_is_a_fixed_target_of_the_other(flags):
    networks, measured, batch_l, batches_u, args = one_step("--soft", *flags)
    fresh = [Recorder(1), Recorder(2)]
    images_l = normalise(batch_l["image"], batch_l["valid_mask"])
    images_u = [normalise(batch["image"], batch["valid_mask"]) for batch in batches_u]
    if args.cutmix:
        mask = cps.xor_box_masks(4, 32, args.seed, 0, CPU)
        images = torch.where(mask[:, None], images_u[1], images_u[0])
        valid = torch.where(mask, batches_u[1]["valid_mask"], batches_u[0]["valid_mask"])
    else:
        images = torch.cat([images_l, images_u[0]])
        valid = torch.cat([batch_l["valid_mask"], batches_u[0]["valid_mask"]])
    with torch.no_grad():
        targets = [upsampled(f, images).softmax(1) for f in fresh]
        if args.cutmix:
            parts = [[upsampled(f, x).softmax(1) for x in images_u] for f in fresh]
            targets = [torch.where(mask[:, None], one, zero) for zero, one in parts]

    def distance(k: int) -> torch.Tensor:
        square = (upsampled(fresh[k], images).softmax(1) - targets[1 - k]).square()
        return square.sum(1)[valid].mean()

    crossed = distance(0) + distance(1)
    torch.testing.assert_close(measured["loss_unsup"], crossed)
    supervised = sum(ce(upsampled(f, images_l), batch_l["target"]) for f in fresh)
    (supervised + args.cps_weight * crossed).backward()
    for network, expected in zip(networks, fresh):
        torch.testing.assert_close(network.conv.weight.grad, expected.conv.weight.grad)


# ------------------------------------------------------------------------------- the whole training


def build(run: Run) -> list[DeepLabV3Plus]:
    """Two networks, as `main` builds them."""
    classes = run.data.num_classes
    return [run.place(DeepLabV3Plus.from_settings(run.args, classes)) for _ in range(2)]


@pytest.mark.parametrize("weights", ["blots", "none"])
def test_the_two_networks_start_differently(begin, weights: str):
    """In their heads; in their backbones as well, unless those are pretrained."""
    networks = build(begin(cps, "--weights", weights))
    assert not torch.equal(*(network.decoder[0][0].weight for network in networks))
    stems = [network.backbone.stem[0][0].weight for network in networks]
    assert torch.equal(*stems) == (weights == "blots")


def test_the_unlabelled_batches_are_independent():
    args = cps.parse_args([])
    data = datasets.load(settings())
    u0, u1 = (train_loader(data, data.unlabelled, stream, args, 0, 5) for stream in (1, 2))
    names = [(first["name"], second["name"]) for first, second in zip(u0, u1)]
    assert len(names) == 5 and all(first != second for first, second in names)


def test_mean_cross_entropy_counts_valid_pixels_only():
    logits = logits_of([0.9, 0.2, 0.6, 0.5])
    target = torch.tensor([[[1, IGNORE], [IGNORE, 0]]])
    expected = -(math.log(0.9) + math.log(0.5)) / 2
    assert mean_cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-6)


def test_every_parameter_learns_in_bfloat16(begin):
    """Autocast caches weights that it cast under no_grad without their graph.

    The step, which labels under no_grad between two passes with gradient, must not fall for it.
    """
    run = begin(cps, "--amp", "bf16")
    networks = build(run)
    assert [network.amp for network in networks] == [torch.bfloat16] * 2
    batch_l, batches_u = first_batches(run.args, run.data)
    measured = cps.train_step(*networks, batch_l, batches_u, 0, run.args, run.data.background)
    measured["loss"].backward()
    for network in networks:
        assert network(batch_l["image"].permute(0, 3, 1, 2).float()).dtype == torch.bfloat16
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("flags", [(), ("--compile",)])
def test_what_is_trained_through_has_the_parameters_of_the_network(begin, flags):
    run = begin(cps, *flags)
    network, _ = build(run)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ids = list(map(id, network.parameters()))
    trained = run.parallel(network)
    assert list(map(id, trained.parameters())) == ids
    optimizer = sgd([network], run.args)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(ids)
    assert (trained is network) == (not flags)
    assert getattr(trained, "_orig_mod", trained) is network
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = network.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name, _ in network.named_parameters())


def test_the_training_moves_both_networks(begin, train):
    run = begin(cps, "--max-iters", "1")
    fresh = build(run)
    networks = train(cps, run)
    assert list(networks) == ["model_1", "model_2"]
    for start, network in zip(fresh, networks.values()):
        # The same start, and a step of a learning rate of 0.1.
        assert network["classifier.weight"].sub(start.classifier.weight).abs().max() < 0.1
        for name, parameter in start.named_parameters():
            assert not torch.equal(network[name], parameter), name
