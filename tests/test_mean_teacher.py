"""Mean Teacher and CutMix-Seg: the losses by hand, who learns, and the moving average against torch's."""

import copy
import math

import pytest
import torch
from conftest import settings

import mean_teacher
from common import datasets
from common.augment import normalise


class Network(torch.nn.Module):
    """A convolution and a BatchNorm; remembers what it saw and how."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.seen = torch.nn.Conv2d(3, 6, 1), torch.nn.BatchNorm2d(6), []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((images, self.training))
        return self.norm(self.conv(images[:, :, ::4, ::4]))


def one_step(rt, *flags: str, iteration: int = 5):
    """A step at `iteration` with a student and a teacher that differ."""
    args = mean_teacher.parse_args(["--crop-size", "32", "-b", "4", *flags])
    data = datasets.load(settings())
    batches = list(next(mean_teacher.load_batches(args, data, rt, iteration, iteration + 1)))
    student, teacher = Network(1), Network(2).requires_grad_(False)
    networks = {"teacher": teacher.train(not args.cutmix), "student": student}
    before = copy.deepcopy(networks)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    torch.manual_seed(3)
    measured = mean_teacher.train_step(networks, optimizer, batches, iteration, args, data, rt)
    return networks, before, measured, batches, args


def test_squared_distance_and_confidence_by_hand(rt):
    probs = torch.tensor([[[[0.5, 0.9]], [[0.5, 0.1]]]], requires_grad=True)  # (1,2,1,2)
    targets = torch.tensor([[[[0.98, 0.1]], [[0.02, 0.9]]]])
    valid = torch.tensor([[[True, True]]])
    distance = mean_teacher.squared_distance(probs, targets, valid, rt)
    assert distance.item() == pytest.approx((2 * 0.48**2 + 2 * 0.8**2) / 2)
    assert mean_teacher.confident_share(targets, valid, 0.97, rt).item() == 0.5
    one = torch.tensor([[[True, False]]])
    assert mean_teacher.squared_distance(probs, targets, one, rt).item() == pytest.approx(2 * 0.48**2)
    assert mean_teacher.confident_share(targets, one, 0.97, rt).item() == 1
    nothing = mean_teacher.squared_distance(probs, targets, valid & False, rt)
    nothing.backward()
    assert nothing.item() == 0 and probs.grad.abs().max() == 0


def test_the_average_is_that_of_torch():
    student = Network(1)
    teacher = copy.deepcopy(student)
    averaged = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    averaged.update_parameters(student)  # the first call copies
    for step in range(4):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        student(torch.randn(2, 3, 8, 8))
        mean_teacher.ema_update(teacher, student, 0.9, buffers=True)
        averaged.update_parameters(student)
    for ours, theirs in zip(teacher.parameters(), averaged.module.parameters()):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(teacher.norm.running_mean, averaged.module.norm.running_mean)
    assert teacher.norm.num_batches_tracked == student.norm.num_batches_tracked


@pytest.mark.parametrize("flags", [("--noise-std", "0"), ("--cutmix",)])
def test_the_student_learns_and_the_teacher_follows(flags, rt):
    networks, before, measured, _, args = one_step(rt, *flags)
    student, teacher = networks["student"], networks["teacher"]
    assert not torch.equal(student.conv.weight, before["student"].conv.weight)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    decay = min(1 - 1 / 6, 0.99)
    torch.testing.assert_close(
        teacher.conv.weight, decay * before["teacher"].conv.weight + (1 - decay) * student.conv.weight.detach()
    )
    if args.cutmix:
        torch.testing.assert_close(
            teacher.norm.running_mean, decay * before["teacher"].norm.running_mean + (1 - decay) * student.norm.running_mean
        )
    assert all(math.isfinite(value.item()) for value in measured.values())


def test_the_first_average_is_the_student(rt):
    networks, *_ = one_step(rt, "--cutmix", iteration=0)
    torch.testing.assert_close(networks["teacher"].conv.weight, networks["student"].conv.weight)


def test_a_mean_teacher_step_is_the_definition(rt):
    networks, before, measured, (batch_l, batch_u), _ = one_step(rt, "--noise-std", "0", "--unsup-weight", "7")
    assert [training for _, training in networks["teacher"].seen] == [True, True]
    images = [normalise(batch["image"], batch["valid_mask"]) for batch in (batch_l, batch_u)]
    valid = torch.cat([batch_l["valid_mask"], batch_u["valid_mask"]])
    maps = {
        name: torch.cat(
            [torch.nn.functional.interpolate(f(x), (32, 32), mode="bilinear", align_corners=True).softmax(1) for x in images]
        )
        for name, f in before.items()
    }
    squares = (maps["student"] - maps["teacher"]).square().permute(0, 2, 3, 1)[valid]  # (pixels, classes)
    torch.testing.assert_close(measured["loss_unsup"], squares.mean())
    torch.testing.assert_close(measured["loss"], measured["loss_sup"] + 7 * squares.mean())


def test_a_cutmix_step_is_the_definition(rt):
    networks, before, measured, (_, u0, u1), args = one_step(rt, "--cutmix", "--conf-thresh", "0.3")
    assert args.unsup_weight == 5 and measured["loss"] == measured["loss_sup"] + 5 * measured["loss_unsup"]
    mask = mean_teacher.half_area_masks(4, 32, rt, args.seed, 5)
    images = [normalise(batch["image"], batch["valid_mask"]) for batch in (u0, u1)]
    mixed = torch.where(mask[:, None], images[1], images[0])
    torch.testing.assert_close(networks["student"].seen[1][0], mixed)
    assert [training for _, training in networks["teacher"].seen] == [False, False]

    def probabilities(f, x):
        return torch.nn.functional.interpolate(f(x), (32, 32), mode="bilinear", align_corners=True).softmax(1)

    targets = torch.where(
        mask[:, None], probabilities(before["teacher"], images[1]), probabilities(before["teacher"], images[0])
    )
    valid = torch.where(mask, u1["valid_mask"], u0["valid_mask"])
    squares = (probabilities(before["student"], mixed) - targets).square().sum(1)[valid].mean()
    share = (targets.amax(1) >= 0.3)[valid].double().mean()
    assert 0 < share < 1
    assert measured["loss_unsup"].item() == pytest.approx((squares * share).item(), rel=1e-5)
    assert measured["confident"].item() == pytest.approx(share.item())


def test_noise_differs_between_student_and_teacher(rt):
    networks, _, _, (batch_l, _), _ = one_step(rt, "--noise-std", "0.5")
    clean = normalise(batch_l["image"], batch_l["valid_mask"])
    seen = [networks[name].seen[0][0] - clean for name in ("student", "teacher")]
    assert all(noise.std().item() == pytest.approx(0.5, rel=0.05) for noise in seen)
    assert abs((seen[0] * seen[1]).mean().item()) < 0.02


def test_colour_jitter_reaches_the_student_alone(rt):
    networks, _, _, (_, u0, u1), args = one_step(rt, "--cutmix", "--colour-jitter")
    assert not torch.equal(u0["image"], u0["image_strong"])
    clean = [normalise(batch["image"], batch["valid_mask"]) for batch in (u0, u1)]
    assert all(any(torch.equal(x, seen) for seen, _ in networks["teacher"].seen) for x in clean)
    mask = mean_teacher.half_area_masks(4, 32, rt, args.seed, 5)
    jittered = [normalise(batch["image_strong"], batch["valid_mask"]) for batch in (u0, u1)]
    torch.testing.assert_close(networks["student"].seen[1][0], torch.where(mask[:, None], jittered[1], jittered[0]))
